from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgekd.arch import Arch, Layer
from edgekd.errors import ModelError
from edgekd.latency import table as tables
from edgekd.latency.table import Conditions, Curve, fit

HERE = Conditions(target="local", batch=1, sequence=64, threads=1, precision="fp32", cpu="any", runtime="any 1")


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


def test_additive_costs_are_recovered() -> None:
    table = fit([(model, truth(model)) for model in random_archs(60)], conditions=HERE)
    for model in random_archs(40, seed=1):
        assert table.predict(model) == pytest.approx(truth(model), rel=0.01)
    assert table.error["max"] < 0.01
    assert table.error["n"] == 60


def test_the_left_out_error_is_about_the_noise() -> None:
    rng = np.random.default_rng(0)
    points = [(model, truth(model) * rng.lognormal(0, 0.05)) for model in random_archs(80)]
    assert 0.02 < fit(points, conditions=HERE).error["median"] < 0.08


def test_growing_never_gets_cheaper() -> None:
    rng = np.random.default_rng(0)
    points = [(model, truth(model) * rng.lognormal(0, 0.2)) for model in random_archs(30)]
    table = fit(points, conditions=HERE)
    wider = [table.predict(arch((6, neurons))) for neurons in range(0, 800, 16)]
    headed = [table.predict(arch((heads, 128))) for heads in range(0, 20)]
    deeper = [table.predict(arch(*[(6, 128)] * depth)) for depth in range(1, 9)]
    for series in (wider, headed, deeper):
        assert (np.diff(series) >= -1e-12).all()


def test_between_knots_the_cost_is_linear_where_nothing_else_is_known() -> None:
    table = fit([(arch(*[(12, n)] * d), 1 + d * n / 100) for d in (1, 2, 4) for n in (100, 400)], conditions=HERE)
    assert table.predict(arch((12, 250))) == pytest.approx(3.5, rel=0.02)
    assert not table.extrapolates(arch((12, 400)))
    assert table.extrapolates(arch((12, 500)))
    assert table.extrapolates(arch((16, 100)))


def test_stages_of_a_convolutional_network_have_costs_of_their_own() -> None:
    rng = np.random.default_rng(0)

    def cost(model: Arch) -> float:
        return 0.5 + sum((layer.source + 1) * layer.neurons / 100 for layer in model.layers)

    def draw() -> Arch:
        return arch(*((0, int(rng.choice([32, 64, 96]))) for _ in range(3)), family="resnet")

    table = fit([(model, cost(model)) for model in (draw() for _ in range(30))], conditions=HERE, by_source=True)
    for model in (draw() for _ in range(10)):
        assert table.predict(model) == pytest.approx(cost(model), rel=0.01)
    with pytest.raises(ModelError, match="knows no layer made from the teacher's layer 3"):
        table.predict(arch(*[(0, 32)] * 4, family="resnet"))


def test_save_and_load_give_the_same_table(tmp_path: Path) -> None:
    table = fit([(model, truth(model)) for model in random_archs(20)], conditions=HERE)
    table.save(tmp_path / "table.json")
    again = tables.load(tmp_path / "table.json")
    assert again == table
    assert again.predict(arch((6, 200))) == table.predict(arch((6, 200)))


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    points = [(model, truth(model)) for model in random_archs(10)]
    table = fit(points, conditions=HERE)
    with pytest.raises(ModelError, match="is of bert with hidden size 96, not of vit"):
        table.predict(arch((6, 128), family="vit"))
    with pytest.raises(ModelError, match="at least 3 points"):
        fit(points[:2], conditions=HERE)
    with pytest.raises(ModelError, match="over 0 ms"):
        fit([*points, (points[0][0], 0.0)], conditions=HERE)
    with pytest.raises(ModelError, match="cannot read the latency table"):
        tables.load(tmp_path / "none.json")
    for text in ("[]", "{}", '{"conditions": 3}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ModelError, match="damaged"):
            tables.load(tmp_path / "bad.json")


def test_a_curve_goes_on_with_its_last_slope() -> None:
    curve = Curve((0.0, 10.0, 20.0), (0.0, 1.0, 3.0))
    assert [curve.at(x) for x in (0, 5, 15, 30)] == [0.0, 0.5, 2.0, 5.0]
    assert Curve().at(7) == 0.0
