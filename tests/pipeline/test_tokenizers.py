"""A student with its own tokenizer: everything that feeds it reads the texts with it, and the teacher keeps its own."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import edgekd
from edgekd.cli import main
from edgekd.context import Budget, Silent
from edgekd.data import DataSpec
from edgekd.pipeline import compress, evaluate, prepare
from edgekd.pipeline.export import export
from edgekd.pipeline.setup import fitted, same_tokenizer
from edgekd.student import Student, load_student
from edgekd.target import load_target, probe
from edgekd.tasks import get_task
from edgekd.vocabulary import Vocabulary

SPECIAL = 5
AUTO = "AutoModelForSequenceClassification"


def permuted(student: Student, folder) -> Student:
    """The student with its ordinary words numbered anew: another tokenizer, the rows moved along, equal answers."""
    from transformers import BertTokenizerFast

    words = (student.processor_dir / "vocab.txt").read_text().split()
    order = np.concatenate([np.arange(SPECIAL), SPECIAL + np.random.default_rng(1).permutation(len(words) - SPECIAL)])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words[i] for i in order))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    model = copy.deepcopy(student.model)
    table = model.get_input_embeddings().weight
    table.data = table.data[torch.from_numpy(order)]
    return replace(student, model=model, processor_dir=folder)


@pytest.fixture(scope="module")
def teacher(make_model, text_data, tmp_path_factory):
    """A teacher whose answers hang on the words, unlike those of a freshly drawn model; half of them are positive."""
    student = load_student(make_model("bert"), auto_class=AUTO)
    model = copy.deepcopy(student.model)
    model.get_input_embeddings().weight.data *= 10
    model.classifier.weight.data *= 100
    rows = [json.loads(line)["text"] for line in (text_data / "test.jsonl").read_text().splitlines()]
    batch = (
        get_task("text-classification")
        .load_processor(student.processor_dir)
        .hf(rows, padding=True, return_tensors="pt")
    )
    with torch.no_grad():
        logits = model(**batch).logits
    model.classifier.bias.data[1] -= (logits[:, 1] - logits[:, 0]).median()
    folder = tmp_path_factory.mktemp("teacher") / "model"
    replace(student, model=model).save(folder)
    return folder


@pytest.fixture(scope="module")
def texts(text_data, tmp_path_factory):
    """The texts without labels, so that the teacher labels them."""
    folder = tmp_path_factory.mktemp("unlabelled")
    for split in ("train", "validation", "test"):
        rows = [json.loads(line)["text"] for line in (text_data / f"{split}.jsonl").read_text().splitlines()]
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in rows))
    return folder


@pytest.fixture(scope="module")
def setup(teacher, texts):
    return prepare(teacher, DataSpec(path=str(texts)), progress=Silent())


@pytest.fixture(scope="module")
def student(setup, tmp_path_factory):
    folder = tmp_path_factory.mktemp("permuted")
    permuted(setup.teacher, folder / "tokenizer").save(folder / "model")
    return load_student(folder / "model", auto_class=AUTO)


def test_the_teachers_answers_hang_on_the_words(setup, student):
    """Else the tests below would see nothing."""
    assert 0.1 < float((setup.test.labels == 1).mean()) < 0.9
    wrong = student.model(**setup.test.collate(np.arange(40))).logits.argmax(-1).numpy()
    assert (wrong == setup.test.labels).mean() < 0.9


def test_texts_are_encoded_by_the_students_own_tokenizer_once(setup, student):
    own = setup.for_student(student)
    assert own is setup.for_student(load_student(student.processor_dir, auto_class=AUTO))
    assert setup.for_student(setup.teacher) is setup
    assert setup.for_student(replace(student, processor_dir=None)) is setup
    assert not same_tokenizer(setup.teacher, student)
    for split in ("train", "validation", "test"):
        ours, theirs = getattr(own, split), getattr(setup, split)
        assert (ours.lengths == theirs.lengths).all()
        assert ours.fingerprint != theirs.fingerprint
        assert ours.labels is theirs.labels
    assert own.teacher is setup.teacher
    assert own.processor.hf.convert_tokens_to_ids("good") != setup.processor.hf.convert_tokens_to_ids("good")


def test_another_tokenizer_keeps_to_the_length_of_fixed_shapes(setup, student):
    target = probe(load_target("gpu-jetson-orin"))
    short = fitted(setup, target, Budget(sequence=8))
    assert short.max_length == 8
    assert int(short.for_student(student).train.lengths.max()) == 8
    assert int(setup.for_student(student).train.lengths.max()) > 8
    assert fitted(setup, target, Budget(sequence=30)).max_length == 30


def with_stage(patch, number_anew):
    patch.setattr(
        Vocabulary, "run", lambda self, student, ctx: permuted(student, ctx.work / "new") if number_anew else student
    )


STAGES = [{"vocabulary": {"force": True}}, {"quantize": {"lowering": "int8_qdq", "force": True, "calibration": 16}}]
BUDGET = {"size_mb": 100, "sequence": 32}


@pytest.fixture(scope="module")
def runs(teacher, texts, make_recipe, tmp_path_factory):
    """The same run with the words numbered anew, and without."""
    recipe = make_recipe(
        teacher=str(teacher), data={"path": str(texts)}, stages=STAGES, targets=["gpu-jetson-orin"], budget=BUDGET
    )
    found = []
    for number_anew in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            with_stage(patch, number_anew)
            found.append(compress(recipe, tmp_path_factory.mktemp("run") / "run"))
    return found


def test_numbering_words_anew_changes_no_figure(runs):
    new, old = (result.manifests["gpu-jetson-orin"] for result in runs)
    vocabulary, quantize = new["ledger"]
    assert vocabulary["forced"]
    assert vocabulary["before"]["divergence"] == vocabulary["after"]["divergence"] < 1e-3
    assert vocabulary["before"]["metric"] == vocabulary["after"]["metric"] > 0.9
    for name in ("metric", "divergence"):
        assert quantize["after"][name] == old["ledger"][1]["after"][name]
    for name in ("value", "ci95", "n", "metric", "retained"):
        assert new["quality"][name] == old["quality"][name]
    assert new["artifact"]["parity"] == old["artifact"]["parity"]
    ranges = [edgekd.load(result.folder / "02-quantize").quantization["ranges"] for result in runs]
    assert ranges[0] == ranges[1], "calibrated on the student's own texts"


def test_the_bundle_ships_the_students_tokenizer_and_is_evaluated_with_it(runs, texts, text_data, tmp_path):
    new, old = (result.bundles["gpu-jetson-orin"] for result in runs)
    assert (new / "vocab.txt").read_text() != (old / "vocab.txt").read_text()
    assert (new / "tokenizer.json").read_bytes() == (runs[0].folder / "01-vocabulary" / "tokenizer.json").read_bytes()
    seen = [evaluate(bundle, DataSpec(path=str(text_data))) for bundle in (new, old)]
    assert seen[0]["value"] == seen[1]["value"]
    exported = [
        export(
            result.folder / "02-quantize",
            tmp_path / f"bundle-{index}",
            target=probe(load_target("gpu-jetson-orin")),
            budget=Budget(sequence=32),
            data=DataSpec(path=str(text_data)),
        )
        for index, result in enumerate(runs)
    ]
    assert exported[0]["quality"]["value"] == exported[1]["quality"]["value"]
    assert exported[0]["artifact"]["parity"] == exported[1]["artifact"]["parity"]


def test_stages_that_ask_the_teacher_refuse_another_tokenizer(teacher, student, texts, tmp_path):
    source = str(student.processor_dir)
    common = ["--data", str(texts), "--teacher", str(teacher), "-q", "--out"]
    refused = CliRunner().invoke(main, ["distill", source, *common, str(tmp_path / "d"), "--set", "epochs=1"])
    assert refused.exit_code == 2
    words = " ".join(refused.output.split())
    assert "reads the texts as other tokens than" in words
    assert "give a teacher with the same tokenizer" in words
    assert "so distill comes before it" in words
    assert not (tmp_path / "d").exists()
    quantize = ["quantize", source, *common, str(tmp_path / "q"), "--set", "lowering=int8_dynamic", "--json"]
    done = CliRunner().invoke(main, quantize)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["details"]["float_metric"] == 1.0


DISTILL = ["--set", "epochs=1", "--set", "precision=fp32", "-q"]


def test_other_bytes_of_an_equal_tokenizer_are_no_reason_to_refuse(teacher, texts, tmp_path):
    shutil.copytree(teacher, tmp_path / "student")
    file = tmp_path / "student" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=7))
    common = ["--data", str(texts), "--teacher", str(teacher), "--out", str(tmp_path / "d"), *DISTILL]
    done = CliRunner().invoke(main, ["distill", str(tmp_path / "student"), *common])
    assert done.exit_code == 0, done.output


def pictures(folder):
    from PIL import Image

    for split, count in (("train", 6), ("validation", 4)):
        for label in ("negative", "positive"):
            place = folder / split / label
            place.mkdir(parents=True)
            for index in range(count):
                noise = np.random.default_rng(index + 10 * len(label)).integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(noise).save(place / f"{split}-{index}.png")
    return folder


def test_image_students_have_no_tokenizer_to_compare(make_model, tmp_path):
    teacher, data = make_model("vit"), pictures(tmp_path / "pictures")
    shutil.copytree(teacher, tmp_path / "student")
    file = tmp_path / "student" / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "ignored": 1}))
    setup = prepare(teacher, DataSpec(path=str(data)), progress=Silent())
    student = load_student(tmp_path / "student", auto_class=setup.task.auto_class)
    assert setup.for_student(student) is setup
    common = ["--data", str(data), "--teacher", str(teacher), "--out", str(tmp_path / "d"), *DISTILL]
    done = CliRunner().invoke(main, ["distill", str(tmp_path / "student"), *common])
    assert done.exit_code == 0, done.output
