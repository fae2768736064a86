from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgekd.arch import Arch, Layer
from edgekd.errors import ModelError
from edgekd.latency import table as tables
from edgekd.latency.cell import Cell, Curve, Frame, Shapes
from edgekd.latency.fit import fit
from edgekd.latency.table import Conditions, LatencyTable, Point

HERE = Frame(family="bert", hidden=96, head_dim=8, lowering="fp32", sequence=64)
CNN = Frame(family="resnet", hidden=96, head_dim=0, lowering="fp32", outline="32px")


def arch(*layers: tuple[int, int], family: str = "bert") -> Arch:
    rows = tuple(Layer(source=index, heads=heads, neurons=neurons) for index, (heads, neurons) in enumerate(layers))
    return Arch(family=family, hidden=96, head_dim=8, vocabulary=100, layers=rows)


def random_archs(count: int, seed: int = 0) -> list[Arch]:
    rng = np.random.default_rng(seed)
    return [
        arch(
            *((int(rng.choice([3, 6, 9, 12])), int(rng.choice([64, 128, 256, 384]))) for _ in range(rng.integers(1, 7)))
        )
        for _ in range(count)
    ]


def truth(model: Arch) -> float:
    """Base, fixed cost, linear heads, neurons with a knee at 128."""
    return 1.0 + sum(
        0.2 + 0.05 * layer.heads + 0.004 * layer.neurons + 0.002 * max(0, layer.neurons - 128) for layer in model.layers
    )


def fitted(archs: list[Arch], cost=truth, frame: Frame = HERE, **settings) -> Cell:
    return fit(archs, [cost(model) for model in archs], frame, **settings)


def ask(cell: Cell, model: Arch) -> float:
    return float(cell.predict(Shapes.of([model]))[0])


def test_additive_costs_are_recovered() -> None:
    cell = fitted(random_archs(60))
    others = random_archs(40, seed=1)
    assert cell.predict(Shapes.of(others)) == pytest.approx([truth(model) for model in others], rel=0.01)
    assert cell.error["max"] < 0.01
    assert cell.error["n"] == 60


def test_a_last_layer_that_computes_for_one_token_is_told_apart() -> None:
    def cost(model: Arch) -> float:
        *rest, last = [0.2 + 0.05 * layer.heads + 0.004 * layer.neurons for layer in model.layers]
        return 1.0 + sum(rest) + 0.5 * last - 0.45 * 0.004 * model.layers[-1].neurons

    cell, others = fitted(random_archs(60), cost), random_archs(40, seed=1)
    assert cell.last == (0.5, 0.5, 0.05)
    assert cell.predict(Shapes.of(others)) == pytest.approx([cost(model) for model in others], rel=0.01)
    assert Cell.from_dict(cell.to_dict()) == cell
    assert fitted(random_archs(60)).last == (1.0, 1.0, 1.0)


def test_a_population_gets_what_each_gets_alone() -> None:
    cell, others = fitted(random_archs(60)), random_archs(20, seed=1)
    assert cell.predict(Shapes.of(others)).tolist() == pytest.approx([ask(cell, model) for model in others], abs=1e-12)


def test_the_left_out_error_is_about_the_noise() -> None:
    rng = np.random.default_rng(0)
    assert 0.02 < fitted(random_archs(80), lambda model: truth(model) * rng.lognormal(0, 0.05)).error["median"] < 0.08


def test_growing_never_gets_cheaper() -> None:
    rng = np.random.default_rng(0)
    cell = replace(fitted(random_archs(30), lambda model: truth(model) * rng.lognormal(0, 0.2)))
    wider = [arch((6, neurons)) for neurons in range(0, 800, 16)]
    headed = [arch((heads, 128)) for heads in range(0, 20)]
    deeper = [arch(*[(6, 128)] * depth) for depth in range(1, 9)]
    for series in (wider, headed, deeper):
        assert (np.diff(cell.parts(Shapes.of(series)).total) >= -1e-12).all()


