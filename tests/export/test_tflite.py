"""int8 TFLite from torch: what is asked of the converter's process, what is refused, and what the files say."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.errors import ModelError, RecipeError, StageError, TargetError
from edgekd.export import tflite, tflite_worker
from edgekd.export.tflite import Converter, calibration, export_tflite, tflite_logits, tflite_parity
from edgekd.families import arch_of
from edgekd.student import Student, load_student

TEXT = ("bert", "roberta", "electra", "distilbert")
KINDS = (*TEXT, "vit", "deit", "resnet", "resnet-bottleneck")
SEQUENCE = 16


def student_of(make_model: Any, kind: str) -> tuple[Student, str]:
    family, task = ("Sequence", "text") if kind in TEXT else ("Image", "image")
    return load_student(make_model(kind), auto_class=f"AutoModelFor{family}Classification"), f"{task}-classification"


def feeds_of(kind: str, count: int = 24, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Unpadded inputs, one example each."""
    generator = np.random.default_rng(seed)
    if kind not in TEXT:
        return [{"pixel_values": generator.normal(size=(1, 1, 8, 8)).astype(np.float32)} for _ in range(count)]
    feeds = []
    for length in generator.integers(4, SEQUENCE + 1, count):
        ids = generator.integers(5, 40, (1, length))
        feeds.append({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    return feeds


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let a few lines of Python answer in the place of the converter."""

    def replace(code: str) -> None:
        monkeypatch.setattr(tflite, "require_packages", lambda: None)
        monkeypatch.setattr(tflite, "WORKER", ("-c", code))

    return replace


ANSWER = """
import json, pathlib, sys
for line in sys.stdin:
    asked = json.loads(line)
    print({answer}, flush=True)
"""


def test_feeds_are_padded_cut_and_joined() -> None:
    feeds = [
        {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), np.int64)},
        {"input_ids": np.array([[8, 9, 10, 11, 12]]), "attention_mask": np.ones((1, 5), np.int64)},
    ]
    arrays = calibration(feeds, batch=1, sequence=4)
    assert arrays["input_ids"].tolist() == [[5, 6, 7, 0], [8, 9, 10, 11]]
    assert arrays["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert {value.dtype for value in arrays.values()} == {np.dtype(np.int32)}


@pytest.mark.parametrize(("last", "names"), [(0, {"input_ids"}), (1, {"input_ids", "token_type_ids"})])
def test_token_types_are_an_input_only_where_they_differ(last: int, names: set[str]) -> None:
    feeds = [{"input_ids": np.array([[5, 6]]), "token_type_ids": np.array([[0, last]])}]
    assert set(calibration(feeds, batch=1, sequence=2)) == names


@pytest.mark.parametrize(
    ("feeds", "options", "message"),
    [
        ([], {"batch": 1, "sequence": 4}, "needs calibration data"),
        ([{"input_ids": np.ones((1, 3))}], {"batch": 1, "sequence": None}, "say how many tokens"),
        (
            [{"input_ids": np.ones((1, 3))}],
            {"batch": 2, "sequence": 4},
            "batch 2 needs at least as many examples, got 1",
        ),
        ([{"audio": np.ones((1, 3))}], {"batch": 1, "sequence": 4}, r"pixel_values, got \['audio'\]"),
    ],
)
def test_feeds_that_do_not_do_are_refused(feeds: Any, options: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        calibration(feeds, **options)


def test_a_missing_converter_is_named_with_the_way_to_it(make_model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tflite, "PACKAGES", ("litert_torch_that_is_not_there",))
    student, task = student_of(make_model, "bert")
    with pytest.raises(RecipeError, match=r"litert_torch_that_is_not_there.*pip install 'edgekd\[ethos-u\]'"):
        export_tflite(student, task, feeds_of("bert"), tmp_path / "m.tflite", sequence=SEQUENCE)
    with pytest.raises(RecipeError, match=r"pip install 'edgekd\[ethos-u\]'"):
        tflite_logits(tmp_path / "m.tflite", feeds_of("bert"))


def test_the_worker_gets_the_model_and_its_file_is_moved_in_place(make_model: Any, tmp_path: Path, worker: Any) -> None:
    worker(
        ANSWER.format(
            answer="(pathlib.Path(asked['output']).write_text(json.dumps(sorted(p.name for p in "
            "pathlib.Path(asked['model']).iterdir()) + [asked['auto_class'], asked['batch']])), "
            "json.dumps({'seconds': {'convert': 1.5}}))[1]"
        )
    )
    student, task = student_of(make_model, "bert")
    student.model.config.edgekd = {"kept": True}
    seconds: dict[str, float] = {}
    out = export_tflite(student, task, feeds_of("bert"), tmp_path / "m.tflite", sequence=SEQUENCE, seconds=seconds)
    assert json.loads(out.read_text()) == ["config.json", "model.safetensors", "AutoModelForSequenceClassification", 1]
    assert seconds == {"convert": 1.5}
    assert student.model.config.edgekd == {"kept": True}
    assert [path.name for path in tmp_path.iterdir()] == ["m.tflite"]


def test_one_process_serves_many_requests(worker: Any) -> None:
    worker("import os\n" + ANSWER.format(answer="json.dumps({'process': os.getpid(), 'asked': asked})"))
    with Converter() as converter:
        first, second = converter.ask({"n": 1}), converter.ask({"n": 2})
    assert first["process"] == second["process"]
    assert (first["asked"], second["asked"]) == ({"n": 1}, {"n": 2})


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("raise RuntimeError('no such wheel')", StageError, "ended without an answer\n(?s:.*)no such wheel"),
        ("import os; os.abort()", StageError, "ended without an answer and said nothing"),
        ("import time; time.sleep(60)", TargetError, "longer than 1 s and was stopped"),
    ],
)
def test_a_failing_worker_is_explained(worker: Any, code: str, error: type[Exception], message: str) -> None:
    worker(code)
    with Converter(timeout=1 if "sleep" in code else 60) as converter, pytest.raises(error, match=message):
        converter.ask({})


def test_an_operator_that_cannot_be_converted_is_named(make_model: Any, tmp_path: Path, worker: Any) -> None:
    worker(ANSWER.format(answer="""json.dumps({'error': 'not lowered', 'operator': 'aten.fft'})"""))
    student, task = student_of(make_model, "vit")
    with pytest.raises(StageError, match=r"to TFLite failed at aten\.fft: not lowered"):
        export_tflite(student, task, feeds_of("vit"), tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


def test_the_worker_goes_on_after_a_bad_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(request: Any) -> Any:
        if request["n"] == 1:
            raise NotImplementedError("Lowering not found: aten.fft_fft.default")
        return {"done": request["n"]}

    monkeypatch.setattr(tflite_worker, "convert", convert)
    said: list[str] = []
    tflite_worker.serve(iter(['{"n": 1}', '{"n": 2}']), said.append)
    assert [json.loads(text) for text in said] == [
        {"error": "NotImplementedError: Lowering not found: aten.fft_fft.default", "operator": "aten.fft_fft"},
        {"done": 2},
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_converted_computes_what_the_model_does(make_model: Any, kind: str) -> None:
    """The rewritten attention, mask, positions and norms, in float and on padded text."""
    import torch

    student, _ = student_of(make_model, kind)
    feeds = feeds_of(kind, 6)
    arrays = calibration(feeds, batch=1, sequence=SEQUENCE)
    module = tflite_worker.traceable(student.model)
    with torch.no_grad():
        got = torch.cat(
            [module(**{name: torch.from_numpy(value[i : i + 1]) for name, value in arrays.items()}) for i in range(6)]
        )
        want = torch.cat([student.model(**{k: torch.from_numpy(v) for k, v in feed.items()}).logits for feed in feeds])
    # A barred key keeps e^-10 of its weight; without a mask the results are the same but for rounding.
    assert (got - want).abs().max() < (2e-3 if kind in TEXT else 1e-5) * max(1.0, float(want.abs().max()))


def test_the_rewriting_leaves_torch_as_it_was(make_model: Any) -> None:
    from torch.nn import functional

    student, _ = student_of(make_model, "electra")
    before = (
        functional.scaled_dot_product_attention,
        functional.layer_norm,
        functional.conv2d,
        set(vars(student.model.base_model)),
    )
    arrays = calibration(feeds_of("electra", 1), batch=1, sequence=SEQUENCE)
    import torch

    tflite_worker.traceable(student.model)(**{name: torch.from_numpy(value) for name, value in arrays.items()})
    after = (
        functional.scaled_dot_product_attention,
        functional.layer_norm,
        functional.conv2d,
        set(vars(student.model.base_model)),
    )
    assert before == after


@pytest.fixture(scope="module")
def converter() -> Iterator[Converter]:
    with Converter() as process:
        yield process


@pytest.mark.device
@pytest.mark.parametrize("kind", KINDS)
def test_int8_files_agree_with_torch(make_model: Any, tmp_path: Path, converter: Converter, kind: str) -> None:
    pytest.importorskip("litert_torch")
    student, task = student_of(make_model, kind)
    feeds = feeds_of(kind)
    file = export_tflite(student, task, feeds, tmp_path / "m.tflite", sequence=SEQUENCE, converter=converter)
    with pytest.raises(AssertionError):  # the check can fail: other weights say something else
        assert_alike(shuffled(student), file, feeds)
    assert_alike(student, file, feeds)
    assert [path.name for path in tmp_path.iterdir()] == ["m.tflite"]


@pytest.mark.device
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_trained_weights_keep_their_integers_and_zeros(
    snapped: Any, tmp_path: Path, converter: Converter, kind: str
) -> None:
    pytest.importorskip("litert_torch")
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    made = snapped(kind)
    task = "text-classification" if kind in TEXT else "image-classification"
    file = export_tflite(
        made.student, task, feeds_of(kind), tmp_path / "m.tflite", sequence=SEQUENCE, converter=converter
    )
    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(str(file), experimental_op_resolver_type=plain, experimental_preserve_all_tensors=True)
    interpreter.allocate_tensors()
    held = [
        interpreter.get_tensor(item["index"])
        for item in interpreter.get_tensor_details()
        if item["dtype"] == np.int8 and len(item["shape"]) in (2, 4)
    ]
    for module, weight in made.weights.items():
        rows = weight.reshape(len(weight), -1)
        scale = np.abs(rows).max(axis=1, keepdims=True) / 127
        integers = np.round(rows / np.where(scale > 0, scale, 1))
        assert (integers == 0).mean() > 0.1
        found = [
            value for value in held
            if value.size >= integers.size and value.shape[0] == len(integers) and holds(value, integers, weight.ndim)
        ]  # fmt: skip
        assert found, module


def holds(value: np.ndarray, integers: np.ndarray, axes: int) -> bool:
    """Whether a tensor of the file is a weight; convolutions have their channels last, and perhaps one more."""
    if axes == 2:
        return bool(np.array_equal(value.reshape(len(value), -1), integers))
    return bool(np.array_equal(value[..., :1].reshape(len(value), -1), integers))


def assert_alike(student: Student, file: Path, feeds: list[dict[str, np.ndarray]]) -> None:
    import torch

    with torch.no_grad():
        want = np.concatenate(
            [student.model(**{k: torch.from_numpy(v) for k, v in feed.items()}).logits.numpy() for feed in feeds]
        )
    got = tflite_logits(file, feeds)
    assert got.shape == want.shape
    assert got.dtype == np.float32
    margin, other = want[:, 1] - want[:, 0], got[:, 1] - got[:, 0]
    assert np.corrcoef(margin, other)[0, 1] > 0.95


def shuffled(student: Student) -> Student:
    import torch

    model = copy.deepcopy(student.model)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * parameter.std(correction=0)
    return student.with_model(model)


@pytest.mark.device
@pytest.mark.parametrize("kind", ["bert", "distilbert", "vit"])
def test_wider_activations_are_nearer_to_float(
    make_model: Any, tmp_path: Path, converter: Converter, kind: str
) -> None:
    pytest.importorskip("litert_torch")
    student, task = student_of(make_model, kind)
    feeds, noise = feeds_of(kind), []
    for wide in (False, True):
        file = tmp_path / f"{wide}.tflite"
        export_tflite(student, task, feeds, file, sequence=SEQUENCE, converter=converter, wide=wide)
        noise.append(tflite_parity(student, file, feeds).max_abs)
    assert noise[1] < noise[0]


def test_the_wider_file_is_kept_only_where_it_is_needed_and_better(tmp_path: Path, monkeypatch: Any) -> None:
    made: list[bool] = []

    def quantize(floats: Path, feeds: Any, output: str, *, wide: bool) -> None:
        made.append(wide)
        Path(output).write_text("wide" if wide else "narrow")

    noise = {"narrow": 20.0, "wide": 30.0}
    monkeypatch.setattr(tflite_worker, "_quantize", quantize)
    monkeypatch.setattr(tflite_worker, "_noise", lambda floats, file, feeds: noise[file.read_text()])
    for narrow, wide, expected in ((20.0, 30.0, False), (9.0, 30.0, True), (9.0, 8.0, False)):
        noise.update(narrow=narrow, wide=wide)
        output = tmp_path / "m.tflite"
        output.write_text("narrow")
        assert tflite_worker._widened(tmp_path / "m.float", [], output) is expected
        assert output.read_text() == ("wide" if expected else "narrow")
        assert [path.name for path in tmp_path.iterdir()] == ["m.tflite"]
    assert made == [True, True]


@pytest.mark.device
def test_a_cut_of_uneven_heads_and_neurons_converts(make_model: Any, tmp_path: Path, converter: Converter) -> None:
    pytest.importorskip("litert_torch")
    import torch

    student, task = student_of(make_model, "bert")
    model = copy.deepcopy(student.model)
    family = student.family
    layers = family.layers(model)
    family.slice_heads(layers[1], torch.tensor([0, 2, 3]), student.arch.head_dim)
    family.slice_neurons(layers[2], torch.arange(40))
    uneven = Student(model=model, arch=arch_of(model))
    feeds = feeds_of("bert")
    file = export_tflite(uneven, task, feeds, tmp_path / "m.tflite", batch=2, sequence=SEQUENCE, converter=converter)
    parity = tflite_parity(uneven, file, feeds[:5])
    assert parity.n == 5
    assert parity.agreement >= 0.8


@pytest.mark.device
def test_what_is_not_tflite_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    (tmp_path / "m.tflite").write_bytes(b"not a model at all")
    with pytest.raises(ModelError, match="cannot be read as TFLite"):
        tflite_logits(tmp_path / "m.tflite", feeds_of("bert"))
