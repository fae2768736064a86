"""Training under fake quantization: it learns, it remembers what it learned under, and it survives a kill."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from onnx import numpy_helper

from edgekd.context import Budget, Context, Silent
from edgekd.distill import Distill
from edgekd.distill.recover import evaluator
from edgekd.distill.teachers import fingerprint, predict
from edgekd.errors import DataError, ModelError, RecipeError
from edgekd.export.matmul_nbits import dequantized
from edgekd.export.names import operand_ranges, trained_ranges
from edgekd.export.onnx import export_float
from edgekd.export.parity import onnx_logits, torch_logits
from edgekd.families.compact import install as install_operators
from edgekd.quantize import Quantize
from edgekd.quantize.fake.grid import weight_integers
from edgekd.quantize.fake.installed import FakeQuantized
from edgekd.quantize.forms import find_ranges, write_form
from edgekd.quantize.qat import put_on, scheme_of, train_quantized
from edgekd.student import Student, load_student
from edgekd.target import Target
from edgekd.tasks import TASKS
from edgekd.tasks.text_classification import EncodedText

QUICK: dict[str, Any] = {"batch_size": 16, "precision": "fp32", "learning_rate": 1e-3, "calibration": 24}


def texts(samples: int, seed: int) -> EncodedText:
    """The class is told by whether a word of the first half comes before the one of the second half."""
    generator = np.random.default_rng(seed)
    lengths, labels = generator.integers(4, 13, samples), generator.integers(0, 2, samples)
    ids = generator.integers(10, 46, int(lengths.sum())).astype(np.int32)
    starts = np.cumsum(lengths) - lengths
    ids[starts], ids[starts + 1], ids[starts + 2] = 2, np.where(labels, 7, 8), np.where(labels, 8, 7)
    return EncodedText(
        ids=ids,
        types=np.zeros_like(ids),
        starts=starts,
        lengths=lengths,
        labels=labels,
        padding=(0, 0),
        left=False,
        longest=24,
    )


CPU = Target(
    name="here", title="here", runtime="onnxruntime", device="cpu", precisions=("fp32", "int8"),
    fast_precisions=("fp32", "int8"), lowerings=("int8_dynamic", "int8_static", "fp32"),
)  # fmt: skip


@pytest.fixture
def context(make_model: Any, tmp_path: Path, one_thread: Any) -> Context:
    return _context(load_student(make_model("bert"), auto_class="AutoModelForSequenceClassification"), tmp_path)


def _context(teacher: Student, folder: Path, task: str = "text-classification", **data: Any) -> Context:
    return Context(
        teacher=teacher,
        task=TASKS[task],
        processor=SimpleNamespace(hf=None),
        train=data.get("train", texts(96, 1)),
        validation=data.get("validation", texts(48, 2)),
        test=None,
        target=CPU,
        budget=Budget(),
        work=folder / "work",
        cache=folder / "cache",
        progress=Silent(),
        seed=3,
    )


@pytest.fixture(scope="module")
def taught_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("taught")


@pytest.fixture
def taught(context: Context, taught_folder: Path) -> Context:
    """A teacher that knows its task."""
    if not (taught_folder / "config.json").is_file():
        stage = Distill(
            epochs=25, batch_size=16, learning_rate=2e-3, precision="fp32", losses={"cross_entropy": 1}, patience=3
        )
        stage.run(context.teacher, replace(context, train=texts(256, 5))).save(taught_folder)
    teacher = load_student(taught_folder, auto_class="AutoModelForSequenceClassification")
    return replace(context, teacher=teacher, train=texts(256, 5), work=context.work / "later", notes={})


def metric(student: Student, ctx: Context) -> float:
    return evaluator(student.model, ctx, "fp32")()


def distance(student: Student, ctx: Context) -> float:
    """Mean squared difference of logits from the teacher's, over validation."""
    ours, theirs = (predict(each.model, ctx.validation) for each in (student, ctx.teacher))
    return float(np.square(ours - theirs).mean())


