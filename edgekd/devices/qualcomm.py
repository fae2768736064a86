"""Qualcomm's HTP through onnxruntime-qnn: a context binary for the device, and the compiler's own latency estimate.

No device is needed or used. Only documented options are set and only the CSV is read.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.devices import process
from edgekd.devices.ort import Operator
from edgekd.errors import ModelError, StageError, TargetError
from edgekd.target import Target

if TYPE_CHECKING:
    from edgekd.devices import Estimate

PROVIDER = "QNNExecutionProvider"
ESTIMATED_SOCS = ("52", "62", "63", "72", "77", "95", "114")
"""Numbers of the chips for which onnxruntime-qnn 2.7 prints an estimate; others (57, 60, 69, …) it only compiles."""
PINNED = {"htp_graph_finalization_optimization_mode": "0"}
"""Options that move the estimate, at the vendor's defaults; the target's `provider_options` go before them."""
OWN_OPTIONS = ("backend_path", "soc_model", "profiling_level", "profiling_file_path")
CAVEAT = (
    'Printed by Qualcomm\'s compiler under "Performance Estimates" as "Simulated (Accelerator exec time us)": a '
    "simulation of the HTP alone, without the host, the transfers or other load. No device was run."
)
CYCLES = "Simulated (Accelerator exec cycles)"
TIME = "Simulated (Accelerator exec time us)"
LOWER = "Simulated (Accelerator exec time us (lower estimate))"
UPPER = "Simulated (Accelerator exec time us (upper estimate))"
MISSING = "Missing Ops"
WORKER = Path(__file__).with_name("qualcomm_worker.py")
REFUSED = re.compile(r"\{\s*name:\s*(?P<name>[^,{}]*),\s*type:\s*(?P<type>[^,{}\s]+)\s*\}")


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A model compiled for one chip: the files for it, the vendor's figures (empty for most chips) and what made it."""

    files: tuple[Path, ...]
    figures: Mapping[str, float]
    options: Mapping[str, str]


def unavailable(target: Target) -> str | None:
    """Why there is no estimate for the target here, or None if there is one."""
    if importlib.util.find_spec("onnxruntime_qnn") is None:
        return "onnxruntime-qnn is not installed: pip install 'edgekd[qualcomm]'"
    if not (soc := _soc(target)):
        return "the target's options name no soc"
    if soc not in ESTIMATED_SOCS:
        return (
            f"Qualcomm's compiler prints no estimate for soc {soc} (it does for {', '.join(ESTIMATED_SOCS)}); "
            "a model can be compiled for it, and measured on the device"
        )
    return None


def compile(target: Target, model: Path, folder: Path, *, timeout: float) -> Estimate:
    """Compile and read the estimate: `ms` is the vendor's central figure, with the vendor's bounds.

    Args:
        target: names the chip (`soc`) and further provider options.
        model: ONNX file with static shapes, int8 or int16 QDQ or float.
        folder: the context binary and the ONNX file that wraps it are written here, and only if all went well.
        timeout: seconds.

    Raises:
        ModelError: free dimensions, operators that QNN refuses, or that its simulator has no costs for.
        TargetError: no estimate is to be had for the target, or it takes too long.
    """
    if reason := unavailable(target):
        raise TargetError(f"target {target.name!r}: {reason}")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = build(target, model, Path(scratch), timeout=timeout)
        figures = made.figures
        if TIME not in figures:
            raise TargetError(f"target {target.name!r}: onnxruntime-qnn printed no estimate for {model}")
        require_whole(figures, model)
        files = tuple(file.rename(folder / file.name) for file in made.files)
    from edgekd.devices import Estimate

    return Estimate(
        ms=figures[TIME] / 1000,
        low_ms=_thousandth(figures, LOWER),
        high_ms=_thousandth(figures, UPPER),
        cycles=figures.get(CYCLES),
        files=files,
        operators=_operators(model),
        figures=figures,
        options=made.options,
        caveat=CAVEAT,
    )


