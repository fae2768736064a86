"""From the exporter's node names back to torch modules, so that what was learned there is found in the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from edgekd.errors import ModelError, unknown

Ranges = Mapping[str, tuple[float, float]]

MULTIPLIED = ("MatMul", "Gemm", "Conv")
ATTENTION = "Attention"
PRODUCTS = (("query", "key"), ("probabilities", "value"))
"""What the two products of attention multiply."""


def module_of(node: Any) -> str:
    """The torch module whose forward pass a node comes from; empty for a node that a graph pass has made.

    `/bert/encoder/layer.0/attention/self/query/MatMul` -> `bert.encoder.layer.0.attention.self.query`. A fused
    attention is told by its output, which keeps its name: `bert.encoder.layer.0.attention.self`.
    """
    if node.op_type == ATTENTION and node.output:
        return module_of_name(node.output[0])
    return module_of_name(node.name)


def module_of_name(name: str) -> str:
    """The same for the name of a node or of an intermediate tensor."""
    if not name.startswith("/"):
        return ""
    parts = name.split("/")[1:-1]
    # A child of an nn.Sequential bears its parent's name too: /classifier/classifier.1/Gemm.
    told = [part for part, after in zip(parts, [*parts, ""][1:], strict=True) if not after.startswith(f"{part}.")]
    return ".".join(told)


def multiplied(graph: Any) -> dict[str, Any]:
    """The MatMul, Gemm or Conv of every linear layer and convolution, by the name of its module.

    A product of two activations, as attention has, belongs to no layer. Where the graph still has the name of a
    layer's bias or weight, that tells the module: nodes of layers that drop tokens or share attention bear the names
    of the calls, not of the modules.
    """
    constant = constants(graph)
    nodes = [node for node in graph.graph.node if node.op_type in MULTIPLIED and constant & set(node.input[1:2])]
    told = _told_by_tensors(graph, nodes)
    return {module: node for node in nodes if (module := told.get(node.name) or module_of(node))}


def name_after_modules(graph: Any) -> None:
    """Rename, in place, products that bear the names of calls: what is lowered later has no biases left to tell by."""
    for module, node in multiplied(graph).items():
        if module_of(node) != module:
            node.name = f"/{module.replace('.', '/')}/{node.op_type}"


def _told_by_tensors(graph: Any, nodes: Collection[Any]) -> dict[str, str]:
    """Modules by name of the node, from the tensors that belong to it alone."""
    uses = Counter(name for node in graph.graph.node for name in node.input)
    readers = {name: node for node in graph.graph.node for name in node.input}
    found = {}
    for node in nodes:
        after = readers.get(node.output[0])
        added = after.input if node.op_type == "MatMul" and after is not None and after.op_type == "Add" else ()
        for name in (*node.input[1:], *added):
            module, _, kind = name.rpartition(".")
            if kind in ("weight", "bias") and module and uses[name] == 1:
                found[node.name] = module
    for node in nodes:  # the first of two factors has no bias: the second tells
        after = readers.get(node.output[0])
        module = found.get(after.name, "") if after is not None else ""
        if node.name not in found and module.endswith(".second"):
            found[node.name] = module.removesuffix("second") + "first"
    return found


def constants(graph: Any) -> set[str]:
    """Tensors that hold the same in every run: initializers and Constant nodes."""
    made = {node.output[0] for node in graph.graph.node if node.op_type == "Constant"}
    return made | {tensor.name for tensor in graph.graph.initializer}


def trained_ranges(graph: Any, activations: Ranges) -> dict[str, tuple[float, float]]:
    """Ranges by tensor name, of ranges by the module that reads the tensor.

    Modules that read the same tensor share one quantizer; should their ranges differ, the tensor gets the hull.

    Args:
        graph: float32 ModelProto, as `export_float` wrote it.
        activations: minimum and maximum of the input of linear layers and convolutions, by module.

    Raises:
        ModelError: a module is not in the graph.
    """
    nodes = multiplied(graph)
    found: dict[str, tuple[float, float]] = {}
    for module, (low, high) in activations.items():
        if module not in nodes:
            raise ModelError(
                f"the trained activations name a layer the graph has not: {unknown('layer', module, nodes)}"
            )
        tensor = nodes[module].input[0]
        before = found.get(tensor, (low, high))
        found[tensor] = (min(float(low), before[0]), max(float(high), before[1]))
    return found


def operand_ranges(graph: Any, attention: Ranges, seen: Ranges) -> dict[str, tuple[float, float]]:
    """Ranges by tensor, of ranges by operand of attention (`module:query`, `key`, `probabilities`, `value`).

    Exporters may multiply query and key by a number before they meet; what comes out of that is ranged alike, by how
    far `seen`, ranges by tensor, says it is stretched. Products that do not bear their module's name, as in layers that
    drop tokens, are left out.
    """
    constant = constants(graph)
    makers = {name: node for node in graph.graph.node for name in node.output}
    owners = {name.rpartition(":")[0] for name in attention}
    products: dict[str, list[Any]] = {}
    for node in graph.graph.node:
        if node.op_type == "MatMul" and not constant & set(node.input):
            for owner in owners & set(_scopes(module_of(node))):
                products.setdefault(owner, []).append(node)
    found: dict[str, tuple[float, float]] = {}
    for owner, nodes in products.items():
        # A layer that shares attention has the second product alone.
        for node, names in zip(nodes, PRODUCTS[-len(nodes) :], strict=False):
            for tensor, operand in zip(node.input, names, strict=True):
                if (span := attention.get(f"{owner}:{operand}")) is not None:
                    maker = makers.get(tensor)
                    inner = maker.input[0] if maker is not None and maker.op_type == "Mul" else tensor
                    factor = _stretched(seen.get(inner), seen.get(tensor))
                    found[inner] = (float(span[0]), float(span[1]))
                    found[tensor] = (float(span[0]) * factor, float(span[1]) * factor)
    return found


def _stretched(before: tuple[float, float] | None, after: tuple[float, float] | None) -> float:
    """The positive number that one range is another's multiple by."""
    if before is None or after is None or before == after:
        return 1.0
    width = max(-before[0], before[1])
    return max(-after[0], after[1]) / width if width > 0 else 1.0