def test_training_wins_back_what_three_values_lose(taught: Context) -> None:
    settings = Quantize(weight_bits=2, epochs=4, losses={"mse": 1, "hidden_mse": 1}, **QUICK)
    scheme = scheme_of(settings, CPU)
    rounded, quantized = put_on(settings, taught.teacher, scheme, taught)
    quantized.strip()
    # From where the last epoch ends: of equal scores the loop keeps the first.
    trained = train_quantized(settings, taught.teacher, replace(taught, task=_by_distance(taught)))
    assert distance(trained, taught) < 0.3 * distance(rounded, taught)
    dense = trained.model.bert.encoder.layer[0].intermediate.dense
    assert len(dense.weight.unique()) == 3
    assert trained.quantization == {"scheme": scheme.to_dict(), "observer": "minmax", "learned": False}


def _by_distance(ctx: Context) -> Any:
    theirs = predict(ctx.teacher.model, ctx.validation)
    return replace(ctx.task, score=lambda logits, labels: -float(np.square(logits - theirs).mean()))


def test_what_is_recorded_fits_the_graph_and_comes_back_from_a_folder(taught: Context, tmp_path: Path) -> None:
    settings = Quantize(activations="static", epochs=1, attention=True, **QUICK)
    before = fingerprint(taught.teacher.model)
    trained = train_quantized(settings, taught.teacher, taught)
    assert fingerprint(taught.teacher.model) == before
    graph = export_float(trained, "text-classification", tmp_path / "float.onnx")
    assert np.abs(onnx_logits(graph, taught.validation) - torch_logits(trained.model, taught.validation)).max() < 1e-4
    import onnx

    ranges = trained_ranges(onnx.load(graph), {k: (v[0], v[1]) for k, v in trained.quantization["activations"].items()})
    assert len(ranges) == 14
    assert all(low <= 0 <= high and low < high for low, high in ranges.values())
    assert len(trained.quantization["attention"]) == 12
    trained.save(tmp_path / "saved")
    again = load_student(tmp_path / "saved", auto_class="AutoModelForSequenceClassification")
    assert again.quantization == trained.quantization
    assert fingerprint(again.model) == fingerprint(trained.model)
    name = "bert.encoder.layer.1.output.dense"
    low, high = again.quantization["activations"][name]
    assert np.float32(low) == low
    assert np.float32(high) == high


def test_trained_ranges_of_attention_are_those_of_the_graph(taught: Context, tmp_path: Path) -> None:
    import onnx

    settings = Quantize(activations="static", epochs=1, attention=True, **QUICK)
    trained = train_quantized(settings, taught.teacher, taught)
    graph = export_float(trained, "text-classification", tmp_path / "float.onnx")
    seen = find_ranges(graph, "int8_qdq", taught.train.take(np.arange(6)))
    attention = {name: (low, high) for name, (low, high) in trained.quantization["attention"].items()}
    found = operand_ranges(onnx.load(graph), attention, seen)
    assert len(found) == 3 * (2 + 2 + 1 + 1)  # query and key are ranged before and after their factor
    for name, (low, high) in found.items():
        # What was trained on batches lies near what a few of the same examples reach.
        assert max(-low, high) == pytest.approx(max(-min(seen[name][0], 0), seen[name][1]), rel=0.5), name
    file = write_form(trained, graph, "int8_qdq", tmp_path / "q.onnx", ranges=seen)
    tensors = {each.name: numpy_helper.to_array(each) for each in onnx.load(file).graph.initializer}
    scales = {value.item() for name, value in tensors.items() if name.endswith("_scale") and value.size == 1}
    name = next(name for name in attention if name.endswith(":value"))
    low, high = attention[name]
    assert any(scale == pytest.approx((high - low) / 255, rel=1e-5) for scale in scales)


def test_ternary_weights_are_packed_as_they_are(taught: Context, tmp_path: Path) -> None:
    import onnx

    target = replace(CPU, lowerings=("int4_weights", "fp32"))
    settings = Quantize(weight_bits=2, epochs=1, lowering="int4_weights", **QUICK)
    trained = train_quantized(settings, taught.teacher, replace(taught, target=target))
    graph = export_float(trained, "text-classification", tmp_path / "float.onnx")
    file = write_form(trained, graph, "int4_weights", tmp_path / "q.onnx")
    found = dequantized(onnx.load(file))
    inner = [name for name in found if "layer" in name]
    assert len(inner) == 18
    for name in inner:
        weight = trained.model.get_submodule(name).weight.detach().numpy()
        np.testing.assert_allclose(found[name], weight, rtol=2**-15, atol=0)


