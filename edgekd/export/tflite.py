"""int8 TFLite for NPUs that take nothing else (Arm Ethos-U), made from the torch model.

Weights and activations have 8 bits, shapes are fixed. Weights that training has put on an integer grid keep their
integers. Ranges of activations are calibrated anew on the feeds: those that training learned are not carried over, as
the converter has operators of its own. Word tables have 8 bits too, but looking words up stays on the CPU of the board.
Padding has to be behind the text.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from edgekd.errors import ModelError, RecipeError, StageError, TargetError
from edgekd.export.parity import Logits, Parity, compare
from edgekd.student import SECTION, Student
from edgekd.tasks import get_task

Feeds = Mapping[str, npt.NDArray[Any]]

INSTALL = "pip install 'edgekd[ethos-u]'"
PACKAGES = ("litert_torch", "ai_edge_quantizer", "ai_edge_litert")
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
TIMEOUT = 1800.0
WORKER = ("-m", "edgekd.export.tflite_worker")


class Converter:
    """A process that converts models one after the other: its libraries take as long to load as a model to convert.

    Use it with `with`; `export_tflite` starts one of its own unless it is given one.
    """

    def __init__(self, *, timeout: float = TIMEOUT) -> None:
        """Each model may take `timeout` seconds."""
        self._timeout = timeout
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[str] | None = None

    def __enter__(self) -> Converter:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process; it starts again with the next request."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        if self._log is not None:
            self._log.close()
        self._process = self._log = None

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request of `edgekd.export.tflite_worker` and return its answer.

        Raises:
            RecipeError: the converter is not installed.
            TargetError: it takes too long.
            StageError: its process ends without an answer.
        """
        process = self._started()
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self._timeout, stop)
        timer.start()
        try:
            if process.stdin is not None:
                process.stdin.write(json.dumps(dict(request)) + "\n")
                process.stdin.flush()
            line = process.stdout.readline() if process.stdout is not None else ""
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            said = self._last_words()
            self.close()
            if late.is_set():
                raise TargetError(f"the conversion to TFLite took longer than {self._timeout:.0f} s and was stopped")
            raise StageError(f"the process that converts to TFLite ended without an answer{said}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _started(self) -> subprocess.Popen[str]:
        require_packages()
        if self._process is None:
            self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed in close()
            self._process = subprocess.Popen(
                [sys.executable, *WORKER],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, encoding="utf-8",
                env={**os.environ, "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"},
            )  # fmt: skip
        return self._process

    def _last_words(self) -> str:
        if self._log is None:
            return ""
        self._log.seek(0)
        lines = [line.rstrip() for line in self._log if line.strip()][-6:]
        return "\n  " + "\n  ".join(lines) if lines else " and said nothing"


def require_packages() -> None:
    """Refuse to go on without the converter.

    Raises:
        RecipeError: a package of the extra is not installed.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(f"int8_tflite needs {', '.join(missing)}, not installed here: {INSTALL}")


def export_tflite(
    student: Student,
    task: str,
    feeds: Sequence[Feeds],
    output: Path,
    *,
    batch: int = 1,
    sequence: int | None = None,
    converter: Converter | None = None,
    seconds: dict[str, float] | None = None,
    wide: bool | None = False,
    told: dict[str, Any] | None = None,
) -> Path:
    """Write the student as int8 TFLite for one shape of its inputs.

    Args:
        student: any shapes, in memory; it is not changed.
        task: a task name, for instance `text-classification`.
        feeds: calibration inputs, unpadded or padded; text is padded with 0 or cut to `sequence`. Token types are an
            input of the file only if some feed has a 1 in them.
        output: the file to write, `….tflite`; nothing is left behind if it fails.
        batch: number of examples of one inference.
        sequence: tokens of each; needed for text.
        converter: the process to use, when there are many models to convert.
        seconds: takes the time of each step.
        wide: whether layer norms and the residual sums before them have activations of 16 bits; None: only if the
            logits are too noisy with 8, and better then. All Ethos-U take both, 16 bits cost some latency.
        told: takes what `wide` came to.

    Raises:
        RecipeError: the converter is not installed, or there are no feeds or not those the model takes.
        TargetError: it takes too long.
        StageError: the model cannot be converted; the message names the operator, if it is one.
    """
    require_packages()
    arrays = calibration(feeds, batch=batch, sequence=sequence)
    ready = nullcontext(converter) if converter is not None else Converter()
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch, ready as process:
        work = Path(scratch)
        _save(student, work / "model")
        np.savez(work / "feeds.npz", **arrays)  # type: ignore[arg-type]  # its stub takes the names for options
        answer = process.ask(
            {
                "model": str(work / "model"), "feeds": str(work / "feeds.npz"), "output": str(work / "int8.tflite"),
                "auto_class": get_task(task).auto_class, "batch": batch, "wide": wide,
            }
        )  # fmt: skip
        if "error" in answer:
            at = f" at {answer['operator']}" if answer.get("operator") else ""
            raise StageError(f"the conversion of {student.arch.describe()} to TFLite failed{at}: {answer['error']}")
        (work / "int8.tflite").replace(output)
    output.chmod(0o644)
    if seconds is not None:
        seconds.update(answer["seconds"])
    if told is not None:
        told["wide"] = bool(answer["wide"])
    return output


def calibration(feeds: Sequence[Feeds], *, batch: int, sequence: int | None) -> dict[str, npt.NDArray[Any]]:
    """All feeds as one array by input name, `[N, …]`, of the shapes and integer type the file takes.

    Raises:
        RecipeError: there are none, no `sequence` for text, or fewer rows than a batch has.
    """
    if not feeds:
        raise RecipeError("int8_tflite needs calibration data, and there is none")
    names = [name for name in feeds[0] if name in (*TEXT_INPUTS, "pixel_values")]
    if not names:
        raise RecipeError(
            f"int8_tflite knows the inputs {', '.join(TEXT_INPUTS)} and pixel_values, got {list(feeds[0])}"
        )
    arrays = {name: np.concatenate([_shaped(name, feed[name], sequence) for feed in feeds]) for name in names}
    if "token_type_ids" in arrays and not arrays["token_type_ids"].any():
        del arrays["token_type_ids"]
    if len(arrays[names[0]]) < batch:
        raise RecipeError(f"int8_tflite for batch {batch} needs at least as many examples, got {len(arrays[names[0]])}")
    return arrays


def tflite_logits(file: Path, feeds: Sequence[Feeds]) -> Logits:
    """Logits `[N, C]` of a TFLite file on this machine's CPU, with TFLite's own kernels.

    Args:
        file: a file of `export_tflite`; its fixed batch is filled up with copies of the last row.
        feeds: inputs by name, unpadded or padded; text is padded with 0 or cut to the file's length.

    Raises:
        RecipeError: the interpreter is not installed.
        ModelError: the file cannot be read, or takes an input that is not among the feeds.
    """
    require_packages()
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    try:
        # Without delegates: the plain kernels are the ones that boards' runtimes are compared with.
        interpreter = Interpreter(
            str(file), experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        )
        run = interpreter.get_signature_runner()
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{file} cannot be read as TFLite: {error}") from None
    inputs, [result] = run.get_input_details(), run.get_output_details().values()
    if missing := [name for name in inputs if name not in feeds[0]]:
        raise ModelError(f"{file} takes {', '.join(inputs)}, but {', '.join(missing)} is not given")
    arrays = {
        name: np.concatenate([_shaped(name, feed[name], int(item["shape"][-1])) for feed in feeds])
        for name, item in inputs.items()
    }
    count, batch = len(next(iter(arrays.values()))), int(result["shape"][0])
    rows = []
    for start in range(0, count, batch):
        chosen = np.minimum(np.arange(start, start + batch), count - 1)
        given = {name: _quantized(array[chosen], inputs[name]) for name, array in arrays.items()}
        [answer] = run(**given).values()
        rows.append(_dequantized(answer, result)[: count - start])
    return np.concatenate(rows)


def tflite_parity(student: Student, file: Path, feeds: Sequence[Feeds]) -> Parity:
    """How far the file's logits are from the torch model's on the same inputs, and how often both agree."""
    import torch

    rows = []
    with torch.no_grad():
        for feed in feeds:
            rows.append(student.model.eval()(**{name: torch.from_numpy(value) for name, value in feed.items()}).logits)
    return compare(torch.cat(rows).float().numpy(), tflite_logits(file, feeds))


def _shaped(name: str, value: npt.NDArray[Any], sequence: int | None) -> npt.NDArray[Any]:
    """One input as the file takes it. Calibration only looks at ranges, so a text that is too long may be cut."""
    if name not in TEXT_INPUTS:
        return value.astype(np.float32)
    if sequence is None:
        raise RecipeError("int8_tflite has fixed shapes: say how many tokens (`sequence`)")
    cut = value[:, :sequence].astype(np.int32)
    return np.pad(cut, ((0, 0), (0, sequence - cut.shape[1])))


def _quantized(value: npt.NDArray[Any], item: Mapping[str, Any]) -> npt.NDArray[Any]:
    scale, zero = item["quantization"]
    kind = np.dtype(item["dtype"])
    if not scale or kind.kind == "f":
        return value.astype(kind)
    limits = np.iinfo(kind)
    steps: npt.NDArray[Any] = np.clip(np.round(value / scale) + zero, limits.min, limits.max)
    return steps.astype(kind)


def _dequantized(value: npt.NDArray[Any], item: Mapping[str, Any]) -> Logits:
    scale, zero = item["quantization"]
    real = value.astype(np.float32)
    return (real - zero) * np.float32(scale) if scale else real


def _save(student: Student, folder: Path) -> None:
    """Hand the model over as a folder, and leave its config as it was."""
    config = student.model.config
    kept = vars(config).get(SECTION)
    try:
        # Shapes are read anew: who shrank a word table for timing need not have written that down.
        own = student.with_model(student.model)
        replace(own, plan=None, quantization=None, processor_dir=None).save(folder)
    finally:
        vars(config).pop(SECTION, None)
        if kept is not None:
            setattr(config, SECTION, kept)