def test_the_correction_learns_what_parts_cannot_say_and_stays_away_otherwise() -> None:
    def bent(model: Arch) -> float:
        return truth(model) * len(model.layers) ** 0.15

    plain, corrected = fitted(random_archs(80)), fitted(random_archs(80), bent)
    assert plain.correction.weights == ()
    assert corrected.correction.weights
    others = random_archs(40, seed=1)
    without = replace(corrected, correction=plain.correction)
    errors = [np.abs(cell.predict(Shapes.of(others)) / [bent(m) for m in others] - 1) for cell in (corrected, without)]
    assert errors[0].mean() < 0.7 * errors[1].mean()


def test_between_knots_the_cost_is_linear_where_nothing_else_is_known() -> None:
    models = [arch(*[(12, n)] * d) for d in (1, 2, 4) for n in (100, 400)]
    cell = fitted(models, lambda model: 1 + sum(layer.neurons for layer in model.layers) / 100)
    assert ask(cell, arch((12, 250))) == pytest.approx(3.5, rel=0.02)
    assert not cell.beyond(arch((12, 400)))
    assert cell.beyond(arch((12, 500))) == ("500 neurons (at most 400)",)
    assert cell.beyond(arch((16, 100))) == ("16 heads (at most 12)",)
    assert cell.beyond(arch(*[(12, 100)] * 5)) == ("5 layers (at most 4 were measured)",)


def test_stages_of_a_convolutional_network_have_costs_of_their_own() -> None:
    rng = np.random.default_rng(0)

    def cost(model: Arch) -> float:
        return 0.5 + sum((layer.source + 1) * layer.neurons / 100 for layer in model.layers)

    def draw() -> Arch:
        return arch(*((0, int(rng.choice([32, 64, 96]))) for _ in range(3)), family="resnet")

    cell = fitted([draw() for _ in range(30)], cost, CNN, by_source=True)
    for model in (draw() for _ in range(10)):
        assert ask(cell, model) == pytest.approx(cost(model), rel=0.01)
    with pytest.raises(ModelError, match=r"knows no layer made from the teacher's layers \[3\]"):
        ask(cell, arch(*[(0, 32)] * 4, family="resnet"))


def points(frame: Frame, cost=truth, count: int = 40, seed: int = 0, use: str = tables.FIT) -> list[Point]:
    rows = []
    for model in random_archs(count, seed):
        layers = tuple((layer.source, layer.heads, layer.neurons) for layer in model.layers)
        rows.append(Point(frame=frame, layers=layers, ms=cost(model), use=use))
    return rows


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    """Batches 1 and 4 at 32 and 128 tokens; cost goes with both."""
    rows = []
    for batch in (1, 4):
        for sequence in (32, 128):
            frame = replace(HERE, batch=batch, sequence=sequence)
            scale = batch * sequence / 32
            rows += points(frame, lambda model, scale=scale: truth(model) * scale)
            rows += points(
                frame, lambda model, scale=scale: 1.05 * truth(model) * scale, 6, seed=9, use=tables.HELD_OUT
            )
    return LatencyTable(conditions=Conditions(target="local"), points=tuple(rows)).refit()


def test_batch_and_length_in_between_are_interpolated_on_a_logarithmic_scale(table: LatencyTable) -> None:
    model = random_archs(1, seed=5)[0]
    for batch, sequence in ((1, 32), (2, 64), (3, 100), (4, 128)):
        found = table.predict(model, lowering="fp32", batch=batch, sequence=sequence)
        assert found.ms == pytest.approx(truth(model) * batch * sequence / 32, rel=0.01)
        assert (found.kind, found.basis, found.extrapolates) == ("predicted", "measured", ())
    frame = tables.frame_of(model, "fp32", 2, 64)
    assert table.covers(frame)
    assert not table.covers(replace(frame, sequence=256))


