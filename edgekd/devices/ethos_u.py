"""Arm Ethos-U through Vela, Arm's ahead-of-time compiler: the command stream for the NPU, and Vela's own estimate."""

from __future__ import annotations

import configparser
import csv
import hashlib
import importlib.metadata
import importlib.util
import re
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.devices import process
from edgekd.devices.ort import Operator
from edgekd.errors import ModelError, TargetError, unknown
from edgekd.target import Target

if TYPE_CHECKING:
    from edgekd.devices import Estimate

PACKAGE = "ethos-u-vela"
INSTALL = "pip install 'edgekd[ethos-u]'"
ACCELERATORS = (
    "ethos-u55-32", "ethos-u55-64", "ethos-u55-128", "ethos-u55-256", "ethos-u65-256", "ethos-u65-512",
    "ethos-u85-128", "ethos-u85-256", "ethos-u85-512", "ethos-u85-1024", "ethos-u85-2048",
)  # fmt: skip
OPTIMISE = ("Performance", "Size")
DEFAULTS = {"config": "Arm/vela.ini", "optimise": "Performance"}
REQUIRED = ("accelerator", "system_config", "memory_mode")
SECTIONS = {"system_config": "System_Config.", "memory_mode": "Memory_Mode."}
FLAGS = {
    "accelerator": "--accelerator-config",
    "system_config": "--system-config",
    "memory_mode": "--memory-mode",
    "config": "--config",
    "optimise": "--optimise",
}
# The README of ethos-u-vela 5.2.0, "Performance information".
CAVEAT = (
    "Arm on Vela's figures: \"The cycle and bandwidth numbers should not be taken as accurate representations of real "
    "performance numbers and they should not be compared against those from other compilations that use different "
    'settings or configurations."'
)
# Columns of Vela's summary that are kept: memory in KiB, weights and traffic in bytes, clock in Hz, bandwidth in GiB/s.
FIGURES = (
    "core_clock", "arena_cache_size", "sram_bandwidth", "dram_bandwidth", "on_chip_flash_bandwidth",
    "off_chip_flash_bandwidth", "inference_time", "sram_memory_used", "dram_memory_used", "on_chip_flash_memory_used",
    "off_chip_flash_memory_used", "total_original_weights", "total_npu_encoded_weights", "sram_total_bytes",
    "dram_total_bytes", "off_chip_flash_total_bytes", "nn_macs", "cycles_npu", "cycles_sram_access",
    "cycles_dram_access", "cycles_off_chip_flash_access", "cycles_total",
)  # fmt: skip
# Left to the CPU, which Vela counts as 0 cycles, any of these would take most of the time.
HEAVY = frozenset({"BatchMatMul", "Conv2D", "DepthwiseConv2D", "FullyConnected", "TransposeConv", "Conv3D"})


def unavailable(target: Target) -> str | None:
    """Why Vela cannot be used here, or None if it can."""
    if importlib.util.find_spec("ethosu") is None or importlib.util.find_spec("ethosu.vela") is None:
        return f"Arm's compiler Vela is not installed ({INSTALL})"
    return None


def compile(target: Target, model: Path, folder: Path, *, timeout: float) -> Estimate:
    """Compile an int8 TFLite file with Vela into `folder` and take Vela's estimate of it.

    Nothing is left in `folder` unless all went well.

    Raises:
        ModelError: not a TFLite file, not int8, or Vela fails on it.
        TargetError: Vela is missing, an option is wrong, or it takes longer than `timeout` seconds.
    """
    if reason := unavailable(target):
        raise TargetError(f"target {target.name!r}: {reason}")
    options = _options(target)
    _require_tflite(model)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        said = _run_vela(command(options, model.resolve(), Path(scratch)), model, Path(scratch), timeout)
        summary, layers = _tables(model, Path(scratch), said)
        rows = operators(layers, clock=float(summary["core_clock"]))
        _require_int8(model, rows, said)
        compiled = folder / f"{model.stem}_vela.tflite"
        (Path(scratch) / compiled.name).replace(compiled)
    from edgekd.devices import Estimate

    return Estimate(
        ms=float(summary["inference_time"]) * 1000,
        cycles=float(summary["cycles_total"]),
        files=(compiled,),
        operators=rows,
        figures={name: float(summary[name]) for name in FIGURES if name in summary},
        options=_provenance(options),
        caveat=CAVEAT,
        notes=_notes(rows, summary, said),
    )


