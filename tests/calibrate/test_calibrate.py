from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgekd.calibrate import bodies, run, shapes
from edgekd.calibrate.bodies import Body, body_of, find_body
from edgekd.calibrate.estimates import Estimator
from edgekd.calibrate.graphs import build_graphs, example
from edgekd.calibrate.run import Plan, calibrate
from edgekd.devices import Estimate
from edgekd.errors import ModelError, RecipeError, StoreError, TargetError
from edgekd.latency.stats import Samples
from edgekd.latency.table import HELD_OUT, frame_of, load
from edgekd.target import Target, load_target, probe


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that is built in no time."""
    monkeypatch.setitem(bodies.STANDARD, "tiny", lambda: bodies.bert(32, 4, depth=4))


@pytest.fixture
def local() -> Target:
    return probe(load_target("local"))


PLAN = Plan(bodies=("tiny",), lowerings=("fp32", "int8_dynamic_fused"), shapes=((1, 8), (2, 16)), mixed=3, held_out=2)


class Clock:
    """Stands in for building and measuring: a cost by layers, on a machine that gets slower from call to call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        monkeypatch.setattr(run, "build_graphs", self.build)
        monkeypatch.setattr("edgekd.calibrate.timing.measure", self.measure)

    def build(self, body, arch, outputs, **settings):
        for path in outputs:
            path.write_text(str(len(arch.layers)))

    def measure(self, subjects, *, batch, sequence, **settings):
        self.calls += 1
        slower = 1 + self.calls / 10

        def ms(subject):
            return slower * (0.1 + 0.01 * int(subject.path.read_text()) * batch * sequence)

        return [Samples(name=s.name, ms=np.full(32, ms(s)), block=np.arange(32)) for s in subjects]