def build(target: Target, model: Path, folder: Path, *, timeout: float) -> Compiled:
    """Compile into `folder` for any chip that QNN knows, with or without an estimate.

    Raises:
        ModelError, TargetError: as `compile`; nothing is left in the folder then.
    """
    _require_static(model)
    wrapper = folder / f"{model.stem}_ctx.onnx"
    profile = folder / "profile.csv"
    provider = {**PINNED, **target.options.get("provider_options", {}), "soc_model": _soc(target)}
    if taken := sorted(set(target.options.get("provider_options", {})) & set(OWN_OPTIONS)):
        raise TargetError(f"target {target.name!r}: provider_options may not set {', '.join(taken)}")
    session = {
        "session.disable_cpu_ep_fallback": "1",
        "ep.context_enable": "1",
        "ep.context_file_path": str(wrapper.resolve()),
        "ep.context_embed_mode": "0",
    }
    request = {
        "model": str(model.resolve()),
        "session": session,
        "provider": {**provider, "profiling_level": "basic", "profiling_file_path": str(profile.resolve())},
    }
    profile.unlink(missing_ok=True)  # the provider appends
    try:
        versions = _run(request, model, folder, timeout)
        files = tuple(sorted(folder.glob(f"{wrapper.stem}*")))
        if wrapper not in files or len(files) < 2:
            raise StageError(f"onnxruntime-qnn wrote no context binary for {model}")
        figures = read_profile(profile.read_text(encoding="utf-8")) if profile.is_file() else {}
    except BaseException:
        for file in folder.glob(f"{wrapper.stem}*"):
            file.unlink()
        raise
    finally:
        profile.unlink(missing_ok=True)
    kept = {key: value for key, value in session.items() if key != "ep.context_file_path"}
    return Compiled(files=files, figures=figures, options={**provider, **kept, **versions})


def read_profile(text: str) -> dict[str, float]:
    """The estimates in a profile of QNN, by the vendor's names: times in µs, cycles, bytes.

    Raises:
        ModelError: the profile is of several graphs, so that no figure in it is the model's.
        StageError: the text is no such profile.
    """
    rows = list(csv.DictReader(text.splitlines()))
    if not rows or not {"Message", "Time", "Event Level", "Event Identifier"} <= set(rows[0]):
        raise StageError(f"expected a profile of QNN, got {text[:80]!r}")
    figures: dict[str, float] = {}
    for row in rows:
        name = row["Event Identifier"].strip()
        # ROOT rows are headings and the time that compiling took, which is not about the model.
        if row["Event Level"] != "SUB-EVENT" or row["Message"] != "BACKEND":
            continue
        if name in figures:
            raise ModelError("QNN split the model into several graphs, and its estimates do not add up to one figure")
        figures[name] = float(row["Time"])
    return figures


def require_whole(figures: Mapping[str, float], model: Path) -> None:
    """Refuse an estimate that leaves operators out.

    Raises:
        ModelError: the number of operators without costs is not 0, or not told.
    """
    counts = [value for name, value in figures.items() if name.startswith(MISSING)]
    if not counts:
        raise ModelError(f"QNN's profile of {model} does not say how many operators have no costs: no estimate")
    if counts[0]:
        raise ModelError(
            f"Qualcomm's simulator has no costs for {counts[0]:.0f} operators of {model} (Missing Ops), so its "
            "estimate leaves them out; rewrite them (known: Where and Cast to bool, which int8_qdq keeps out of masks)"
        )