def command(options: Mapping[str, str], model: Path, output: Path) -> list[str]:
    """The command line of Vela for checked options."""
    given = [part for key, flag in FLAGS.items() for part in (flag, options[key])]
    reports = ["--verbose-performance", "--show-cpu-operations"]
    return [sys.executable, "-m", "ethosu.vela", str(model), *given, "--output-dir", str(output), *reports]


def operators(layers: Sequence[Mapping[str, str]], *, clock: float) -> tuple[Operator, ...]:
    """Rows of Vela's per-layer table by the operator of the model they come from, and by where they run.

    One operator may become several on the NPU: `calls` counts those. What runs on the CPU has no time.
    """
    cycles: dict[tuple[str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str], int] = defaultdict(int)
    for row in layers:
        kind = row["Original Operator"]
        key = ("an operator Vela does not name" if kind == "None" else kind, row["Target"])
        cycles[key] += float(row["Op Cycles"])
        calls[key] += 1
    whole = sum(cycles.values()) or 1.0
    rows = [
        Operator(
            kind, place, calls[kind, place], *((own / clock * 1000, own / whole) if place == "NPU" else (None,) * 2)
        )
        for (kind, place), own in cycles.items()
    ]
    return tuple(sorted(rows, key=lambda row: (row.provider != "CPU", -(row.ms or 0.0), row.type)))


def _options(target: Target) -> dict[str, str]:
    options = {**DEFAULTS, **{key: str(value) for key, value in target.options.items()}}
    if missing := [key for key in REQUIRED if key not in options]:
        raise TargetError(
            f"target {target.name!r} does not say {', '.join(missing)} in its options; Vela's estimate depends on them"
        )
    for key, choices in (("accelerator", ACCELERATORS), ("optimise", OPTIMISE)):
        if options[key] not in choices:
            raise TargetError(f"target {target.name!r}: {unknown(key, options[key], choices)}")
    file = _config_file(target, options["config"])
    sections = configparser.ConfigParser()
    sections.read(file, encoding="utf-8")
    for key, start in SECTIONS.items():
        names = [name.removeprefix(start) for name in sections.sections() if name.startswith(start)]
        if options[key] not in names:
            raise TargetError(f"target {target.name!r}: {unknown(key, options[key], names)} (in {options['config']})")
    _require_same_series(target, options)
    return {**options, "config": options["config"] if file.is_relative_to(_shipped_configs()) else str(file)}


def _require_same_series(target: Target, options: Mapping[str, str]) -> None:
    """Refuse a U85's memory system around a U55 and the like, which Vela computes without a word."""
    system, own = options["system_config"], "Ethos_" + options["accelerator"].split("-")[1].upper()
    if re.match(r"Ethos_U\d+_", system) and not system.startswith(own):
        raise TargetError(
            f"target {target.name!r}: system_config {system!r} does not describe an {options['accelerator']}; "
            f"choose one that starts with {own}"
        )


def _shipped_configs() -> Path:
    spec = importlib.util.find_spec("ethosu")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0] if places else ".").resolve() / "config_files"


def _config_file(target: Target, name: str) -> Path:
    """The configuration file that Vela would read: `Folder/name.ini` is one of those it brings, else a path."""
    path = Path(name).expanduser()
    if len(path.parts) == 2 and path.parts[0] not in (".", "..", "/"):
        path = _shipped_configs() / path
    if path.suffix != ".ini" or not path.is_file():
        shipped = sorted(f"{file.parent.name}/{file.name}" for file in _shipped_configs().glob("*/*.ini"))
        raise TargetError(
            f"target {target.name!r}: there is no Vela configuration {name!r}; "
            f"give the path of an .ini file or one of: {', '.join(shipped)}"
        )
    return path.resolve()


def _provenance(options: Mapping[str, str]) -> dict[str, str]:
    """The options, the contents of the configuration file and the version of Vela, without places on this machine."""
    file = Path(options["config"])
    digest = hashlib.sha256((file if file.is_absolute() else _shipped_configs() / file).read_bytes()).hexdigest()
    shown = file.name if file.is_absolute() else options["config"]
    return {**options, "config": shown, "config_sha256": digest, PACKAGE: importlib.metadata.version(PACKAGE)}