class Kill(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize(
    "settings", [{"activations": "static"}, {"weight_bits": 4, "activations": "static", "learned": True}]
)
def test_a_killed_training_goes_on_to_the_same_bits(
    context: Context, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Quantize(epochs=2, checkpoint_steps=2, freeze_ranges=0.4, **settings, **QUICK)
    whole = train_quantized(stage, context.teacher, replace(context, work=context.work / "whole", notes={}))
    left, step = [7], FakeQuantized.step

    def killing(self: FakeQuantized) -> None:
        step(self)
        left[0] -= 1
        if not left[0]:
            raise Kill

    monkeypatch.setattr(FakeQuantized, "step", killing)
    killed = replace(context, work=context.work / "killed", notes={})
    with pytest.raises(Kill):
        train_quantized(stage, context.teacher, killed)
    resumed = train_quantized(stage, context.teacher, killed)
    assert left[0] > -12  # it did not begin anew
    assert fingerprint(resumed.model) == fingerprint(whole.model)
    assert resumed.quantization == whole.quantization


@pytest.mark.parametrize("accumulation", [1, 4])
def test_ranges_stand_after_their_share_of_the_steps(
    context: Context, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, step = [], FakeQuantized.step

    def watching(self: FakeQuantized) -> None:
        step(self)
        frozen.append(self.frozen)

    monkeypatch.setattr(FakeQuantized, "step", watching)
    settings = Quantize(epochs=4, activations="static", gradient_accumulation=accumulation, **QUICK)
    train_quantized(settings, context.teacher, context)
    count = 4 * -(-6 // accumulation)
    assert frozen == [i >= count // 2 for i in range(1, count + 1)]


def test_weights_that_were_better_before_training_stay(taught: Context) -> None:
    settings = Quantize(epochs=1, **{**QUICK, "learning_rate": 0.5})
    trained = train_quantized(settings, taught.teacher, taught)
    assert taught.notes["training"]["metric"] < taught.notes["untrained_metric"]
    assert metric(trained, taught) == pytest.approx(taught.notes["untrained_metric"], abs=0.03)
    snapped, quantized = put_on(settings, taught.teacher, scheme_of(settings, CPU), taught)
    quantized.strip()
    assert fingerprint(snapped.model) == fingerprint(trained.model)


def test_the_float_student_can_teach_and_labels_stay_unseen(taught: Context) -> None:
    """A teacher of another kind would give other logits; the student's own are its best."""
    stranger = replace(taught, teacher=replace(taught.teacher, model=_shuffled(taught.teacher.model)))
    unlabelled = replace(taught.train, labels=None)
    settings = Quantize(epochs=1, teacher="student", losses={"soft_cross_entropy": 1.0}, **QUICK)
    trained = train_quantized(settings, taught.teacher, replace(stranger, train=unlabelled))
    assert metric(trained, taught) > 0.9


def _shuffled(model: Any) -> Any:
    copied = copy.deepcopy(model)
    copied.classifier.weight.data.neg_()
    return copied


LOSSES = {"soft_cross_entropy": 1, "raw_hidden_mse": 1, "attention_kl": 1, "attention_output_mse": 1}


def test_all_losses_of_the_paper_work_under_the_rounding_of_attention(context: Context) -> None:
    settings = Quantize(epochs=1, attention=True, embeddings=True, losses=LOSSES, **QUICK)
    trained = train_quantized(settings, context.teacher, context)
    assert np.isfinite(context.notes["training"]["history"][0]["loss"])
    integers, _ = weight_integers(trained.model.bert.embeddings.word_embeddings.weight)
    assert integers.abs().amax(1)[1:].min() == 127


def test_compact_students_are_trained_or_told_what_to_use(context: Context) -> None:
    model = copy.deepcopy(context.teacher.model)
    changes: list[dict[str, Any]] = [{"rank": 4}, {"shares": True}, {"tokens": 1}]
    layers = [replace(layer, **new) for layer, new in zip(context.teacher.arch.layers, changes, strict=True)]
    install_operators(model, context.teacher.family, layers)
    student = context.teacher.with_model(model)
    with pytest.raises(RecipeError, match="use attention_output_mse"):
        train_quantized(Quantize(epochs=1, losses=LOSSES, **QUICK), student, context)
    settings = Quantize(epochs=1, activations="static", losses={"forward_kl": 1, "attention_output_mse": 1}, **QUICK)
    trained = train_quantized(settings, student, context)
    assert trained.arch == student.arch
    assert "bert.encoder.layer.0.attention.self.query.first" in trained.quantization["activations"]
    assert "bert.encoder.layer.1.attention.self.query" not in trained.quantization["activations"]


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_images_are_trained_without_labels_by_affinity(
    make_model: Callable[..., Path], tmp_path: Path, kind: str, one_thread: Any
) -> None:
    teacher = load_student(make_model(kind), auto_class="AutoModelForImageClassification")
    generator = np.random.default_rng(0)
    images = [_Images(generator.normal(size=(n, 1, 8, 8)).astype(np.float32)) for n in (40, 16)]
    ctx = _context(teacher, tmp_path, "image-classification", train=images[0], validation=images[1])
    settings = Quantize(
        epochs=1, weight_bits=4, activations="static", losses={"mse": 1.0, "feature_affinity_fast": 0.1}, **QUICK
    )
    trained = train_quantized(settings, teacher, ctx)
    assert len(ctx.notes["training"]["history"]) == 1
    trained.save(tmp_path / "saved")
    again = load_student(tmp_path / "saved", auto_class="AutoModelForImageClassification")
    assert metric(again, ctx) == pytest.approx(metric(trained, ctx))
    with pytest.raises(DataError, match="none"):
        train_quantized(settings, teacher, replace(ctx, train=ctx.train.take(np.arange(0))))


class _Images:
    """Images without labels."""

    labels, fingerprint = None, "images"

    def __init__(self, images: np.ndarray) -> None:
        self.images, self.lengths = images, np.ones(len(images), np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def collate(self, indices: np.ndarray, length: int | None = None) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.from_numpy(self.images[indices])}

    def take(self, indices: np.ndarray) -> _Images:
        return _Images(self.images[indices])


def test_schemes_follow_settings_and_target(context: Context) -> None:
    def scheme(target: Target = CPU, **settings: Any) -> Any:
        return scheme_of(Quantize(**settings), target)

    npu = replace(CPU, runtime="qualcomm", lowerings=("int16_qdq",))
    gpu = replace(CPU, lowerings=("int8_qdq", "fp32"), symmetric=True)
    assert scheme().activations == "dynamic"
    assert scheme(lowering="int8_static").activations == "static"
    assert scheme(activations="static").symmetric is False
    assert (scheme(npu).activations, scheme(npu).activation_bits) == ("static", 16)
    assert (scheme(gpu).activations, scheme(gpu).symmetric) == ("static", True)
    assert scheme().embeddings
    assert not scheme(npu).embeddings
    assert scheme(weight_bits=4, epochs=1).group == 0
    packed = scheme(replace(CPU, lowerings=("int4_weights", "fp32")), weight_bits=4, epochs=1, lowering="int4_weights")
    assert (packed.group, packed.activations) == (32, "none")
    assert scheme(weight_bits=4, group=64, epochs=1).group == 64
    assert scheme(learned=True, epochs=1).activations == "static"
    with pytest.raises(RecipeError, match=r"nothing to learn on .* its ranges of activations are dynamic"):
        scheme(learned=True, epochs=1, activations="dynamic")
    assert scheme(learned=True, epochs=1, activations="dynamic", weight_bits=4).activations == "dynamic"


def test_a_teacher_with_other_words_is_refused(bert, make_context) -> None:
    student = replace(bert, arch=replace(bert.arch, vocabulary=99))
    with pytest.raises(ModelError, match="the student knows 99 words .* set `teacher: student`"):
        Quantize(epochs=1, losses=LOSSES, **QUICK).run(student, make_context())