def _run(request: Mapping[str, Any], model: Path, folder: Path, timeout: float) -> dict[str, str]:
    asked, answered = folder / "request.json", folder / "result.json"
    asked.write_text(json.dumps({**request, "result": str(answered.resolve())}), encoding="utf-8")
    try:
        done = subprocess.run(
            [sys.executable, str(WORKER), str(asked.resolve())], cwd=folder, env=process.environment(1),
            capture_output=True, timeout=timeout, check=False, text=True, errors="replace", stdin=subprocess.DEVNULL,
        )  # fmt: skip
        answer = json.loads(answered.read_text(encoding="utf-8")) if answered.is_file() else None
    except subprocess.TimeoutExpired:
        raise TargetError(f"Qualcomm's compiler took longer than {timeout:.0f} s on {model} and was stopped") from None
    finally:
        asked.unlink(missing_ok=True)
        answered.unlink(missing_ok=True)
    if answer is None:
        raise ModelError(f"Qualcomm's compiler crashed (exit code {done.returncode}) on {model}{_tail(done.stderr)}")
    if answer["error"]:
        raise _explained(answer["error"], done.stderr, model)
    return dict(answer["versions"])


def _explained(error: str, stderr: str, model: Path) -> Exception:
    """What a failed compilation means for the user."""
    refused = refused_operators(stderr)
    if not refused and "fallback to CPU EP" in error and "failed with error" not in stderr:
        # Where QNN runs nothing at all, it names nothing.
        refused = {row.type: [] for row in _operators(model)}
    if refused:
        shown = "; ".join(f"{kind} {_few(names)}".strip() for kind, names in refused.items())
        return ModelError(
            f"QNN does not run all of {model} on the HTP: {shown}; lower it with int8_qdq or int16_qdq, "
            "or replace these operators"
        )
    if "INVALID_CONFIG" in stderr or "Failed to create device" in stderr:
        return TargetError(f"QNN refuses the target's options{_tail(stderr)}")
    return ModelError(f"Qualcomm's compiler refuses {model}: {error}{_tail(stderr)}")


def refused_operators(stderr: str) -> dict[str, list[str]]:
    """Operators the provider says it does not support: names of nodes by type of operator."""
    found: dict[str, list[str]] = {}
    for line in stderr.splitlines():
        if "Unsupported nodes in QNN EP" in line:
            for match in REFUSED.finditer(line):
                if match["type"].startswith(PROVIDER):
                    continue  # what it had compiled before it came to the others
                names = found.setdefault(match["type"], [])
                if match["name"].strip() not in names:
                    names.append(match["name"].strip())
    return found


def _require_static(model: Path) -> None:
    import onnx

    try:
        graph = onnx.load(str(model), load_external_data=False).graph
    except Exception as error:
        raise ModelError(f"{model} is not an ONNX model: {error}") from error
    initial = {tensor.name for tensor in graph.initializer}
    shapes = {value.name: value.type.tensor_type.shape.dim for value in graph.input if value.name not in initial}
    free = [
        f"{name} [{', '.join(str(dim.dim_value or dim.dim_param or '?') for dim in dims)}]"
        for name, dims in shapes.items()
        if any(not dim.dim_value for dim in dims)
    ]
    if free:
        raise ModelError(
            f"{model} needs static shapes: {', '.join(free)}; give a batch and a sequence length when lowering it"
        )


def _operators(model: Path) -> tuple[Operator, ...]:
    """All operators run on the HTP, or the model would have been refused; the simulator does not time them."""
    import onnx

    counts = Counter(node.op_type for node in onnx.load(str(model), load_external_data=False).graph.node)
    return tuple(Operator(kind, PROVIDER, float(count), None, None) for kind, count in counts.most_common())


def _soc(target: Target) -> str:
    return str(target.options.get("soc", ""))


def _few(names: list[str]) -> str:
    return f"({', '.join(names[:2])}{', …' * (len(names) > 2)})" if names else ""


def _thousandth(figures: Mapping[str, float], name: str) -> float | None:
    return figures[name] / 1000 if name in figures else None


def _tail(stderr: str) -> str:
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in stderr.splitlines() if line.strip()][-4:]
    return "\n  " + "\n  ".join(line[:300] for line in lines) if lines else ""