def _require_tflite(model: Path) -> None:
    if not model.is_file():
        raise ModelError(f"there is no model file {model}")
    with model.open("rb") as file:
        start = file.read(8)
    if start[4:] != b"TFL3":
        raise ModelError(f"{model} is not a TFLite file; Vela compiles the form int8_tflite")


def _run_vela(line: Sequence[str], model: Path, folder: Path, timeout: float) -> str:
    """All that Vela said, among it what it leaves to the CPU and why."""
    try:
        done = subprocess.run(
            line, env=process.environment(1), cwd=folder, capture_output=True, timeout=timeout, check=False, text=True,
            errors="replace", stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TargetError(f"compiling {model} took Vela longer than {timeout:.0f} s and was stopped") from None
    if done.returncode:
        how = f"crashed ({signal.Signals(-done.returncode).name})" if done.returncode < 0 else "failed"
        raise ModelError(f"Vela {how} on {model}{_tail(done.stderr or done.stdout)}")
    return done.stdout + done.stderr


def _tables(model: Path, scratch: Path, said: str) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The row of Vela's summary and those of its per-layer table."""
    found = {kind: sorted(scratch.glob(f"*_{kind}*.csv")) for kind in ("summary", "per-layer")}
    tables = {}
    for kind, files in found.items():
        if not files:
            raise ModelError(f"Vela wrote no {kind} table for {model}{_tail(said)}")
        with files[0].open(encoding="utf-8", newline="") as file:
            tables[kind] = list(csv.DictReader(file))
    needed = {"summary": ("core_clock", "inference_time", "cycles_total"),
              "per-layer": ("Original Operator", "Target", "Op Cycles")}  # fmt: skip
    for kind, rows in tables.items():
        if not rows or (lacking := [name for name in needed[kind] if name not in rows[0]]):
            what = ", ".join(lacking) if rows else "rows"
            raise ModelError(f"the {kind} table of Vela for {model} has no {what}; edgekd knows {PACKAGE} 5")
    return tables["summary"][0], tables["per-layer"]


def _require_int8(model: Path, rows: Sequence[Operator], said: str) -> None:
    """An estimate without the layers that matter is worse than none."""
    left = [row for row in rows if row.provider == "CPU" and row.type in HEAVY]
    done = [row for row in rows if row.provider == "NPU" and row.type in HEAVY]
    if left or not done:
        names = _listed(left or [row for row in rows if row.provider == "CPU"])
        reason = "; ".join(_reasons(said)[:3])
        raise ModelError(
            f"Vela leaves {names or 'everything'} of {model} to the CPU and would count it as 0 cycles"
            f"{f' ({reason})' if reason else ''}; give it an int8 model (the form int8_tflite)"
        )


def _notes(rows: Sequence[Operator], summary: Mapping[str, str], said: str) -> tuple[str, ...]:
    left = [row for row in rows if row.provider == "CPU"]
    count = round(sum(row.calls for row in left))
    notes = []
    if left:
        notes.append(
            f"{count} operators stay on the CPU of the board and are counted as 0 cycles: {_listed(left)}"
            + "".join(f"; {reason}" for reason in _reasons(said)[:3])
        )
    notes.append(
        "activation ranges come from the TFLite converter's own calibration, not from quantization-aware training"
    )
    used, most = (float(summary.get(name) or 0) for name in ("sram_memory_used", "arena_cache_size"))
    if used > most > 0:
        notes.append(f"it uses {used:,.0f} KiB of SRAM, more than the {most:,.0f} KiB of the memory mode")
    return tuple(notes)


def _listed(rows: Sequence[Operator]) -> str:
    return ", ".join(f"{row.calls:.0f} {row.type}" for row in rows)


def _reasons(said: str) -> list[str]:
    """Why operators stay on the CPU, in Vela's words, without the names of tensors."""
    found = [line.removeprefix("Reason: ").split(" (")[0].strip() for line in said.splitlines() if "Reason: " in line]
    return list(dict.fromkeys(found))


def _tail(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()][-6:]
    return "\n  " + "\n  ".join(lines) if lines else " and said nothing"
