"""Plain data before it is checked: put together from a file, the command line and `--set`; knows each key's origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgekd import yaml_lines
from edgekd.schema import At, Mistake, show


@dataclass
class Draft:
    """Nested plain data being put together, and what was found wrong with it on the way."""

    value: dict[str, Any] = field(default_factory=dict)
    origins: dict[At, tuple[str, int]] = field(default_factory=dict)
    found: list[tuple[tuple[str, int], str]] = field(default_factory=list)

    def read(self, text: str, source: str) -> None:
        """Take a YAML text as the data; a text that is not a mapping is found wrong."""
        try:
            document = yaml_lines.parse(text)
        except ValueError as error:
            self.found.append(((source, 0), f"not valid YAML: {error}"))
            return
        self.origins = {at: (source, line) for at, line in document.lines.items()}
        for mistake in document.mistakes:
            self.report(mistake)
        if isinstance(document.value, Mapping):
            self.value = dict(document.value)
        else:
            self.found.append(((source, 1), f"expected `key: value` lines, got {show(document.value)}"))

    def merge(self, values: Mapping[str, Any], source: str, at: At = ()) -> None:
        """Lay `values` over the data; mappings are merged, everything else replaced."""
        for key, value in values.items():
            inside = self.get((*at, key))
            if isinstance(value, Mapping) and (inside is None or isinstance(inside, Mapping)):
                if inside is None:
                    self.put((*at, key), {}, source)
                self.merge(value, source, (*at, key))
            else:
                self.put((*at, key), value, source)

    def get(self, at: At) -> Any:
        """The value at a place, None if there is none."""
        value: Any = self.value
        for part in at:
            inside = isinstance(value, Mapping) or (isinstance(value, list) and isinstance(part, int))
            try:
                value = value[part] if inside else None
            except (KeyError, IndexError):
                return None
        return value

    def put(self, at: At, value: Any, source: str) -> None:
        """Set the value at a place, making the mappings on the way; a place inside a text or number is found wrong."""
        for length in range(1, len(at)):
            inside = self.get(at[:length])
            if inside is None:
                self._assign(at[:length], {}, source)
            elif not isinstance(inside, Mapping | list):
                text = f"{dotted(at)}: {dotted(at[:length])} is {show(inside)}, it has no keys"
                self.found.append(((source, 0), text))
                return
        self._assign(at, value, source)

    def report(self, mistake: Mistake) -> None:
        """Note a mistake with the origin of what it is about."""
        source, line = self.origin((*mistake.at, mistake.key) if mistake.key else mistake.at)
        place = dotted(mistake.at)
        self.found.append(((source, mistake.line or line), f"{place}: {mistake.text}" if place else mistake.text))

    def origin(self, at: At) -> tuple[str, int]:
        """Source and line (0: none) of a place, or of the nearest place around it."""
        while at and at not in self.origins:
            at = at[:-1]
        return self.origins.get(at, ("recipe", 0))

    def messages(self) -> list[str]:
        """All that was found wrong, in the order of the sources' lines: `recipe.yaml:12: budget.speedup: …`."""
        unique = dict.fromkeys(sorted(self.found, key=lambda item: (item[0][1] == 0, item[0][1])))
        return [f"{source}:{line}: {text}" if line else f"{source}: {text}" for (source, line), text in unique]

    def _assign(self, at: At, value: Any, source: str) -> None:
        self.get(at[:-1])[at[-1]] = value
        for old in [place for place in self.origins if place[: len(at)] == at]:
            del self.origins[old]
        self.origins[at] = (source, 0)


def dotted(at: At) -> str:
    """A place as it is written for `--set`: `budget.speedup`, `stages.distill.epochs`, `targets[0]`."""
    if len(at) > 1 and at[0] == "stages" and isinstance(at[1], int):
        at = (at[0], *at[2:])
    text = ""
    for part in at:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