@pytest.mark.parametrize("name", sorted(bodies.STANDARD))
def test_standard_bodies_are_what_their_names_say(name: str) -> None:
    body = find_body(name)
    family, *numbers = name.split("-")
    assert body.student.arch.family == family
    assert (body.image is None) == (family == "bert")
    if family == "resnet":
        assert body.outline == "64px 64-64-128-128-256-256-512-512"
        assert body.tokens is None
    else:
        assert body.student.arch.hidden == int(numbers[0])
        assert body.outline == ""
    if family == "vit":
        assert body.image == int(numbers[1])
        assert body.tokens == (body.image // 16) ** 2 + 1


def test_a_model_folder_is_a_body_and_a_name_that_is_none_is_refused(make_model) -> None:
    body = body_of(make_model("vit"))
    assert body.student.arch.family == "vit"
    assert body.image is not None
    with pytest.raises(
        RecipeError, match=r"unknown body 'bert-380' \(did you mean 'bert-384'\?\).*or give a model folder"
    ):
        find_body("bert-380")


def test_a_large_word_table_is_cut_for_timing_only(make_model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "SMALL_TABLE", 16)
    body = body_of(make_model("bert"))
    assert body.student.model.config.vocab_size == 16
    assert example(body, batch=1, sequence=4)["input_ids"].max() < 16


@pytest.mark.parametrize("kind", ["bert", "distilbert", "vit", "resnet"])
def test_shapes_are_cut_exported_and_run(make_model, kind: str, tmp_path: Path) -> None:
    import onnxruntime

    body = body_of(make_model(kind))
    droppable = [body.student.family.droppable(body.student.model, i) for i in range(len(body.student.arch.layers))]
    arch = shapes.mixed(body.student.arch, droppable, 3, seed=1)[-1]
    outputs = {
        tmp_path / f"{name}.onnx": frame_of(arch, name, 2, None if body.image else 16)
        for name in ("fp32", "int8_static")
    }
    build_graphs(body, arch, outputs, static=True)
    for path in outputs:
        session = onnxruntime.InferenceSession(path)
        assert all(isinstance(size, int) for value in session.get_inputs() for size in value.shape)
        assert session.run(None, example(body, batch=2, sequence=16))[0].shape[0] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp32.onnx", "int8_static.onnx"]


def test_images_of_a_standard_body_have_known_sizes_and_a_free_batch(tmp_path: Path) -> None:
    from edgekd.latency.feeds import synthesize

    body = bodies.vit(32, 2, 32, depth=1)
    path = tmp_path / "model.onnx"
    build_graphs(body, body.student.arch, {path: frame_of(body.student.arch, "fp32", 1, body.tokens)})
    assert synthesize(path, batch=2).arrays["pixel_values"].shape == (2, 3, 32, 32)


def test_chains_have_two_lengths_of_each_width_and_mixed_models_differ() -> None:
    arch = find_body("bert-128").student.arch
    rows = shapes.chains(arch)
    assert len(set(rows)) == len(rows)
    widths = {(row.layers[0].heads, row.layers[0].neurons) for row in rows}
    for width in widths:
        depths = {len(row.layers) for row in rows if (row.layers[0].heads, row.layers[0].neurons) == width}
        assert {shapes.SHORT, shapes.LONG} <= depths
    drawn = shapes.mixed(arch, [True] * 8, 60, seed=3)
    assert len(set(drawn)) == 60
    assert drawn == shapes.mixed(arch, [True] * 8, 60, seed=3)
    uniform = [row for row in drawn if len({(layer.heads, layer.neurons) for layer in row.layers}) == 1]
    assert 10 < len(uniform) < 50
    assert {len(row.layers) for row in drawn} == set(range(1, 9))


def test_calibration_fills_the_plan_cancels_drift_and_takes_nothing_twice(small, local, monkeypatch, tmp_path) -> None:
    clock, out = Clock(monkeypatch), tmp_path / "table.json"
    table = calibrate(local, PLAN, out, threads=1)
    assert load(out).held_out == table.held_out
    arch = find_body("tiny").student.arch
    planned = len(shapes.chains(arch)) + PLAN.mixed + PLAN.held_out
    assert len(table.points) == planned * 4
    assert sum(point.use == HELD_OUT for point in table.points) == PLAN.held_out * 4
    assert len(table.cells) == 4
    # Drift of up to 2x between groups is gone: equal models at equal shapes have equal times.
    for frame in {point.frame for point in table.points}:
        times = {(len(p.layers), round(p.ms, 9)) for p in table.points if p.frame == frame}
        assert len(times) == len({depth for depth, _ in times})
    calls = clock.calls
    again = calibrate(local, PLAN, out, threads=1)
    assert clock.calls == calls
    assert again.points == load(out).points
    wider = calibrate(local, replace(PLAN, shapes=(*PLAN.shapes, (1, 32))), out, threads=1)
    assert len(wider.points) == planned * 6


def test_a_calibration_out_of_time_goes_on_later(small, local, monkeypatch, tmp_path) -> None:
    Clock(monkeypatch)
    out = tmp_path / "table.json"
    monkeypatch.setattr(run, "GROUP_SIZE", 4)
    counts = []
    ticks = iter(range(10_000))
    monkeypatch.setattr(run.time, "monotonic", lambda: float(next(ticks)))
    for _ in range(60):
        counts.append(len(calibrate(local, PLAN, out, threads=1, minutes=0.3).points))
        if len(counts) > 1 and counts[-1] == counts[-2] and counts[-1]:
            break
    monkeypatch.setattr(run.time, "monotonic", lambda: 0.0)
    assert counts == sorted(counts)
    assert len(set(counts)) > 2
    whole = calibrate(local, PLAN, tmp_path / "whole.json", threads=1)
    assert {(p.frame, p.layers) for p in load(out).points} == {(p.frame, p.layers) for p in whole.points}


def test_models_are_really_built_and_timed(small, local, monkeypatch, tmp_path) -> None:
    plan = replace(PLAN, shapes=((1, 8),), lowerings=("int8_dynamic_fused",), mixed=1, held_out=1)
    arch = find_body("tiny").student.arch
    rows = shapes.chains(arch)[:3]
    monkeypatch.setattr(run, "chains", lambda arch: rows)
    table = calibrate(local, plan, tmp_path / "table.json", threads=1)
    assert len(table.points) == len({*rows, *shapes.references(arch)}) + 2
    assert all(point.ms > 0 and point.noise >= 0 for point in table.points)


def test_a_table_of_other_conditions_is_not_mixed_up(small, local, monkeypatch, tmp_path) -> None:
    Clock(monkeypatch)
    out = tmp_path / "table.json"
    plan = replace(PLAN, shapes=((1, 8),), lowerings=("fp32",), mixed=1, held_out=1)
    calibrate(local, plan, out, threads=1)
    before = out.read_bytes()
    with pytest.raises(StoreError, match="was made with threads 1, here it is 2: choose another --out, or --fresh"):
        calibrate(local, plan, out, threads=2)
    assert out.read_bytes() == before
    assert calibrate(local, plan, out, threads=2, fresh=True).conditions.threads == 2


def test_an_unavailable_target_is_refused(local, tmp_path) -> None:
    absent = replace(local, providers=("CUDAExecutionProvider",))
    with pytest.raises(TargetError, match="is unavailable, so there is nothing to calibrate: .*CUDAExecutionProvider"):
        calibrate(absent, PLAN, tmp_path / "table.json")
    assert not any(tmp_path.iterdir())


def test_estimates_fill_a_table_of_their_own_kind(small, local, monkeypatch, tmp_path) -> None:
    class Fake(Estimator):
        def __call__(self, body: Body, arch, frame) -> Estimate:
            if len(arch.layers) == 1:
                raise ModelError("one layer is too few")
            return Estimate(ms=1.0 + len(arch.layers), options={"tool": "1"}, caveat="not measured")

    monkeypatch.setattr(run, "is_estimated", lambda target: True)
    monkeypatch.setattr(run, "Estimator", Fake)
    plan = replace(PLAN, shapes=((1, 8),), lowerings=("int8_qdq",))
    table = calibrate(local, plan, tmp_path / "npu.json")
    assert table.conditions.kind == "vendor_estimate"
    assert {len(point.layers) for point in table.points} >= {2, 4}
    assert all(len(point.layers) > 1 for point in table.points)
    assert (table.conditions.caveat, table.conditions.options) == ("not measured", {"tool": "1"})
    found = table.predict(find_body("tiny").student.arch, lowering="int8_qdq", sequence=8)
    assert (found.kind, found.basis) == ("predicted", "vendor_estimate")
    assert found.ms == pytest.approx(5.0, rel=0.02)
