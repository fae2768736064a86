"""Vela: its command line, its tables, its refusals, and, where it is installed, what it makes of real files."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd import devices
from edgekd.devices import Estimate, ethos_u
from edgekd.errors import ModelError, TargetError
from edgekd.target import Target, load_target

OPTIONS = {
    "accelerator": "ethos-u85-512", "system_config": "Ethos_U85_SYS_DRAM_Mid", "memory_mode": "Dedicated_Sram",
}  # fmt: skip
INI = """
[System_Config.Ethos_U85_SYS_DRAM_Mid]
core_clock=1e9
[System_Config.Ethos_U55_High_End_Embedded]
core_clock=500e6
[System_Config.Board]
core_clock=400e6
[Memory_Mode.Dedicated_Sram]
arena_mem_area=Axi1
[Memory_Mode.Shared_Sram]
arena_mem_area=Axi0
"""
# The columns are those of ethos-u-vela 5.2.0; the figures are made up.
SUMMARY = {
    "experiment": "default", "network": "m", "accelerator_configuration": "Ethos_U85_512",
    "system_config": "Ethos_U85_SYS_DRAM_Mid", "memory_mode": "Dedicated_Sram", "core_clock": "1000000000.0",
    "arena_cache_size": "384.0", "sram_bandwidth": "29.8", "inferences_per_second": "400.0", "batch_size": "1",
    "inference_time": "0.0025", "sram_memory_used": "435.0625", "dram_memory_used": "9978.67",
    "off_chip_flash_memory_used": "0.0", "total_original_weights": "10775040",
    "total_npu_encoded_weights": "9833904", "nn_macs": "700935424", "cycles_npu": "2400000",
    "cycles_total": "2500000",
}  # fmt: skip
LAYERS = [
    ("EmbeddingLookup", "Passthrough", "CPU", 0),
    ("Quantize", "Passthrough", "CPU", 0),
    ("Quantize", "Passthrough", "CPU", 0),
    ("None", "Passthrough", "CPU", 0),
    ("FullyConnected", "FullyConnected", "NPU", 1_500_000),
    ("FullyConnected", "FullyConnected", "NPU", 500_000),
    ("Softmax", "LUT", "NPU", 500_000),
]
SAID = """
Warning (supported operators) operator: QUANTIZE, ofm: 'a/b;2_quantized'
Reason: Operation has tensor with unsupported DataType Float32 (a/b;2)
Feature-map dataTypes must be one of {"BOOL", "INT8"}

Warning (supported operators) operator: EMBEDDING_LOOKUP, ofm: 'a'
Reason: Unsupported opType
"""


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    """An Ethos-U target, with Vela's configuration files in a folder of the test."""
    shipped = tmp_path / "config_files"
    (shipped / "Arm").mkdir(parents=True)
    (shipped / "Arm" / "vela.ini").write_text(INI)
    monkeypatch.setattr(ethos_u, "_shipped_configs", lambda: shipped)
    monkeypatch.setattr(ethos_u, "unavailable", lambda target: None)
    monkeypatch.setattr(ethos_u.importlib.metadata, "version", lambda name: {"ethos-u-vela": "5.2.0"}[name])
    return Target(name="u85", title="", runtime="ethos-u", device="npu", precisions=("int8",), options=OPTIONS)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    file = tmp_path / "m.tflite"
    file.write_bytes(b"\x1c\x00\x00\x00TFL3" + bytes(100))
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "out"
    made.mkdir()
    return made


