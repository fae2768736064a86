"""Students with fewer tokens: compared with the teacher at the tokens they kept."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm, mse_loss

from edgekd.context import Silent
from edgekd.distill.cache import cached
from edgekd.distill.objective import Objective
from edgekd.distill.signals import observe
from edgekd.distill.teachers import live
from edgekd.distill.terms import parse_terms
from edgekd.distill.wiring import wire
from edgekd.families.compact import install, kept_tokens
from edgekd.student import Student, load_student
from edgekd.tasks.text_classification import EncodedText

TOKENS = {"first": ({}, {}, {"tokens": 1}), "some": ({}, {"tokens": 4}, {}), "both": ({"tokens": 5}, {}, {"tokens": 1})}


@pytest.fixture
def pair(make_model):
    """A teacher and a student with other weights and fewer tokens."""

    def make(kind: str, change: str) -> tuple[Student, Student]:
        side = "Image" if kind == "vit" else "Sequence"
        teacher = load_student(make_model(kind), auto_class=f"AutoModelFor{side}Classification")
        model = copy.deepcopy(teacher.model)
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        layers = [replace(layer, **new) for layer, new in zip(teacher.arch.layers, TOKENS[change], strict=True)]
        install(model, teacher.family, layers)
        return teacher, teacher.with_model(model)

    return make


def batch_of(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if kind == "vit":
        return {"pixel_values": torch.randn(3, 1, 8, 8, generator=generator)}
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:], mask[2, 3:] = 0, 0
    return {"input_ids": torch.randint(5, 40, (3, 9), generator=generator) * mask, "attention_mask": mask}


def objective_of(teacher: Student, student: Student, batch: dict, losses: dict, source=None) -> Objective:
    terms = parse_terms(losses)
    wiring = wire(student, teacher, terms, batch=batch, layer_map="even")
    source = source or live(teacher.model, hidden=wiring.teacher_layers)
    return Objective(model=student.model, terms=terms, wiring=wiring, teacher=source, labels=torch.full((99,), -1))


def rows_of(state: torch.Tensor, model: torch.nn.Module, index: int, mask: torch.Tensor, full: torch.Tensor):
    """Rows of a student's and a teacher's state at the same real tokens, by a loop over samples."""
    kept = kept_tokens(model, index)
    ours, theirs, owners = [], [], []
    for sample in range(len(state)):
        positions = range(state.shape[1]) if kept is None else kept[sample].tolist()
        for place, position in enumerate(positions):
            if mask[sample, position]:
                ours.append(state[sample, place])
                theirs.append(full[sample, position])
                owners.append(sample)
    return torch.stack(ours), torch.stack(theirs), torch.tensor(owners)


@pytest.mark.parametrize("kind", ["bert", "vit"])
@pytest.mark.parametrize("change", TOKENS)
def test_hidden_states_are_compared_at_the_same_tokens(pair, kind, change):
    (teacher, student), batch = pair(kind, change), batch_of(kind)
    objective = objective_of(teacher, student, batch, {"hidden_mse": 1.0})
    assert objective.wiring.pairs == ((1, 1), (2, 2), (3, 3))
    loss = objective(batch, np.arange(3))
    with torch.no_grad():
        ours = student.model(**batch, output_hidden_states=True).hidden_states
        theirs = teacher.model(**batch, output_hidden_states=True).hidden_states
    mask = batch.get("attention_mask", torch.ones(ours[0].shape[:2]))
    parts = []
    for index in (1, 2, 3):
        first, second, _ = rows_of(ours[index], student.model, index, mask, theirs[index])
        parts.append(mse_loss(*(layer_norm(rows, rows.shape[-1:]) for rows in (first, second))))
    torch.testing.assert_close(loss, sum(parts) / 3, atol=1e-5, rtol=1e-5)
    loss.backward()


@pytest.mark.parametrize("change", TOKENS)
def test_embeddings_are_means_over_the_same_tokens(pair, change):
    (teacher, student), batch = pair("bert", change), batch_of("bert")
    objective = objective_of(teacher, student, batch, {"rkd": 1.0})
    loss = objective(batch, np.arange(3))
    with torch.no_grad():
        ours = student.model(**batch, output_hidden_states=True).hidden_states[-1]
        theirs = teacher.model(**batch, output_hidden_states=True).hidden_states[-1]
    first, second, owners = rows_of(ours, student.model, 3, batch["attention_mask"], theirs)
    means = [torch.stack([rows[owners == sample].mean(0) for sample in range(3)]) for rows in (first, second)]
    told = objective.terms[0].loss.function(*means)
    torch.testing.assert_close(loss, told, atol=1e-5, rtol=1e-4)


def test_a_copy_with_fewer_tokens_has_no_loss_before_it_drops_them(pair):
    teacher, _ = pair("bert", "first")
    model, batch = copy.deepcopy(teacher.model), batch_of("bert")
    install(model, teacher.family, [*teacher.arch.layers[:-1], replace(teacher.arch.layers[-1], tokens=1)])
    objective = objective_of(teacher, teacher.with_model(model), batch, {"hidden_mse": 1.0})
    assert float(objective(batch, np.arange(3)).detach()) < 1e-9


def test_the_cache_gives_the_same_loss(pair, tmp_path):
    teacher, student = pair("bert", "both")
    lengths = np.arange(3, 15, 2)
    ids = np.random.default_rng(0).integers(5, 40, int(lengths.sum())).astype(np.int32)
    starts = np.cumsum(lengths) - lengths
    data = EncodedText(
        ids=ids, types=None, starts=starts, lengths=lengths, labels=None, padding=(0, 0), left=False, longest=24
    )
    indices = np.array([4, 0, 3])
    batch = data.collate(indices)
    losses = {"hidden_mse": 1.0, "rkd": 1.0}
    alive = objective_of(teacher, student, batch, losses)
    source = cached(
        teacher.model,
        data,
        hidden=alive.wiring.teacher_layers,
        folder=tmp_path,
        device=torch.device("cpu"),
        progress=Silent(),
    )
    stored = objective_of(teacher, student, batch, losses, source)
    torch.testing.assert_close(alive(batch, indices), stored(batch, indices), atol=1e-3, rtol=1e-3)


def test_a_teacher_with_fewer_tokens_is_compared_where_it_has_all(pair):
    student, teacher = pair("bert", "first")
    batch = batch_of("bert")
    objective = objective_of(teacher, student, batch, {"hidden_mse": 1.0, "rkd": 1.0})
    assert objective.wiring.pairs == ((1, 1), (2, 2))
    assert objective.wiring.last == (3, 2)
    assert objective(batch, np.arange(3)).isfinite()


def test_models_with_all_tokens_show_nothing_new(pair):
    teacher, student = pair("bert", "some")
    batch = batch_of("bert")
    with torch.no_grad():
        plain = observe(teacher.model, batch, hidden=(1, 3))
        fewer = observe(student.model, batch, hidden=(1, 3))
    assert plain.kept == {}
    assert set(fewer.kept) == {3}
    assert len(plain.hidden[3]) == 9 + 5 + 3
    assert len(fewer.hidden[3]) == 4 + 4 + 3
    assert fewer.kept[3].counts.tolist() == [4, 4, 3]
