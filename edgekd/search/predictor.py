"""Latencies of what will ship of a shape, predicted from a table, and how that is kept on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from edgekd.arch import Arch
from edgekd.context import as_it_is
from edgekd.errors import ModelError, RecipeError
from edgekd.files import write_json
from edgekd.latency.cell import Floats, Frame
from edgekd.latency.table import LatencyTable, Mix
from edgekd.search.timing import DEFAULT_TAIL
from edgekd.search.variants import MOST, Reshape, Saving, kind_of, plain, variant_of

LEAST = 1e-3
"""No shape is predicted to take less than this share of the teacher's time."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A table, the frame to predict in, the teacher's latency, and p95 over p50 of small models.

    `scale` is what was measured now over what the table predicts: a table may be from another day. `savings` are what
    the operators that will be installed anyway (`""`) and those of variants save. `hidden` are the widths of the
    residual stream that may be predicted.
    """

    table: LatencyTable
    frame: Frame
    teacher_ms: float
    tail: float = DEFAULT_TAIL
    scale: float = 1.0
    source: str = "measured for this search"
    savings: Mapping[str, Saving] = field(default_factory=dict)
    hidden: tuple[int, ...] = ()

    @property
    def known(self) -> list[int]:
        """Widths of the residual stream that the table has cells of, for models of this outline."""
        return sorted({cell.frame.hidden for cell in self.table.cells if cell.frame.outline == self.frame.outline})

    def predictor(self, reshape: Reshape = as_it_is) -> Predictor:
        """Latencies in milliseconds of shapes, quickly; `reshape` is what the operators stage will make of them."""
        return Predictor(self, reshape)


class Predictor:
    """Predicts what will ship of a shape: the cells are looked up once for each width of the residual stream."""

    def __init__(self, reference: Reference, reshape: Reshape = as_it_is) -> None:
        self.reference, self.reshape = reference, reshape
        self._mixes: dict[int, Mix] = {}

    def __call__(self, arch: Arch) -> float:
        """Milliseconds of one shape.

        Raises:
            ModelError: the table does not know this width of the residual stream.
        """
        before = plain(arch)
        # A table fitted to noise may say nothing at all for the smallest shapes.
        with np.errstate(divide="ignore", invalid="ignore"):
            said = float(np.nan_to_num(self._table_ms(before), nan=0.0))
        ms = max(self.reference.scale * said, LEAST * self.reference.teacher_ms)
        saving = self.reference.savings.get(kind_of(variant_of(arch)))
        return ms if saving is None else ms - min(saving(before, self.reshape(arch), self.costs), MOST * ms)

    def costs(self, arch: Arch) -> Floats:
        """What the layers of a plain shape cost [L, 3] in milliseconds, by the cell that weighs most."""
        _, cell = max(self._mix(arch.hidden).cells, key=lambda weighed: weighed[0])
        return self.reference.scale * cell.layer_costs(arch)

    def _table_ms(self, arch: Arch) -> float:
        """What the table says; between two widths of a convolutional net, which cells do not mix, the same is done."""
        known = self.reference.known
        if not self.reference.frame.outline or arch.hidden in known or len(known) < 2:
            return float(self._mix(arch.hidden).predict([arch])[0])
        low, high = known[0], known[-1]
        share = math.log(arch.hidden / low) / math.log(high / low)
        ends = [float(self._mix(width).predict([replace(arch, hidden=width)])[0]) for width in (low, high)]
        return float(ends[0] ** (1 - share) * ends[1] ** share)

    def _mix(self, hidden: int) -> Mix:
        if hidden not in self._mixes:
            self._mixes[hidden] = self.reference.table.mix(replace(self.reference.frame, hidden=hidden))
        return self._mixes[hidden]


def write_reference(file: Path, reference: Reference) -> None:
    """Write a reference as JSON."""
    savings = {name: asdict(saving) for name, saving in reference.savings.items()}
    table, frame = reference.table.to_dict(), vars(reference.frame)
    write_json(file, {**vars(reference), "table": table, "frame": frame, "savings": savings})


def read_reference(file: Path) -> Reference:
    """Read what `find_reference` wrote.

    Raises:
        RecipeError: it is something else.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        table, frame = LatencyTable.from_dict(data.pop("table")), Frame(**data.pop("frame"))
        savings = {
            name: Saving(tuple(saving["weights"]), saving["sequence"]) for name, saving in data.pop("savings").items()
        }
        return Reference(**{**data, "hidden": tuple(data["hidden"])}, table=table, frame=frame, savings=savings)
    except (ValueError, KeyError, TypeError, AttributeError, ModelError) as error:
        raise RecipeError(f"{file} is not what search wrote there: {error}; delete it") from None