def table(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def layer_rows(layers: list[tuple[str, str, str, int]]) -> list[dict[str, Any]]:
    names = ("Original Operator", "NNG Operator", "Target", "Op Cycles")
    return [{**dict(zip(names, row, strict=True)), "Name": "x,y;z"} for row in layers]


def fake_vela(monkeypatch: Any, *, layers: Any = LAYERS, summary: Any = SUMMARY, code: int = 0, err: str = "") -> list:
    """Stand in for Vela: write its tables where it was told to; return the command lines."""
    lines: list[list[str]] = []

    def run(line: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        lines.append(line)
        if code == 0:
            out = Path(line[line.index("--output-dir") + 1])
            (out / f"m_summary_{OPTIONS['system_config']}.csv").write_text(table([summary]))
            (out / "m_per-layer.csv").write_text(table(layer_rows(layers)))
            (out / "m_vela.tflite").write_bytes(b"compiled")
        return subprocess.CompletedProcess(line, code, SAID, err)

    monkeypatch.setattr(ethos_u.subprocess, "run", run)
    return lines


def test_it_is_the_compiler_of_its_targets() -> None:
    assert devices.compiler_of(load_target("npu-ethos-u85-512")) is ethos_u
    assert devices.is_estimated(load_target("npu-ethos-u55-256"))


def test_a_missing_vela_is_named_with_the_way_to_it(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = load_target("npu-ethos-u85-512")
    find = importlib.util.find_spec
    monkeypatch.setattr(ethos_u.importlib.util, "find_spec", lambda name: None if "ethosu" in name else find(name))
    assert "pip install 'edgekd[ethos-u]'" in str(devices.unavailable(target))
    with pytest.raises(TargetError, match=r"Vela is not installed \(pip install"):
        ethos_u.compile(target, model, folder, timeout=1)


def test_the_tables_become_an_estimate(target: Target, model: Path, folder: Path, monkeypatch: Any) -> None:
    lines = fake_vela(monkeypatch)
    estimate = ethos_u.compile(target, model, folder, timeout=9)
    assert len(lines) == 1
    assert (estimate.ms, estimate.cycles) == (2.5, 2_500_000)
    assert estimate.files == (folder / "m_vela.tflite",)
    assert estimate.files[0].read_bytes() == b"compiled"
    assert [path.name for path in folder.iterdir()] == ["m_vela.tflite"]
    assert estimate.figures["total_npu_encoded_weights"] == 9833904
    assert estimate.figures["sram_memory_used"] == 435.0625
    digest = hashlib.sha256(INI.encode()).hexdigest()
    assert estimate.options == {
        **OPTIONS, "config": "Arm/vela.ini", "optimise": "Performance", "config_sha256": digest,
        "ethos-u-vela": "5.2.0",
    }  # fmt: skip
    assert "should not be taken as accurate representations of real performance" in estimate.caveat
    assert "should not be compared" in estimate.caveat


def test_operators_are_summed_by_type_and_place() -> None:
    rows = {(row.type, row.provider): row for row in ethos_u.operators(layer_rows(LAYERS), clock=1e9)}
    dense = rows["FullyConnected", "NPU"]
    assert (dense.calls, dense.ms, dense.share) == (2, 2.0, 0.8)
    assert rows["Softmax", "NPU"].share == 0.2
    left = rows["Quantize", "CPU"]
    assert (left.calls, left.ms, left.share) == (2, None, None)
    assert ("an operator Vela does not name", "CPU") in rows


def test_what_stays_on_the_cpu_is_told(target: Target, model: Path, folder: Path, monkeypatch: Any) -> None:
    fake_vela(monkeypatch)
    notes = ethos_u.compile(target, model, folder, timeout=9).notes
    assert notes[0].startswith("4 operators stay on the CPU of the board and are counted as 0 cycles: ")
    for part in ("1 EmbeddingLookup", "2 Quantize", "unsupported DataType Float32", "Unsupported opType"):
        assert part in notes[0]
    assert any("calibration, not from quantization-aware training" in note for note in notes)
    assert notes[-1] == "it uses 435 KiB of SRAM, more than the 384 KiB of the memory mode"


def test_nothing_is_said_of_the_cpu_when_all_is_on_the_npu(
    target: Target, model: Path, folder: Path, monkeypatch: Any
) -> None:
    fake_vela(monkeypatch, layers=LAYERS[4:], summary={**SUMMARY, "arena_cache_size": "1024.0"})
    notes = ethos_u.compile(target, model, folder, timeout=9).notes
    assert [note for note in notes if "CPU" in note or "SRAM" in note] == []


@pytest.mark.parametrize(
    "layers",
    [[("FullyConnected", "Passthrough", "CPU", 0), ("Reshape", "MemoryCopy", "NPU", 10)], LAYERS[:4],
     [*LAYERS, ("Conv2D", "Passthrough", "CPU", 0)]],
)  # fmt: skip
def test_a_model_whose_work_stays_on_the_cpu_is_refused(
    target: Target, model: Path, folder: Path, monkeypatch: Any, layers: Any
) -> None:
    fake_vela(monkeypatch, layers=layers)
    with pytest.raises(ModelError, match=r"to the CPU and would count it as 0 cycles .*give it an int8 model"):
        ethos_u.compile(target, model, folder, timeout=9)
    assert list(folder.iterdir()) == []


def test_the_command_line_holds_every_option(target: Target, model: Path, folder: Path, monkeypatch: Any) -> None:
    lines = fake_vela(monkeypatch)
    ethos_u.compile(replace(target, options={**OPTIONS, "optimise": "Size"}), model, folder, timeout=9)
    [line] = lines
    assert line[:4] == [sys.executable, "-m", "ethosu.vela", str(model)]
    pairs = dict(zip(line[4::2], line[5::2], strict=False))
    assert pairs["--accelerator-config"] == "ethos-u85-512"
    assert pairs["--system-config"] == "Ethos_U85_SYS_DRAM_Mid"
    assert pairs["--memory-mode"] == "Dedicated_Sram"
    assert pairs["--config"] == "Arm/vela.ini"
    assert pairs["--optimise"] == "Size"


def test_a_configuration_of_ones_own(
    target: Target, model: Path, folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "board.ini").write_text(INI + "; mine\n")
    lines = fake_vela(monkeypatch)
    own = replace(target, options={**OPTIONS, "config": str(tmp_path / "board.ini"), "system_config": "Board"})
    estimate = ethos_u.compile(own, model, folder, timeout=9)
    assert str(tmp_path / "board.ini") in lines[0]
    assert estimate.options["config"] == "board.ini"
    assert estimate.options["config_sha256"] == hashlib.sha256((INI + "; mine\n").encode()).hexdigest()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"accelerator": "ethos-u85-513"}, r"'ethos-u85-513' \(did you mean 'ethos-u85-512'\?\).*u55-32"),
        ({"accelerator": "ethos-u55-256"}, r"'Ethos_U85_SYS_DRAM_Mid' does not describe an ethos-u55-256.*Ethos_U55"),
        ({"system_config": "Ethos_U85_SYS_DRAM_Mod"}, r"did you mean 'Ethos_U85_SYS_DRAM_Mid'\?.*\(in Arm/vela\.ini\)"),
        ({"memory_mode": "Dedicated"}, r"unknown memory_mode 'Dedicated'.*Shared_Sram"),
        ({"optimise": "Speed"}, "unknown optimise 'Speed'.*Performance, Size"),
        ({"config": "Arm/other.ini"}, r"no Vela configuration 'Arm/other\.ini'.*one of: Arm/vela\.ini"),
        ({"config": "/nowhere/board.ini"}, r"no Vela configuration '/nowhere/board\.ini'"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(
    target: Target, model: Path, folder: Path, monkeypatch: Any, changed: dict[str, str], message: str
) -> None:
    lines = fake_vela(monkeypatch)
    with pytest.raises(TargetError, match=message):
        ethos_u.compile(replace(target, options={**OPTIONS, **changed}), model, folder, timeout=9)
    assert not lines


def test_options_that_decide_are_not_guessed(target: Target, model: Path, folder: Path) -> None:
    with pytest.raises(TargetError, match="does not say system_config, memory_mode in its options"):
        ethos_u.compile(replace(target, options={"accelerator": "ethos-u85-512"}), model, folder, timeout=9)


def test_what_is_not_tflite_is_refused(target: Target, tmp_path: Path, folder: Path, monkeypatch: Any) -> None:
    lines = fake_vela(monkeypatch)
    (tmp_path / "m.onnx").write_bytes(b"\x08\x07 something else")
    with pytest.raises(ModelError, match=r"m\.onnx is not a TFLite file"):
        ethos_u.compile(target, tmp_path / "m.onnx", folder, timeout=9)
    with pytest.raises(ModelError, match="there is no model file"):
        ethos_u.compile(target, tmp_path / "gone.tflite", folder, timeout=9)
    assert not lines


def test_a_failing_vela_is_quoted(target: Target, model: Path, folder: Path, monkeypatch: Any) -> None:
    fake_vela(monkeypatch, code=1, err="Traceback\nRuntimeError: Compilation failed: no networks\n")
    with pytest.raises(ModelError, match="Vela failed on .*m.tflite\n(?s:.*)no networks"):
        ethos_u.compile(target, model, folder, timeout=9)
    fake_vela(monkeypatch, code=-11)
    with pytest.raises(ModelError, match=r"Vela crashed \(SIGSEGV\) on "):
        ethos_u.compile(target, model, folder, timeout=9)
    assert list(folder.iterdir()) == []


def test_a_table_of_another_vela_is_refused(target: Target, model: Path, folder: Path, monkeypatch: Any) -> None:
    fake_vela(monkeypatch, summary={name: SUMMARY[name] for name in SUMMARY if name != "cycles_total"})
    with pytest.raises(
        ModelError, match=r"the summary table of Vela .* has no cycles_total; edgekd knows ethos-u-vela 5"
    ):
        ethos_u.compile(target, model, folder, timeout=9)


def test_a_slow_vela_is_stopped(target: Target, model: Path, folder: Path, monkeypatch: Any) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(ethos_u, "command", lambda *arguments: sleep)
    with pytest.raises(TargetError, match="took Vela longer than 1 s and was stopped"):
        ethos_u.compile(target, model, folder, timeout=1)
    assert list(folder.iterdir()) == []


TARGETS = ("npu-ethos-u55-256", "npu-ethos-u65-512", "npu-ethos-u85-512")


@pytest.fixture(scope="module")
def files(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """int8 TFLite of a tiny model of each kind."""
    pytest.importorskip("litert_torch")
    pytest.importorskip("ethosu.vela")
    from edgekd.export.tflite import Converter, export_tflite
    from edgekd.student import load_student

    folder, made = tmp_path_factory.mktemp("tflite"), {}
    generator = np.random.default_rng(0)
    with Converter() as converter:
        for kind, task, auto in (("bert", "text", "Sequence"), ("vit", "image", "Image"), ("resnet", "image", "Image")):
            student = load_student(make_model(kind), auto_class=f"AutoModelFor{auto}Classification")
            ids = generator.integers(5, 40, (8, 16))
            pixels = generator.normal(size=(8, 1, 8, 8)).astype(np.float32)
            feeds = (
                {"input_ids": ids, "attention_mask": np.ones_like(ids)} if kind == "bert" else {"pixel_values": pixels}
            )
            made[kind] = export_tflite(
                student, f"{task}-classification", [feeds], folder / f"{kind}.tflite", sequence=16, converter=converter
            )
    return made


@pytest.mark.device
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kind", ["bert", "vit", "resnet"])
def test_real_files_are_estimated(files: dict[str, Path], tmp_path: Path, kind: str, name: str) -> None:
    estimate = ethos_u.compile(load_target(name), files[kind], tmp_path, timeout=300)
    assert estimate.ms > 0
    assert estimate.cycles
    assert sum(row.ms or 0.0 for row in estimate.operators) == pytest.approx(estimate.ms)
    assert estimate.files[0].read_bytes()[4:8] == b"TFL3"
    assert estimate.figures["total_npu_encoded_weights"] > 0
    on_cpu = {row.type for row in estimate.operators if row.provider == "CPU"}
    assert ("EmbeddingLookup" in on_cpu) == (kind == "bert")
    assert bool(on_cpu) == any("stay on the CPU" in note for note in estimate.notes)
    assert not on_cpu & ethos_u.HEAVY
    assert list(tmp_path.iterdir()) == list(estimate.files)


@pytest.mark.device
def test_the_same_file_gets_the_same_estimate(files: dict[str, Path], tmp_path: Path) -> None:
    def once(part: str) -> Estimate:
        (tmp_path / part).mkdir()
        return ethos_u.compile(load_target(TARGETS[-1]), files["bert"], tmp_path / part, timeout=300)

    first, second = once("a"), once("b")
    assert (first.ms, first.cycles, first.figures, first.operators) == (
        second.ms, second.cycles, second.figures, second.operators,
    )  # fmt: skip
    assert first.files[0].read_bytes() == second.files[0].read_bytes()


@pytest.mark.device
def test_a_float_file_and_a_damaged_one_are_refused(make_model: Any, files: dict[str, Path], tmp_path: Path) -> None:
    code = (
        "import sys, torch, litert_torch\n"
        "module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()\n"
        "litert_torch.convert(module, (torch.zeros(1, 8),)).export(sys.argv[1])\n"
    )
    file = tmp_path / "float.tflite"
    subprocess.run([sys.executable, "-c", code, str(file)], check=True, capture_output=True)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ModelError, match=r"Vela leaves 2 FullyConnected of .*to the CPU.*give it an int8 model"):
        ethos_u.compile(load_target(TARGETS[-1]), file, out, timeout=300)
    damaged = tmp_path / "damaged.tflite"
    damaged.write_bytes(files["bert"].read_bytes()[:4000])
    with pytest.raises(ModelError, match="Vela (crashed|failed)"):
        ethos_u.compile(load_target(TARGETS[-1]), damaged, out, timeout=300)
    assert list(out.iterdir()) == []