def test_what_lies_outside_is_predicted_and_said(table: LatencyTable) -> None:
    found = table.predict(arch((24, 900)), lowering="fp32", sequence=256)
    assert found.extrapolates == (
        "sequence 256 (measured: 32 to 128)",
        "24 heads (at most 12)",
        "900 neurons (at most 384)",
    )
    assert found.ms > table.predict(arch((24, 900)), lowering="fp32", sequence=128).ms


def test_the_error_comes_from_points_that_no_fit_has_seen(table: LatencyTable) -> None:
    assert table.held_out["n"] == 24
    assert table.held_out["median"] == pytest.approx(0.05 / 1.05, rel=0.1)
    assert table.held_out["within_10"] == 1.0
    assert table.held_out["groups"]["bert fp32"]["n"] == 24
    assert (
        table.predict(arch((6, 128)), lowering="fp32", sequence=32).error
        == table.held_out["groups"]["bert fp32"]["p90"]
    )
    blind = replace(table, points=tuple(p for p in table.points if p.use == tables.FIT)).refit()
    assert blind.held_out == {"n": 0, "groups": {}}
    assert [cell.base_ms for cell in blind.cells] == [cell.base_ms for cell in table.cells]


def test_save_and_load_give_the_same_table(table: LatencyTable, tmp_path: Path) -> None:
    table.save(tmp_path / "new" / "table.json")
    again = tables.load(tmp_path / "new" / "table.json")
    model = arch((6, 200))
    assert again.held_out == table.held_out
    assert len(again.points) == len(table.points)
    assert again.predict(model, lowering="fp32", sequence=32) == table.predict(model, lowering="fp32", sequence=32)
    assert again.refit().held_out["n"] == table.held_out["n"]


def test_what_is_not_covered_is_refused_with_what_is(table: LatencyTable) -> None:
    covered = r"it covers bert 96 \(heads of 8\), fp32, batch 1, 128 tokens; "
    with pytest.raises(ModelError, match="nothing on vit 96 .*: " + covered):
        table.predict(arch((6, 128), family="vit"), lowering="fp32", sequence=32)
    with pytest.raises(ModelError, match="nothing on bert 96 .*int8"):
        table.predict(arch((6, 128)), lowering="int8_dynamic", sequence=32)
    with pytest.raises(ModelError, match="knows hidden 96 only, not 128"):
        table.predict(replace(arch((6, 128)), hidden=128), lowering="fp32", sequence=32)
    gaps = replace(table, cells=table.cells[1:])
    with pytest.raises(ModelError, match="has gaps around"):
        gaps.predict(arch((6, 128)), lowering="fp32", batch=2, sequence=64)
    empty = LatencyTable(conditions=Conditions(target="local"))
    with pytest.raises(ModelError, match="it is empty; run `edgekd calibrate`"):
        empty.predict(arch((6, 128)), lowering="fp32", sequence=32)


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    models = random_archs(10)
    with pytest.raises(ModelError, match="at least 3 points"):
        fitted(models[:2])
    with pytest.raises(ModelError, match="at least 3 points of one family"):
        fitted([*models, arch((6, 128), family="vit")])
    with pytest.raises(ModelError, match="over 0 ms"):
        fit(models, [0.0] * 10, HERE)
    with pytest.raises(ModelError, match="cannot read the latency table"):
        tables.load(tmp_path / "none.json")
    for text in ("[]", "{}", '{"schema": 1, "conditions": 3}', '{"schema": 99}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ModelError, match=r"bad\.json.*damaged"):
            tables.load(tmp_path / "bad.json")


def test_a_curve_goes_on_with_its_last_slope() -> None:
    curve = Curve((0.0, 10.0, 20.0), (0.0, 1.0, 3.0))
    assert curve.at([0, 5, 15, 30]).tolist() == [0.0, 0.5, 2.0, 5.0]
    assert Curve().at(7) == 0.0
