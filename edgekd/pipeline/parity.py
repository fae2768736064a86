"""Is an artifact what a student says it is? Predictions, metric, integers, scales, and the layer to blame if not."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.data import DataSpec, load_evaluation
from edgekd.errors import DataError, ModelError, StoreError
from edgekd.export.blame import EXAMPLES, blame
from edgekd.export.bundle import MANIFEST, read_manifest
from edgekd.export.matmul_nbits import bits_of, linears_by_module
from edgekd.export.nbits import WEIGHT_ONLY, Grid, grid_of_form
from edgekd.export.onnx import export_float
from edgekd.export.parity import AGREEMENT, compare, onnx_logits, open_session, require_parity, torch_logits
from edgekd.export.scales import check_scales, weights_of
from edgekd.pipeline.setup import id2label
from edgekd.quantize.forms import form_logits, weights_of_form
from edgekd.store import MANIFEST as RUN_MANIFEST
from edgekd.store import MARK as RUN_MARK
from edgekd.store import STAGE
from edgekd.student import Student, load_student, local_folder, read_config
from edgekd.tasks import get_task, infer_task

COMPARED = 256


def parity(
    source: str | Path, artifact: str | Path, spec: DataSpec, *, max_length: int | None = None, count: int = COMPARED
) -> dict[str, Any]:
    """Compare an artifact with the student folder it was made from, on data.

    Args:
        source: the student folder.
        artifact: an ONNX or TFLite file, or a bundle.
        spec: data with labels; its test split, else validation, else all of it.
        max_length: longer texts are cut, by default as in the run that made a bundle; a file with fixed shapes has
            its own length.
        count: at most so many examples are compared; the metric is of these.

    Returns:
        `agreement`, `max_abs`, `metric` of both, `scales` (see `ScaleCheck`) and `blame` (see `Blame`), both None for
        TFLite, the same in words as `said`, and `ok`: integers and scales are as trained, and as many predictions agree
        as any integer form must.

    Raises:
        ModelError: one of the two cannot be read.
        DataError: the data cannot be used or has no labels.
        StageError: the exported float graph does not say what the torch model says.
    """
    folder, file = local_folder(str(source)), _file(Path(artifact))
    max_length = max_length or _length_of_run(Path(artifact))
    task = get_task(infer_task(read_config(folder)))
    student, processor = load_student(folder, auto_class=task.auto_class), task.load_processor(folder)
    split, examples, _ = load_evaluation(spec, kind=task.kind, id2label=id2label(student.model.config))
    encoded = task.encode(processor, examples, _length(file) or max_length)
    encoded = encoded.take(np.linspace(0, len(encoded) - 1, min(count, len(encoded))).astype(np.int64))
    if encoded.labels is None:
        raise DataError("none of the examples has a label, so metrics cannot be compared; name the label column")
    expected, found = torch_logits(student.model, encoded), form_logits(file, encoded)
    outcome = compare(expected, found)
    agree = outcome.agreement >= AGREEMENT["int8"]
    told = {
        "file": file.name,
        "split": split,
        **outcome.to_dict(),
        "metric": {
            "name": task.metric,
            "torch": task.score(expected, encoded.labels),
            "artifact": task.score(found, encoded.labels),
        },
    }
    if file.suffix != ".onnx":
        return {**told, "scales": None, "blame": None, "said": [], "ok": agree}
    inside = _inside(student, task.name, file, encoded, expected)
    return {**told, **inside, "ok": agree and inside["ok"]}


def of_run(run: Path) -> tuple[Path, Path]:
    """The last student of a run and the bundle made of it.

    Raises:
        StoreError: it is no run, is not finished, has no bundle or several, or the student is gone.
        ModelError: the bundle is damaged.
    """
    if not (run / RUN_MARK).is_file():
        raise StoreError(f"{run} is not a run of `edgekd compress`: give a run, or both STUDENT and ARTIFACT")
    try:
        bundles = dict(json.loads((run / RUN_MANIFEST).read_text(encoding="utf-8"))["bundles"])
    except (OSError, ValueError, KeyError, TypeError):
        done = ", ".join(path.parent.name for path in sorted(run.glob(f"*/{STAGE}"))) or "no stage"
        raise StoreError(
            f"{run} is not finished: {RUN_MANIFEST} is missing or damaged; there is {done}. Finish it with `edgekd "
            f"compress … --out {run}`, or give both STUDENT and ARTIFACT"
        ) from None
    pairs = [(_student_of(run, run / name), run / name) for name in bundles.values()]
    if len(pairs) == 1:
        return pairs[0]
    if not pairs:
        raise StoreError(f"{run} has no bundle: no student met its budget, so there is nothing to compare")
    told = "; ".join(f"edgekd parity {student} {bundle} …" for student, bundle in pairs)
    raise StoreError(f"{run} has {len(pairs)} bundles, give one of them with its student: {told}")


def _student_of(run: Path, bundle: Path) -> Path:
    """The stage folder that the last entry of a bundle's ledger is about: of several rounds, one went on."""
    ledger = read_manifest(bundle).get("ledger") or [None]
    for record in sorted(run.glob(f"*/{STAGE}")):
        try:
            if json.loads(record.read_text(encoding="utf-8"))["entry"] == ledger[-1]:
                return record.parent
        except (OSError, ValueError, KeyError, TypeError):
            continue
    raise StoreError(
        f"the student that {bundle} was made of is not in {run} any more: run `edgekd compress … --out {run}` again, "
        "or give both STUDENT and ARTIFACT"
    )


def _inside(student: Student, task: str, file: Path, encoded: Any, expected: Any) -> dict[str, Any]:
    """What is seen in an ONNX graph itself."""
    ranges = (student.quantization or {}).get("activations") or {}
    spans = {name: (float(low), float(high)) for name, (low, high) in ranges.items()}
    checked = check_scales(file, weights_of(student.model), spans, _packed(student, file))
    with tempfile.TemporaryDirectory(prefix="edgekd-parity-") as scratch:
        graph = export_float(student, task, Path(scratch) / "float.onnx")
        require_parity(expected, onnx_logits(graph, encoded), "fp32", "the exported float graph")
        found = blame(graph, file, encoded, count=EXAMPLES)
    return {
        "ok": checked.ok,
        "scales": checked.to_dict(),
        "blame": found.to_dict(),
        "said": [checked.describe(), found.describe()],
    }


def _packed(student: Student, file: Path) -> tuple[Grid, bool] | None:
    """The grid of the weights in the file's MatMulNBits, as the student remembers it; None if it has none."""
    import onnx

    bits = {bits_of(node) for node in linears_by_module(onnx.load(file, load_external_data=False)).values()}
    form = next((form for form in WEIGHT_ONLY if WEIGHT_ONLY[form] == min(bits, default=0)), None)
    return None if form is None else grid_of_form(form, weights_of_form(student, form))


def _file(path: Path) -> Path:
    if (path / MANIFEST).is_file():
        return path / str(read_manifest(path)["artifact"]["file"])
    if path.suffix not in (".onnx", ".tflite") or not path.is_file():
        raise ModelError(f"{path} is neither an .onnx or .tflite file nor a bundle")
    return path


def _length_of_run(path: Path) -> int | None:
    return read_manifest(path).get("max_length") if (path / MANIFEST).is_file() else None


def _length(file: Path) -> int | None:
    """The fixed number of tokens of an ONNX file, None if it is free."""
    if file.suffix != ".onnx":
        return None
    [first, *_] = open_session(file).get_inputs()
    return first.shape[1] if len(first.shape) == 2 and isinstance(first.shape[1], int) else None
