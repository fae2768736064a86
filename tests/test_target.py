from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from edgekd import host, target
from edgekd.cli import main
from edgekd.errors import TargetError
from edgekd.target import list_targets, load_target, parse, probe, shipped_targets_dir
from edgekd.target_fields import FACTS

WRONG = """\
title: 3
thread: 2
precisions: [fp31]
fast_precisions: [int8]
runtime: other
runtime: onnxruntime
budget: {latency_p95: 4}
threads: 0
reach: shh
options: {graph_optimisation: all}
requires: [avx3]
shapes: [static]
memory_mb: many
reduce_range: 1
providers: CPUExecutionProvider
sparsity: ["2:5"]
7: seven
"""
RIGHT = "title: A board\nruntime: onnxruntime\ndevice: cpu\nprecisions: [fp32, int8]\nsource: its datasheet\n"


@pytest.mark.parametrize("name", list_targets())
def test_every_shipped_target_is_valid_and_probes(name: str) -> None:
    found = probe(load_target(name))
    assert found.name == name
    assert found.threads
    assert found.to_probe == ()
    assert set(found.fast_precisions) <= set(found.precisions)
    assert found.source
    json.dumps(found.to_dict())


def test_all_mistakes_are_told_at_once_with_their_lines() -> None:
    with pytest.raises(TargetError) as caught:
        parse(WRONG, Path("mine.yaml"))
    message = str(caught.value)
    for expected in (
        "line 1: title: expected text, got 3",
        "line 2: unknown key 'thread' (did you mean 'threads'?)",
        "line 3: precisions: unknown precision 'fp31' (did you mean 'fp32'?)",
        "line 6: the key 'runtime' appears twice",
        "line 7: budget: unknown budget 'latency_p95' (did you mean 'latency_p95_ms'?)",
        "line 8: threads: expected a whole number of at least 1, got 0",
        "line 9: reach: expected local, or one of ssh, adb with its settings, got 'shh'",
        "line 10: options: unknown option of onnxruntime 'graph_optimisation' (did you mean 'graph_optimization'?)",
        "line 11: requires: unknown CPU feature 'avx3' (did you mean 'avx2'?)",
        "line 12: shapes: unknown kind of shapes",
        "line 13: memory_mb: expected a whole number",
        "line 14: reduce_range: expected true or false, got 1",
        "line 15: providers: expected a list of names",
        "line 16: sparsity: unknown sparsity pattern '2:5' (did you mean '2:4'?)",
        "line 17: unknown key '7'",
        "missing key 'device'",
        "missing key 'source'",
    ):
        assert expected in message
    assert message.startswith("mine.yaml has 17 mistakes:")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("a: 2024-99-99", "is not valid YAML"),
        ("- a", "expected `key: value` lines, got list"),
        ("", "expected `key: value` lines, got NoneType"),
        (RIGHT + "fast_precisions: [fp16]\n", "line 6: fp16 is fast but not among 'precisions'"),
        ("runtime: !!python/object:os.system {}", "is not valid YAML"),
        (RIGHT + "title: probe\n", "appears twice"),
        (RIGHT + "cpus: [1, 1]\n", "line 6: cpus: expected every CPU once, got [1, 1]"),
    ],
)
def test_other_broken_files_are_explained(text: str, message: str) -> None:
    with pytest.raises(TargetError, match=message.replace("[", r"\[")):
        parse(text, Path("mine.yaml"))


def test_a_target_is_found_by_path_then_here_then_among_the_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "local.yaml").write_text(RIGHT)
    (tmp_path / "targets" / "board.yaml").write_text(RIGHT)
    assert load_target("local").title == "A board"
    assert load_target(tmp_path / "targets" / "board.yaml").name == "board"
    assert {"board", "local", "cpu-x86-vnni"} <= set(list_targets())
    with pytest.raises(TargetError, match=r"unknown target 'bord' \(did you mean 'board'\?\)"):
        load_target("bord")
    with pytest.raises(TargetError, match=r"there is no target file other\.yaml"):
        load_target("other.yaml")


def test_an_installed_package_finds_its_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "__file__", str(tmp_path / "edgekd" / "target.py"))
    (tmp_path / "edgekd" / "_targets").mkdir(parents=True)
    assert shipped_targets_dir() == tmp_path / "edgekd" / "_targets"
    (tmp_path / "edgekd" / "_targets").rmdir()
    assert shipped_targets_dir() == tmp_path / "targets"


