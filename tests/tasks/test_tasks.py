"""What all tasks share: the table, batches, loss, metric and interval."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from edgekd.errors import DataError, ModelError, RecipeError
from edgekd.tasks import TASKS, batches, correct, get_task, infer_task, score_interval


@dataclass(frozen=True)
class Lengths:
    lengths: np.ndarray


def long_tailed(count):
    return Lengths(np.minimum(np.random.default_rng(1).lognormal(3, 0.9, count).astype(np.int64) + 2, 512))


@pytest.mark.parametrize("count", [1, 7, 64, 1000, 5003])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_example_is_in_one_batch(count, shuffle):
    cut = batches(long_tailed(count), 16, seed=1, epoch=2, shuffle=shuffle)
    assert sorted(np.concatenate(cut).tolist()) == list(range(count))
    assert sorted(len(batch) for batch in cut)[1:] == [16] * (len(cut) - 1)


@pytest.mark.parametrize("size", [3, 16])
def test_no_example_is_trained_on_alone(size):
    cut = batches(long_tailed(10 * size + 1), size, seed=1)
    assert sorted(np.concatenate(cut).tolist()) == list(range(10 * size + 1))
    assert sorted(len(batch) for batch in cut)[:3] == sorted([2, size - 1, size])
    assert [len(batch) for batch in batches(long_tailed(3), 1)] == [1, 1, 1]


def test_batches_are_a_function_of_seed_and_epoch():
    def draw(seed, epoch):
        return [batch.tolist() for batch in batches(long_tailed(500), 8, seed=seed, epoch=epoch)]

    assert draw(1, 2) == draw(1, 2)
    assert draw(1, 2) != draw(1, 3)
    assert draw(1, 2) != draw(2, 2)


@pytest.mark.parametrize("size", [8, 32])
def test_batches_waste_little_on_a_long_tail(size):
    encoded = long_tailed(6000)
    cut = batches(encoded, size, seed=0, epoch=0)
    padded = sum(-(-encoded.lengths[batch].max() // 8) * 8 * len(batch) for batch in cut)
    assert padded <= 1.25 * encoded.lengths.sum()
    firsts = [encoded.lengths[batch].max() for batch in cut]
    assert firsts != sorted(firsts)


def test_equal_lengths_are_simply_shuffled():
    encoded = Lengths(np.ones(100, dtype=np.int64))
    assert np.concatenate(batches(encoded, 10, shuffle=False)).tolist() == list(range(100))
    assert batches(encoded, 10)[0].tolist() != list(range(10))
    with pytest.raises(ValueError, match="batch_size is 0; expected at least 1"):
        batches(encoded, 0)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_the_loss_leaves_unlabelled_examples_out(task):
    import torch

    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([0, -1, 2, 1, -1, 0])
    known = labels >= 0
    expected = torch.nn.functional.cross_entropy(logits[known], labels[known])
    assert torch.allclose(task.loss(logits, labels), expected)
    assert task.loss(logits.bfloat16(), labels).dtype == torch.float32
    none = task.loss(logits, torch.full((6,), -1))
    none.backward()
    assert none.item() == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_the_score_is_the_share_of_hits(task):
    logits = np.eye(3)[[0, 1, 2, 2]]
    assert task.score(logits, np.array([0, 1, 2, 2])) == 1
    assert task.score(logits, np.array([0, 1, 1, -1])) == 2 / 3
    assert correct(logits, np.array([0, 0, -1, 2])).tolist() == [True, False, True]
    with pytest.raises(DataError, match="none of the examples has a label"):
        task.score(logits, np.full(4, -1))


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_a_task_is_inferred_from_the_architecture(task):
    assert infer_task({"architectures": [f"Some{task.architecture}"]}) == task.name
    assert infer_task({"architectures": [f"Some{task.architecture}WithTeacher"]}) == task.name
    assert get_task(task.name) is task
    import transformers

    assert hasattr(transformers, task.auto_class)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "says multi_label_classification, which is not supported"),
        ({"problem_type": "regression"}, "says regression, which is not supported; use a model that picks one"),
        ({"id2label": {"0": "score"}}, "says a single output, which means regression"),
        ({"architectures": ["BertForMaskedLM"]}, r"names BertForMaskedLM, so the task is unclear .*state the task"),
        ({"architectures": None}, "names no architecture"),
    ],
)
def test_a_model_for_no_task_is_refused(config, message):
    with pytest.raises(ModelError, match=message):
        infer_task({"architectures": ["BertForSequenceClassification"], **config})


def test_an_unknown_task_is_refused():
    with pytest.raises(
        RecipeError, match=r"unknown task 'text-clasification' \(did you mean 'text-classification'\?\)"
    ):
        get_task("text-clasification")


def test_the_interval_is_wilsons():
    # Newcombe 1998 (doi:10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E), table I: 81 of 263.
    low, high = score_interval(np.arange(263) < 81)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert score_interval(np.zeros(20, dtype=bool)) == pytest.approx((0, 0.1611), abs=5e-5)
    assert score_interval(np.ones(20, dtype=bool)) == pytest.approx((0.8389, 1), abs=5e-5)
    narrow, wide = score_interval(np.arange(90) < 60, 0.8), score_interval(np.arange(90) < 60, 0.99)
    assert wide[0] < narrow[0] < 2 / 3 < narrow[1] < wide[1]
    with pytest.raises(ValueError, match=r"got 0 and 0.95"):
        score_interval(np.zeros(0, dtype=bool))


def test_importing_tasks_and_data_is_light():
    code = "import sys, edgekd.tasks, edgekd.data; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "datasets", "pyarrow", "sklearn", "pandas"} & set(loaded)
