"""Weights alone in 4 or 8 bits: what is packed is what the quantizer chose, integer by integer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper

from edgekd.errors import ModelError, RecipeError
from edgekd.export.lower import lower
from edgekd.export.matmul_nbits import block_size, dequantized, pack, stored, unpack
from edgekd.export.nbits import Blocks, Grid, grid_of_form, grid_of_module, limits, nearest, read, short
from edgekd.export.onnx import export_float
from edgekd.export.parity import onnx_logits
from edgekd.quantize import Quantize
from edgekd.quantize.linear import linear_layers, observe_inputs
from edgekd.quantize.rounding import output_error
from edgekd.quantize.tuning import TUNED
from edgekd.quantize.weight_only import gptq, quantize_weights
from edgekd.surgery.sample import sample_batches

pytestmark = pytest.mark.usefixtures("one_thread")
GRIDS = [Grid(bits=b, group=g, symmetric=s) for b in (4, 8) for g in (0, 32, 64, 128) for s in (True, False)]


def matrix(rows: int, inputs: int, *, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, inputs)) * scale).astype(np.float32)


def steps_of(values: np.ndarray, zeros: np.ndarray | None, grid: Grid, inputs: int) -> np.ndarray:
    numbers, points = unpack(values, zeros, grid.bits, inputs)
    owner = np.arange(inputs) // block_size(grid, inputs)
    return numbers.astype(np.int32) - points.astype(np.int32)[:, owner]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 40), (7, 50), (16, 256)], ids=str)
def test_weights_tell_their_own_grid_and_unpack_to_the_same_integers(grid: Grid, shape: tuple[int, int]) -> None:
    for scale in (1e-4, 1.0, 300.0):
        weight = matrix(*shape, scale=scale)
        weight[0, :20] = 0
        blocks = nearest(weight, grid)
        again = read(blocks.values(), grid)
        for name in ("steps", "scales", "zeros"):
            np.testing.assert_array_equal(getattr(again, name), getattr(blocks, name))
        values, scales, zeros = pack(blocks, grid)
        assert values.dtype == np.uint8
        assert (zeros is None) == grid.symmetric
        np.testing.assert_array_equal(steps_of(values, zeros, grid, shape[1]), blocks.steps)
        assert scales.shape == values.shape[:2]
        most = np.abs(weight).max() / (2 ** (grid.bits - 1) - 1)
        assert np.abs(blocks.values() - weight).max() <= (0.51 if grid.symmetric else 1.1) * most


def test_any_choice_of_a_quantizer_is_found_again() -> None:
    rng = np.random.default_rng(3)
    for grid in (Grid(bits=4, group=32, symmetric=False), Grid(bits=4, group=32), Grid(bits=8, group=0)):
        scales = short(rng.uniform(0.01, 2, (20, 1 if grid.group == 0 else 3)))
        zeros = rng.integers(0, 2**grid.bits, scales.shape)
        low, high = limits(zeros, grid)
        width = 96 // scales.shape[1]
        steps = rng.integers(np.repeat(low, width, 1), np.repeat(high, width, 1) + 1)
        chosen = (steps * np.repeat(scales, width, 1)).astype(np.float32)
        found = read(chosen, grid)
        np.testing.assert_array_equal(found.values(), chosen)
        assert (found.steps * found.scales.repeat(width, 1) == steps * scales.repeat(width, 1)).all()


def test_weights_off_the_grid_are_refused() -> None:
    grid = Grid(bits=4, group=32)
    with pytest.raises(ModelError, match="layer.1 has weights that are not on the 4-bit grid"):
        read(matrix(4, 64), grid, "layer.1")
    weight = matrix(4, 64)
    weight[1, 2] = np.nan
    with pytest.raises(ModelError, match="not finite"):
        nearest(weight, grid)


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.group in (0, 32)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_operator_computes_with_the_integers(grid: Grid, transposed: bool, tmp_path) -> None:
    weight, bias = matrix(24, 96), np.arange(24, dtype=np.float32)
    stored_weight = weight if transposed else weight.T
    name = "/bert/encoder/layer.0/output/dense/MatMul"
    node = (
        helper.make_node("Gemm", ["x", "w", "b"], ["y"], name=name, transB=1)
        if transposed
        else helper.make_node("MatMul", ["x", "w"], ["y"], name=name)
    )
    tensors = [numpy_helper.from_array(np.ascontiguousarray(stored_weight), "w"), numpy_helper.from_array(bias, "b")]
    info = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [None, s]) for n, s in (("x", 96), ("y", 24))]
    graph = helper.make_graph([node], "g", info[:1], info[1:], tensors)
    file = tmp_path / "float.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), file)
    form = f"int{grid.bits}_weights"
    exact = replace(grid, accuracy_level=1)
    made = lower(file, tmp_path / "q.onnx", form, weights=exact.to_dict())
    blocks = nearest(weight, grid)
    model = onnx.load(made)
    [node] = model.graph.node
    assert (node.op_type, node.domain) == ("MatMulNBits", "com.microsoft")
    assert {a.name: a.i for a in node.attribute}["accuracy_level"] == 1
    np.testing.assert_array_equal(dequantized(model)["bert.encoder.layer.0.output.dense"], blocks.values())
    x = matrix(5, 96, seed=1)
    got = ort.InferenceSession(str(made), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    np.testing.assert_allclose(got, x @ blocks.values().T + (bias if transposed else 0), rtol=1e-4, atol=1e-3)


def test_a_form_without_settings_has_the_usual_grid() -> None:
    assert grid_of_form("int8_weights") == (Grid(bits=8, group=0, symmetric=True), False)
    assert grid_of_form("int4_weights") == (Grid(bits=4, group=32, symmetric=False), False)
    told = Grid(bits=4, group=64).to_dict() | {"method": "gptq"}
    assert grid_of_form("int4_weights", told) == (Grid(bits=4, group=64), True)
    assert grid_of_module(Grid(bits=4, group=64), "bert.encoder.layer.0.output.dense").bits == 4
    assert grid_of_module(Grid(bits=4, group=64), "classifier") == Grid(bits=8, group=0)


def correlated(rows: int, inputs: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    return (rng.normal(size=(rows, 6)) @ rng.normal(size=(6, inputs)) + 0.1 * rng.normal(size=(rows, inputs))).astype(
        np.float32
    )


@pytest.mark.parametrize("grid", [Grid(bits=4, group=32), Grid(bits=4, group=0, symmetric=False)], ids=str)
def test_gptq_keeps_the_output_better_than_nearest(grid: Grid) -> None:
    weight, x = matrix(16, 80), correlated(400, 80)
    second = x.T @ x / len(x)

    def error(blocks: Blocks) -> float:
        return output_error(torch.from_numpy(blocks.values() - weight), torch.from_numpy(second))

    chosen = gptq(weight, second, grid)
    assert error(chosen) < 0.6 * error(nearest(weight, grid))
    np.testing.assert_array_equal(read(chosen.values(), grid).steps, chosen.steps)


def test_gptq_takes_inputs_that_are_never_there() -> None:
    for second in (np.zeros((40, 40), np.float32), np.diag(np.r_[np.zeros(20), np.ones(20)]).astype(np.float32)):
        chosen = gptq(matrix(1, 40), second, Grid(bits=4, group=32))
        assert np.isfinite(chosen.values()).all()
        assert np.abs(chosen.values() - matrix(1, 40)).max() < 0.6
    with pytest.raises(ModelError, match="dense has weights that are not finite"):
        gptq(np.full((2, 4), np.inf, np.float32), np.eye(4, dtype=np.float32), Grid(bits=4, group=0), "dense")


def test_what_gptq_chose_is_in_the_file(bert, make_context, tmp_path) -> None:
    context = make_context()
    inputs = observe_inputs(bert.model, sample_batches(context.train, 64, seed=0))
    before = bert.model.bert.pooler.dense.weight.clone()
    changed, weights = quantize_weights(bert, Grid(bits=4, group=32, symmetric=False), inputs)
    assert torch.equal(bert.model.bert.pooler.dense.weight, before)
    graph = export_float(changed, "text-classification", tmp_path / "float.onnx")
    made = lower(graph, tmp_path / "q.onnx", "int4_weights", weights=weights)
    model = onnx.load(made)
    found, layers = dequantized(model), linear_layers(changed.model)
    assert len(found) == len(layers) == 20
    for name, layer in layers.items():
        np.testing.assert_array_equal(found[name], layer.weight.detach().numpy(), err_msg=name)
    integers = stored(model)["bert.encoder.layer.1.output.dense"][0]
    assert integers.max() <= 15
    kept = lower(graph, tmp_path / "k.onnx", "int4_weights", weights=weights, keep_float=["bert.pooler"])
    assert "bert.pooler.dense" not in dequantized(onnx.load(kept))


@pytest.mark.parametrize("rounding", ["nearest", "adaptive"])
def test_the_stage_makes_a_small_form_that_is_built_again_from_the_saved_student(
    rounding, bert, make_context, tmp_path
) -> None:
    from edgekd.pipeline.artifact import build
    from edgekd.student import load_student

    context = make_context()
    settings = Quantize(lowering="int4_weights", rounding=rounding, tolerance=0.2, group=64, bias_correction=True)
    result = settings.run(bert, context)
    told = result.quantization["weights"]
    assert (told["bits"], told["group"], told["accuracy_level"]) == (4, 64, 4)
    assert told["method"] == ("gptq" if rounding == "adaptive" else "nearest")
    result.save(tmp_path / "saved")
    again = load_student(tmp_path / "saved", auto_class="AutoModelForSequenceClassification")
    file = build(again, context.task, context.validation, tmp_path / "again", gate=False).file
    first, second = (stored(onnx.load(f)) for f in (tmp_path / "int4_weights.onnx", file))
    assert first.keys() == second.keys()
    for name in first:
        for a, b in zip(first[name], second[name], strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(
        onnx_logits(file, context.validation), onnx_logits(tmp_path / "int4_weights.onnx", context.validation),
        atol=1e-5,
    )  # fmt: skip
    if rounding == "adaptive":
        with pytest.raises(ModelError, match="already quantized to int4_weights"):
            Quantize().run(again, context)


def test_a_limit_of_size_brings_small_forms_in(bert, make_context, clock) -> None:
    from edgekd.context import Budget

    context = make_context()
    Quantize(tolerance=0.5, fallback=False).run(bert, context)
    assert not any("weights" in each["lowering"] for each in context.notes["candidates"])
    sizes = {each["lowering"]: each["size_bytes"] / 1e6 for each in context.notes["candidates"]}
    context = make_context(budget=Budget(sequence=16, size_mb=min(sizes.values()) * 0.999))
    clock.ms["int4_weights"] = 5.0
    result = Quantize(tolerance=0.5, fallback=False).run(bert, context)
    sizes = {each["lowering"]: each["size_bytes"] / 1e6 for each in context.notes["candidates"]}
    small = [name for name, size in sizes.items() if size <= context.budget.size_mb]
    assert {"int4_weights", "int8_weights"} <= sizes.keys()
    assert result.quantization["lowering"] in (small or sizes)


def test_neural_compressor_chooses_bits_and_its_integers_are_taken_over(bert, make_context, capfd, clock) -> None:
    context = make_context()
    settings = Quantize(tune=True, lowering="int4_weights", tolerance=0.9, fallback=False)
    result = settings.run(bert, context)
    weights = result.quantization["weights"]
    assert (weights["method"], weights["bits"], weights["group"]) == (TUNED, 4, 0)  # rows are shorter than a group
    found = dequantized(onnx.load(context.work / "int4_weights.onnx"))
    for name, layer in linear_layers(result.model).items():
        np.testing.assert_array_equal(found[name], layer.weight.detach().numpy(), err_msg=name)
    assert capfd.readouterr() == ("", "")
    strict = make_context(train=context.train, validation=context.validation)
    Quantize(tune=True, tolerance=0.0, fallback=False, lowering="auto").run(bert, strict)
    assert strict.notes["tuned"]["bits"] in (4, 8)
    with pytest.raises(RecipeError, match="both choose how weights are rounded"):
        Quantize(tune=True, rounding="adaptive").run(bert, context)