@pytest.mark.parametrize(
    ("features", "fast", "reduce_range"),
    [
        ({"avx2", "avx512_vnni"}, ("fp32", "int8"), False),
        ({"avx2", "avx_vnni"}, ("fp32", "int8"), False),
        ({"avx2", "avx512f"}, ("fp32",), True),
        ({"neon", "dotprod"}, ("fp32", "int8"), False),
        ({"neon"}, ("fp32",), False),
        (set(), ("fp32",), False),
    ],
)
def test_int8_is_fast_where_there_is_a_dot_product(
    features: set[str], fast: tuple[str, ...], reduce_range: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "cpu_features", lambda: frozenset(features))
    found = probe(load_target("local"))
    assert (found.fast_precisions, found.reduce_range) == (fast, reduce_range)


def test_probing_changes_only_what_is_left_open() -> None:
    fixed = parse(RIGHT + "threads: 3\n", Path("board.yaml"))
    found = probe(fixed)
    assert {**vars(found), "features": ()} == {**vars(fixed), "features": ()}


def test_the_fingerprint_follows_the_content_not_the_place() -> None:
    one, two, other = (
        parse(text, path)
        for text, path in (
            (RIGHT, Path("a/b.yaml")),
            (RIGHT, Path("c/b.yaml")),
            (RIGHT + "threads: 2\n", Path("a/b.yaml")),
        )
    )
    assert one.fingerprint == two.fingerprint != other.fingerprint


def test_targets_are_listed_shown_and_checked(tmp_path: Path) -> None:
    listed = CliRunner().invoke(main, ["targets", "--json"])
    assert [row["name"] for row in json.loads(listed.stdout)["targets"]] == list_targets()
    assert "local" in CliRunner().invoke(main, ["targets"]).stdout
    shown = json.loads(CliRunner().invoke(main, ["targets", "show", "local", "--json"]).stdout)
    assert shown["available"] is True
    assert shown["host"]["cores"] >= 1
    assert "CPUExecutionProvider" in CliRunner().invoke(main, ["targets", "show", "local"]).stdout
    (tmp_path / "wrong.yaml").write_text(WRONG)
    checked = CliRunner().invoke(main, ["targets", "check", str(tmp_path / "wrong.yaml")])
    assert checked.exit_code == 2
    assert "has 17 mistakes" in checked.stderr
    (tmp_path / "right.yaml").write_text(RIGHT)
    assert CliRunner().invoke(main, ["targets", "check", str(tmp_path / "right.yaml")]).exit_code == 0
    (tmp_path / "right.yaml").write_text(RIGHT.replace("onnxruntime", "onnx"))
    assert (
        "unknown runtime 'onnx'" in CliRunner().invoke(main, ["targets", "check", str(tmp_path / "right.yaml")]).stderr
    )


@pytest.mark.parametrize("name", [path.stem for path in shipped_targets_dir().glob("*.yaml")])
def test_every_fact_of_a_shipped_target_has_a_source(name: str) -> None:
    path = shipped_targets_dir() / f"{name}.yaml"
    stated = set(yaml.safe_load(path.read_text(encoding="utf-8")))
    sources = load_target(path).sources
    assert stated & set(FACTS) <= set(sources), f"no source for {sorted(stated & set(FACTS) - set(sources))}"
    assert all("/work" not in text and "/tmp" not in text for text in sources.values())


def test_a_source_must_be_of_a_key_in_the_file() -> None:
    with pytest.raises(TargetError, match="line 6: sources: 'memory' is not a key of this file"):
        parse(RIGHT + "sources: {precisions: its datasheet, memory: a guess}\n", Path("mine.yaml"))


def test_a_target_without_forms_has_those_of_its_precisions() -> None:
    cpu = parse(RIGHT, Path("box.yaml"))
    weights = ("int8_weights", "int4_weights")
    lean, others = ("int8_dynamic_lean", "int8_static_lean"), ("int8_dynamic", "int8_static")
    floats = ("fp32_fused", "fp32_lean", "fp32")
    assert cpu.forms == ("int8_dynamic_fused", *lean, *others, *floats, *weights)
    assert parse(RIGHT.replace(", int8", ""), Path("box.yaml")).forms == (*floats, *weights)
    gpu = RIGHT.replace("device: cpu", "device: gpu").replace("[fp32, int8]", "[fp32, fp16]")
    assert parse(gpu, Path("box.yaml")).forms == ("fp16", "fp32_fused", "fp32")
    assert parse(RIGHT + "lowerings: [fp32]\n", Path("box.yaml")).forms == ("fp32",)


def test_every_target_says_how_its_latency_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = json.loads(CliRunner().invoke(main, ["targets", "--json"]).stdout)["targets"]
    kinds = {row["name"]: row["latency"] for row in rows}
    assert kinds["local"] == "measured"
    assert set(kinds.values()) <= {"measured", "vendor_estimate", "unavailable"}
    assert all(row["reason"] for row in rows if row["latency"] == "unavailable")
    orin = next(row for row in rows if row["name"] == "gpu-jetson-orin")
    assert "reach: {ssh: {host: …}}" in orin["reason"]
