from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from edgekd.constraints import remarks, require
from edgekd.context import Budget
from edgekd.errors import RecipeError
from edgekd.sparsify import Sparsify
from edgekd.sparsify.patterns import PATTERNS, pays, remark, resolve
from edgekd.sparsify.schedule import Ramp, annealed
from edgekd.stages import STAGES, build_stage
from edgekd.target import load_target
from edgekd.target_fields import SPARSITIES


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pattern": "2:5"}, r"unknown pattern '2:5' \(did you mean '2:4'\?\)"),
        ({"pattern": "2:4", "sparsity": 0.75}, "sparsity must be left out or 0.5 with the pattern 2:4"),
        ({"sparsity": 1.0}, "sparsity must be below 1"),
        ({"ramp": (0.8, 0.2)}, "ramp must be two shares"),
        ({"ramp": (0.2, 1.2)}, "ramp must be two shares"),
        ({"losses": {"squarehed": 1}}, "did you mean 'squarehead'"),
        ({"masks": "moving"}, "unknown masks 'moving'"),
    ],
)
def test_wrong_settings_are_named(settings, said):
    with pytest.raises(RecipeError, match=said):
        Sparsify(**settings)


def test_a_pattern_may_state_its_own_share():
    assert Sparsify(pattern="1:4", sparsity=0.75).sparsity == PATTERNS["1:4"].sparsity == 0.75
    assert {name: pattern.sparsity for name, pattern in PATTERNS.items() if pattern.is_grouped} == {
        "2:4": 0.5, "4:8": 0.5, "1:4": 0.75,
    }  # fmt: skip


def test_settings_are_read_as_a_recipe_has_them():
    stage = build_stage("sparsify", {"pattern": "2:4", "ramp": [0, 1], "dense": ["a.b"]})
    assert stage == Sparsify(pattern="2:4", ramp=(0, 1), dense=("a.b",))
    assert list(STAGES)[-2:] == ["quantize", "sparsify"]


def test_importing_the_settings_does_not_import_torch():
    code = "import sys, edgekd.sparsify, edgekd.sparsify.schedule; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_patterns_pay_where_a_target_says_so():
    gpu, npu, cpu = (load_target(name) for name in ("gpu-jetson-orin", "npu-ethos-u55-256", "local"))
    assert [name for name in PATTERNS if pays(name, gpu)] == ["2:4", "1:4"]
    assert all(pays(name, npu) for name in PATTERNS)
    assert not any(pays(name, cpu) for name in PATTERNS)
    assert [resolve("auto", target).name for target in (gpu, npu, cpu)] == ["2:4", "unstructured", "unstructured"]
    assert resolve("4x1", cpu).name == "4x1"


def test_every_pattern_of_target_files_is_known_here():
    from edgekd.sparsify.patterns import SERVED

    assert set(SERVED) == set(SPARSITIES)
    assert all(set(names) <= set(PATTERNS) for names in SERVED.values())


def test_a_pattern_that_does_not_pay_is_told_and_not_refused():
    gpu = load_target("gpu-jetson-orin")
    stages = {"sparsify": Sparsify(pattern="unstructured"), "quantize": STAGES["quantize"]()}
    require(gpu, Budget(), stages)
    [line] = remarks([gpu], stages)
    assert "the pattern unstructured are not known to pay on target gpu-jetson-orin (what pays there: 2:4, 1:4)" in line
    assert remarks([gpu], {"sparsify": Sparsify()}) == []
    assert "(no pattern does)" in remark("auto", load_target("local"))
    assert remarks([gpu], {}) == []


def test_what_a_pattern_does_not_fit_is_said():
    assert PATTERNS["2:4"].misfit(3, 8) == ""
    assert PATTERNS["4:8"].misfit(3, 12) == "its 12 inputs are not a multiple of 8"
    assert PATTERNS["16x1"].misfit(24, 5) == "its 24 outputs are not a multiple of 16"
    assert PATTERNS["32x32"].misfit(32, 48) == "its 48 inputs are not a multiple of 32"
    assert PATTERNS["unstructured"].misfit(3, 7) == ""


@pytest.mark.parametrize("total", [1, 2, 3, 7, 40, 1000])
def test_the_ramp_rises_cubically_from_start_to_end(total):
    ramp = Ramp(start=0.25, end=0.75, every=1)
    shares = [ramp.share(step, total) for step in range(total)]
    assert all(before <= after for before, after in itertools.pairwise(shares))
    assert shares[-1] == 1
    assert [ramp.share(step, total) > 0 for step in range(total)] == [
        step >= ramp.first(total) for step in range(total)
    ]
    assert ramp.due(ramp.last(total), total)
    assert [ramp.settled(done, total) for done in range(total + 1)] == [
        done > ramp.last(total) for done in range(total + 1)
    ]
    assert ramp.settled(total, total)
    if total == 1000:
        assert (ramp.first(total), ramp.last(total)) == (250, 750)
        done = (500 - 250 + 1) / 501
        assert shares[500] == pytest.approx(1 - (1 - done) ** 3)
        assert shares[249] == 0


def test_masks_are_set_ten_times_unless_said_otherwise():
    assert sum(Ramp(start=0.25, end=0.75, every=0).due(step, 1000) for step in range(1000)) == 11
    due = [step for step in range(100) if Ramp(start=0.2, end=0.5, every=7).due(step, 100)]
    assert due == [20, 27, 34, 41, 48, 50]


def test_the_decay_is_annealed():
    values = [annealed(step, 100, ramp=0.25, largest=2.0) for step in range(100)]
    assert values[0] == 0
    assert values[:26] == pytest.approx([2 * step / 25 for step in range(26)])
    assert set(values[25:]) == {2.0}
    assert annealed(0, 100, ramp=0.0, largest=2.0) == 2.0
