"""YAML as plain data that remembers the line of every key.

The scalars are those of YAML 1.2's core schema, not 1.1's: `5e-5` is a number and `no` is a text. Tags, anchors and
keys that are not texts are refused, so that what is read is what JSON could hold.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from edgekd.schema import At, Mistake

_PLAIN = (str, int, float, bool, type(None))
_SCALARS = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", "~nN\0"),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, (pattern, first_letters) in _SCALARS.items():
        for letter in first_letters.replace("\0", ""):
            table.setdefault(letter, []).append((tag, re.compile(rf"(?:{pattern})\Z")))
    table[""] = [("tag:yaml.org,2002:null", re.compile(r"\Z"))]
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None):
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not supported", event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _resolvers()

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent the items of a list under its key."""
        super().increase_indent(flow, False)


@dataclass(frozen=True)
class Document:
    """What a YAML text holds: plain data, the line (from 1) of every key and item, and what is wrong with it."""

    value: Any
    lines: dict[At, int]
    mistakes: list[Mistake] = field(default_factory=list)


def parse(text: str) -> Document:
    """Read one YAML document.

    Duplicate keys, keys that are not texts and tagged values are mistakes of the document.

    Raises:
        ValueError: the text is not YAML; the message is `line 3, column 5: …`.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        document = Document(None, {})
        value = None if node is None else _plain(loader, node, (), document)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("line 1, column 1: nested too deeply") from None
    return Document(value, document.lines, document.mistakes)


def dump(value: Any) -> str:
    """Write plain data so that `parse` reads the same back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _plain(loader: _Loader, node: yaml.Node, at: At, document: Document) -> Any:
    document.lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        return _mapping(loader, node, at, document)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item, (*at, index), document) for index, item in enumerate(node.value)]
    try:
        value = loader.construct_object(node)
    except (ValueError, OverflowError):
        value = node
    if not isinstance(value, _PLAIN):
        document.mistakes.append(Mistake(at, f"expected a plain value, got one tagged {node.tag!r}"))
        return None
    return value


def _mapping(loader: _Loader, node: yaml.MappingNode, at: At, document: Document) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            document.mistakes.append(Mistake(at, "expected a text as key, got a list or mapping", line))
            continue
        key = key_node.value
        inside: At = (*at, key)
        if key in mapping:
            first = document.lines[inside]
            document.mistakes.append(Mistake(at, f"duplicate key {key!r} (first on line {first})", line))
            continue
        document.lines[inside] = line
        mapping[key] = _plain(loader, value_node, inside, document)
    return mapping
