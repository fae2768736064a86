"""A quantized graph has the integers and scales of training, and what was changed by hand is found and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgekd.errors import StageError
from edgekd.export.factors import factors_of
from edgekd.export.layers import quantized_layers
from edgekd.export.lower import lower
from edgekd.export.parity import onnx_logits, open_session, own_feeds, require_parity, torch_logits
from edgekd.export.scales import check_scales, expected_scale

LENGTH = 16
QUERY = "bert.encoder.layer.1.attention.self.query"
STATIC = ("int8_static", "int8_static_lean", "int8_qdq", "int16_qdq")
DYNAMIC = ("int8_dynamic", "int8_dynamic_lean")


def lowered(made: Any, form: str, folder: Path, **options: Any) -> onnx.ModelProto:
    ranges = made.ranges if form in STATIC else None
    activations = made.spans if form in STATIC else None
    if form.endswith("qdq"):
        options = {"batch": 1, "sequence": LENGTH, **options}
    return onnx.load(lower(made.graph, folder / "m.onnx", form, ranges=ranges, activations=activations, **options))


@pytest.mark.parametrize("form", [*STATIC, *DYNAMIC])
def test_a_lowered_graph_has_the_integers_and_scales_of_training(snapped: Any, form: str, tmp_path: Path) -> None:
    made = snapped("bert")
    check = check_scales(lowered(made, form, tmp_path), made.weights, made.spans)
    assert check.mismatches == ()
    assert set(check.weights) == set(made.weights)
    # The pooler reads the first token of a tensor, the classifier a Tanh, which QNN wants on a scale of 2^-15.
    given = {"int8_qdq": ("bert.pooler.dense",), "int16_qdq": ("bert.pooler.dense", "classifier")}
    assert check.given == given.get(form, ())
    assert set(check.activations) | set(check.given) == (set(made.weights) if form in STATIC else set())
    assert check.floating == check.absent == ()


def test_symmetric_scales_and_those_of_convolutions_are_compared(snapped: Any, tmp_path: Path) -> None:
    bert, resnet = snapped("bert"), snapped("resnet")
    check = check_scales(lowered(bert, "int8_qdq", tmp_path, symmetric=True), bert.weights, bert.spans)
    assert check.mismatches == ()
    assert len(check.weights) == len(check.activations) == len(bert.weights)
    # Batch norms are folded into the convolutions at export: the integers are others.
    check = check_scales(lowered(resnet, "int8_qdq", tmp_path), {"classifier.1": resnet.weights["classifier.1"]})
    assert check.weights == ("classifier.1",)
    assert check.mismatches == ()


def test_layers_that_stay_float_and_layers_that_are_not_there_are_told(snapped: Any, tmp_path: Path) -> None:
    made = snapped("bert")
    graph = lowered(made, "int8_static", tmp_path, keep_float=(QUERY,))
    check = check_scales(graph, {**made.weights, "bert.extra": made.weights[QUERY]}, made.spans)
    assert check.floating == (QUERY,)
    assert check.absent == ("bert.extra",)
    assert check.mismatches == ()
    assert "1 in float; not found in the graph: bert.extra" in check.describe()


@pytest.mark.parametrize("form", [*STATIC, *DYNAMIC])
def test_one_integer_changed_by_hand_is_found(snapped: Any, form: str, tmp_path: Path) -> None:
    made = snapped("bert")
    graph = lowered(made, form, tmp_path)
    changed = change(graph, weight_of(graph, made, QUERY), lambda value: value.__setitem__((3, 5), value[3, 5] ^ 1))
    check = check_scales(changed, made.weights, made.spans)
    assert [(each.module, each.what) for each in check.mismatches] == [(QUERY, "weight integers, 1 of 1024")]
    assert check.mismatches[0].expected.endswith("at [5, 3]")


@pytest.mark.parametrize("form", ["int8_static", "int8_qdq", "int8_dynamic"])
def test_one_scale_changed_by_hand_is_found(snapped: Any, form: str, tmp_path: Path) -> None:
    made = snapped("bert")
    graph = lowered(made, form, tmp_path)
    [layer] = [layer for layer in quantized_layers(graph) if layer.module == QUERY]
    name = same_as(graph, layer.weight_scale)
    changed = change(graph, name, lambda value: value.__setitem__(7, value[7] * 1.01))
    check = check_scales(changed, made.weights, made.spans)
    assert [(each.module, each.what) for each in check.mismatches] == [(QUERY, "weight scale, 1 of 32 channels")]
    assert "of channel 7" in check.describe()


def test_activation_scales_and_zero_points_changed_by_hand_are_found_and_named(snapped: Any, tmp_path: Path) -> None:
    made = snapped("bert")
    graph = lowered(made, "int8_static", tmp_path)
    dense = "bert.encoder.layer.2.output.dense"
    [node] = [
        node
        for node in graph.graph.node
        if node.name == f"/{dense.replace('.', '/').replace('layer/', 'layer.')}/MatMul"
    ]
    [pair] = [each for each in graph.graph.node if node.input[0] in each.output]
    changed = change(graph, pair.input[1], lambda value: np.multiply(value, 1.001, out=value))
    [mismatch] = check_scales(changed, made.weights, made.spans).mismatches
    assert (mismatch.module, mismatch.what) == (dense, "activation scale")
    changed = change(graph, pair.input[2], lambda value: np.add(value, 1, out=value, casting="unsafe"))
    [mismatch] = check_scales(changed, made.weights, made.spans).mismatches
    assert (mismatch.module, mismatch.what) == (dense, "activation zero point")
    assert int(mismatch.found) == int(mismatch.expected) + 1


def test_zeros_of_masks_stay_zeros_in_every_form(snapped: Any, tmp_path: Path) -> None:
    made = snapped("bert")
    for form in ("int8_qdq", "int16_qdq", "int8_static", "int8_dynamic"):
        for layer in quantized_layers(lowered(made, form, tmp_path)):
            masked = made.weights[layer.module] == 0
            assert masked.mean() > 0.1
            assert layer.weight_zero is None or not layer.weight_zero.any()
            assert np.array_equal(layer.integers == 0, masked)


def test_factors_of_attention_are_in_the_weights_and_known_to_the_check(snapped: Any, tmp_path: Path) -> None:
    made = snapped("bert")
    graph = lowered(made, "int8_qdq", tmp_path)
    factors = factors_of(graph)
    assert {name.rpartition(".")[2] for name in factors} == {"query", "key"}
    assert len(factors) == 6
    assert all(factor == pytest.approx(8**-0.25) for factor in factors.values())
    del graph.metadata_props[:]
    wrong = check_scales(graph, made.weights, made.spans).mismatches
    assert {each.module for each in wrong} == set(factors)
    assert {each.what for each in wrong} == {"weight scale, 32 of 32 channels"}


def test_scales_are_those_of_fake_quantization() -> None:
    assert expected_scale((-1.0, 3.0), np.uint8) == (pytest.approx(4 / 255), 64)
    assert expected_scale((0.5, 2.0), np.uint8) == (pytest.approx(2 / 255), 0)
    assert expected_scale((-2.0, 1.0), np.int8) == (pytest.approx(2 / 127), 0)
    assert expected_scale((0.0, 1.0), np.uint16) == (pytest.approx(1 / 65535), 0)
    assert expected_scale((0.0, 0.0), np.uint8) == (1.0, 0)


def test_a_failure_says_whom_to_blame_and_survives_not_knowing() -> None:
    logits = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    with pytest.raises(StageError, match=r"only 0\.0% of 2 examples .*; layer 3 is broken"):
        require_parity(logits, -logits, "int8", "the graph", lambda: "layer 3 is broken")

    def broken() -> str:
        raise RuntimeError("no runtime")

    with pytest.raises(StageError, match=r"the layer could not be found \(no runtime\)"):
        require_parity(logits, -logits, "int8", "the graph", broken)
    assert require_parity(logits, logits, "int8", "the graph", broken).agreement == 1.0


@pytest.mark.parametrize("left", [False, True])
def test_a_graph_of_fixed_shapes_is_fed_padded(snapped: Any, make_texts: Any, left: bool, tmp_path: Path) -> None:
    made, texts = snapped("distilbert"), make_texts(6, seed=2, left=left, typed=False)
    fixed = lower(made.graph, tmp_path / "fixed.onnx", "fp32", batch=2, sequence=LENGTH)
    feeds = own_feeds(open_session(fixed), texts, np.array([1]))
    assert feeds["input_ids"].shape == (2, LENGTH)
    assert feeds["attention_mask"].sum(axis=1).tolist() == [texts.lengths[1]] * 2
    if not left:  # its positions are counted from the first column
        np.testing.assert_allclose(
            onnx_logits(fixed, texts), torch_logits(made.student.model, texts), atol=1e-4
        )  # fmt: skip


def weight_of(graph: onnx.ModelProto, made: Any, module: str) -> str:
    [layer] = [layer for layer in quantized_layers(graph) if layer.module == module]
    return same_as(graph, layer.integers.T)


def same_as(graph: onnx.ModelProto, value: np.ndarray) -> str:
    names = [t.name for t in graph.graph.initializer if np.array_equal(numpy_helper.to_array(t), value)]
    assert len(names) == 1
    return names[0]


def change(graph: onnx.ModelProto, name: str, how: Any) -> onnx.ModelProto:
    """A copy with one initializer changed in place by `how`."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    [tensor] = [tensor for tensor in copy.graph.initializer if tensor.name == name]
    value = np.array(numpy_helper.to_array(tensor))
    how(value)
    tensor.CopyFrom(numpy_helper.from_array(value, name))
    return copy
