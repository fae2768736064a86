"""Several operators as one, and one as several where that is faster: what changes speed but not meaning."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

from edgekd.export.static import declare_domains


def fuse(graph: Any, model_type: str) -> Any:
    """Attention, Gelu and LayerNormalization as single operators, by onnxruntime's transformer optimizer.

    Skip-layer-norm fusion is left out: its CPU kernel is slower than the two operators it replaces. The attention
    mask stays a raw mask, so that left padding and holes keep working. Attention whose probabilities are read by
    something else too (the next layer, or the choice of tokens) stays as it is.
    """
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.onnx_model_bert import BertOnnxModel
    from onnxruntime.transformers.optimizer import optimize_by_fusion

    kind = "vit" if model_type in ("vit", "deit") else "bert"
    options = FusionOptions(kind)
    options.enable_skip_layer_norm = False
    options.enable_bias_skip_layer_norm = False
    options.enable_embed_layer_norm = False
    options.use_raw_attention_mask(True)
    graph = copy.deepcopy(graph)
    _mark_shared(graph)
    fused: BertOnnxModel = optimize_by_fusion(graph, kind, num_heads=0, hidden_size=0, optimization_options=options)
    _unmark_shared(fused.model)
    return declare_domains(fused.model)


_MARK = "edgekd/shared"


def _mark_shared(graph: Any) -> None:
    """Put an idle Sum after every Softmax with several readers: the fusion would take the Softmax from the others."""
    from onnx import helper

    readers = Counter(name for node in graph.graph.node for name in node.input)
    nodes = []
    for node in graph.graph.node:
        nodes.append(node)
        if node.op_type == "Softmax" and readers[node.output[0]] > 1:
            name = node.output[0]
            node.output[0] = f"{name}_{_MARK}"
            nodes.append(helper.make_node("Sum", [node.output[0]], [name], name=f"{_MARK}/{name}"))
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)


def _unmark_shared(graph: Any) -> None:
    marks = {node.input[0]: node.output[0] for node in graph.graph.node if node.name.startswith(_MARK)}
    nodes = [node for node in graph.graph.node if not node.name.startswith(_MARK)]
    for node in nodes:
        if node.output and node.output[0] in marks:
            node.output[0] = marks[node.output[0]]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)


def keep_residuals_apart(graph: Any) -> int:
    """Write the residual `Add` before a LayerNormalization as `Sum` (the same values) and return how many there were.

    ONNX Runtime fuses Add and LayerNormalization at load time into SkipLayerNormalization, which is slower on CPU;
    it leaves Sum alone, so a session with default options stays fast.
    """
    normalized = {node.input[0] for node in graph.graph.node if node.op_type == "LayerNormalization"}
    count = 0
    for node in graph.graph.node:
        if node.op_type == "Add" and node.output[0] in normalized:
            node.op_type = "Sum"
            count += 1
    return count


def cheapen_gelu(graph: Any) -> int:
    """Let Gelu be computed by tanh instead of erf, in place; return how many there are.

    The two differ by 0.0005 at most, a fortieth of a step of an 8-bit tensor that reaches from 0 to 5.
    """
    from onnx import helper

    nodes = [node for node in graph.graph.node if node.op_type == "Gelu" and not node.domain]
    for node in nodes:
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("approximate", "tanh"))
    return len(nodes)
