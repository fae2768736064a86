from __future__ import annotations

from pathlib import Path

import pytest

from edgekd import constraints, devices, host
from edgekd.constraints import CONVERTERS, budget_of, constraint_mistakes, require
from edgekd.context import Budget
from edgekd.errors import RecipeError
from edgekd.prune import Prune
from edgekd.quantize import CHOICES, Quantize, candidates
from edgekd.recipe import load_recipe
from edgekd.search import Search
from edgekd.target import Target, list_targets, load_target, probe

RECIPE = """\
teacher: someone/teacher
data: {{path: sklearn:digits}}
targets: [{target}]
budget:
  size_mb: 10
{budget}
stages:
  - prune: {{layers: [0]}}
  - quantize:
      lowering: {lowering}
"""


@pytest.fixture
def write(tmp_path: Path):
    def make(target: str, *, budget: str = "  batch: 1", lowering: str = "auto") -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_text(RECIPE.format(target=target, budget=budget, lowering=lowering))
        return file

    return make


@pytest.fixture
def converters(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if what writes TFLite were installed."""
    monkeypatch.setattr(constraints, "CONVERTERS", {"int8_tflite": ()})


def messages(budget: Budget, stages: dict, *targets: str) -> str:
    return "\n".join(mistake.text for mistake in constraint_mistakes(budget, stages, targets))


@pytest.mark.usefixtures("converters")
def test_a_form_that_the_target_does_not_run_is_told_with_its_line(write) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write("npu-ethos-u55-256", lowering="int8_dynamic", budget="  batch: 2"))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "recipe.yaml:6: budget.batch: target npu-ethos-u55-256 takes at most 1 example(s) at once; got 2" in lines[0]
    assert "recipe.yaml:10: stages.quantize.lowering: target npu-ethos-u55-256 needs static shapes and int8" in lines[1]
    assert "your recipe asks quantize.lowering: int8_dynamic; choose one of: auto, int8_tflite" in lines[1]


@pytest.mark.parametrize(
    ("target", "lowering", "good"),
    [
        ("gpu-cuda", "int8", False),
        ("gpu-cuda", "fp16", True),
        ("gpu-jetson-orin", "int8_static", False),
        ("gpu-jetson-orin", "int8", True),
        ("npu-qualcomm-qcs9100", "int16_qdq", True),
        ("npu-qualcomm-qcs9100", "fp16", False),
        ("npu-ethos-u85-512", "int8_tflite", True),
        ("local", "int8_tflite", False),
        ("local", "int8_static", True),
        ("cpu-arm64-pi5", "fp16", False),
    ],
)
@pytest.mark.usefixtures("converters")
def test_every_form_is_held_against_the_targets_own(target: str, lowering: str, good: bool) -> None:
    found = messages(Budget(), {"quantize": Quantize(lowering=lowering)}, target)
    assert (found == "") == good
    assert good or f"your recipe asks quantize.lowering: {lowering}" in found


@pytest.mark.parametrize("name", list_targets())
@pytest.mark.usefixtures("converters")
def test_every_shipped_target_can_be_built_for_with_the_default_settings(name: str) -> None:
    assert messages(Budget(), {"quantize": Quantize()}, name) == ""
    assert set(candidates("auto", probe(load_target(name)))) <= {*CHOICES, "fp32_lean", "fp32_fused", "fp32"}


@pytest.mark.usefixtures("converters")
def test_a_target_without_float_forms_needs_quantize() -> None:
    said = messages(Budget(), {"prune": Prune(layers=[0])}, "npu-ethos-u85-512")
    assert "needs static shapes and int8, and no stage quantizes: add `- quantize: {}`" in said
    assert messages(Budget(), {"prune": Prune(layers=[0])}, "gpu-jetson-orin") == ""


def test_a_form_that_nothing_here_can_write_is_told_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "CONVERTERS", {"int8_tflite": ("no_such_package",)})
    said = messages(Budget(), {"quantize": Quantize()}, "npu-ethos-u85-512")
    assert "cannot be made here without no_such_package: pip install 'edgekd[ethos-u]'" in said


def test_the_packages_are_those_the_converter_asks_for() -> None:
    from edgekd.export.lower import NOT_FROM_ONNX
    from edgekd.export.tflite import PACKAGES

    assert set(CONVERTERS) == set(NOT_FROM_ONNX)
    assert CONVERTERS["int8_tflite"] == PACKAGES


def test_threads_and_memory_are_held_against_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "logical_cpus", lambda: (0, 1))
    assert messages(Budget(threads=2), {}, "local") == ""
    assert "local has 2 CPUs to run on; got 3" in messages(Budget(threads=3), {}, "local")
    assert "cpu-arm64-rk3588 has 4 CPUs to run on; got 5" in messages(Budget(threads=5), {}, "cpu-arm64-rk3588")
    assert "has 4096 MiB of memory in all; got 5000 MB" in messages(Budget(size_mb=5000), {}, "gpu-jetson-orin")


def test_a_latency_that_cannot_be_known_is_refused_at_the_start(write) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write("cpu-arm64-rk3588", budget="  speedup: 4"))
    message = str(caught.value)
    assert "recipe.yaml:6: budget.speedup: this cannot be judged, because target cpu-arm64-rk3588 gives no" in message
    assert "rockchip,rk3588" in message
    assert "`reach: {ssh: {host: …}}`" in message
    assert "give size_mb instead and cut to a fixed shape with prune" in message
    assert load_recipe(write("cpu-arm64-rk3588")).budget.size_mb == 10
    assert messages(Budget(speedup=4), {"search": Search(table="mine.json")}, "cpu-arm64-rk3588") == ""


def test_a_board_is_known_by_its_device_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    pi = load_target("cpu-arm64-pi5")
    assert "raspberrypi,5-model-b" in str(devices.unavailable(pi))
    monkeypatch.setattr(host, "board", lambda: "Raspberry Pi 5 Model B Rev 1.0 raspberrypi,5-model-b brcm,bcm2712")
    monkeypatch.setattr(host, "cpu_features", lambda: frozenset({"neon", "dotprod"}))
    assert devices.unavailable(pi) is None
    monkeypatch.setattr(host, "cpu_features", lambda: frozenset({"neon"}))
    assert devices.unavailable(pi) == "this CPU has no dotprod"


def test_the_names_of_a_device_tree_are_read_without_their_zero_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "proc" / "device-tree"
    folder.mkdir(parents=True)
    assert host.board(tmp_path) == ""
    (folder / "model").write_bytes(b"Radxa ROCK 5B\0")
    (folder / "compatible").write_bytes(b"radxa,rock-5b\0rockchip,rk3588\0")
    assert host.board(tmp_path) == "Radxa ROCK 5B radxa,rock-5b rockchip,rk3588"


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a target file of this machine with a budget of its own into ./targets."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "targets").mkdir()

    def make(name: str, budget: str) -> Target:
        text = (
            f"title: A box\nruntime: onnxruntime\ndevice: cpu\nprecisions: [fp32, int8]\nsource: me\nbudget: {budget}\n"
        )
        (tmp_path / "targets" / f"{name}.yaml").write_text(text)
        return load_target(name)

    return make


def test_a_budget_is_filled_from_the_target_where_the_recipe_says_nothing(box, write) -> None:
    box("box", "{latency_p95_ms: 20, batch: 2, sequence: 128}")
    text = write("box", budget="  threads: 1")
    assert load_recipe(text).budget == Budget(size_mb=10, batch=2, sequence=128, threads=1)
    text.write_text(text.read_text().replace("  size_mb: 10\n", ""))
    assert load_recipe(text).budget == Budget(latency_p95_ms=20, batch=2, sequence=128, threads=1)
    own = load_recipe(text, ["budget.speedup=2", "budget.sequence=32"]).budget
    assert own == Budget(speedup=2, batch=2, sequence=32, threads=1)
    again = load_recipe(text).to_yaml()
    text.write_text(again)
    assert load_recipe(text).to_yaml() == again


def test_a_recipe_without_a_budget_takes_the_targets(box, write) -> None:
    box("box", "{latency_p95_ms: 20}")
    text = write("box")
    text.write_text(text.read_text().replace("budget:\n  size_mb: 10\n  batch: 1\n", ""))
    assert load_recipe(text).budget == Budget(latency_p95_ms=20)


def test_targets_that_disagree_leave_it_to_the_recipe(box, write) -> None:
    box("one", "{sequence: 128}")
    box("two", "{sequence: 32}")
    with pytest.raises(RecipeError, match=r"the targets' own sequence differ \(one: 128, two: 32\): give sequence"):
        load_recipe(write("one, two"))
    assert load_recipe(write("one, two", budget="  sequence: 64")).budget.sequence == 64


def test_commands_take_the_targets_budget_too(box) -> None:
    target = box("box", "{latency_p95_ms: 20, sequence: 128}")
    assert budget_of(target, {"batch": None, "threads": 2}) == Budget(latency_p95_ms=20, sequence=128, threads=2)
    assert budget_of(target, {"speedup": 3, "sequence": 16}) == Budget(speedup=3, sequence=16)


def test_single_stages_are_held_to_the_target_as_well() -> None:
    target = probe(load_target("gpu-cuda"))
    with pytest.raises(RecipeError, match=r"needs fp16 or fp32; your recipe asks quantize\.lowering: int8_qdq"):
        require(target, Budget(), {"quantize": Quantize(lowering="int8_qdq")})
    require(target, Budget(), {"prune": Prune(layers=[0])})


def test_a_target_file_with_mistakes_is_told_beside_the_others(box, write, tmp_path: Path) -> None:
    box("box", "{sequence: 128}")
    (tmp_path / "targets" / "box.yaml").write_text("title: A box\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:3: targets\[0\]: (?s:.)*missing key 'runtime'"):
        load_recipe(write("box"))