def spans_by_node(graph: Any, ranges: Ranges, activations: Ranges) -> dict[str, tuple[float, float]]:
    """The range of the input of every linear layer and convolution by the name of its node, which rewriting keeps.

    Args:
        graph: float32 ModelProto, as `export_float` wrote it.
        ranges: minimum and maximum by tensor.
        activations: the same by module; they win.
    """
    found = {}
    for module, node in multiplied(graph).items():
        span = activations.get(module, ranges.get(node.input[0]))
        if span is not None:
            found[node.name] = (float(span[0]), float(span[1]))
    return found


def kept_nodes(graph: Any, modules: Collection[str], *, strict: bool = True) -> list[str]:
    """Names of the nodes of these modules and of all within them, and of fused attentions they went into.

    Raises:
        ModelError: if `strict`, a name that is no module of the graph.
    """
    owners = {node.name: module_of(node) for node in graph.graph.node}
    owners |= {node.name: module for module, node in multiplied(graph).items()}
    known = {scope for owner in owners.values() for scope in _scopes(owner)}
    for module in modules:
        if strict and module not in known:
            raise ModelError(f"keep_float names what the graph has not: {unknown('module', module, sorted(known))}")
    wanted = set(modules)
    return [
        name
        for node in graph.graph.node
        if (name := node.name)
        and (
            wanted & set(_scopes(owners[name]))
            or (node.op_type == ATTENTION and any(module.rpartition(".")[0] == owners[name] for module in wanted))
        )
    ]


def _scopes(module: str) -> Iterator[str]:
    """A module and all that it is part of."""
    while module:
        yield module
        module = module.rpartition(".")[0]
