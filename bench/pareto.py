"""edgekd beside other tools on one task: accuracy on the test split against speedup over the fp32 teacher.

    python bench/pareto.py                                        # digits, with a teacher made on the spot
    python bench/pareto.py TEACHER --data DIR --work FOLDER --edgekd RUN_OR_BUNDLE … --name movies
    taskset -c 1 python bench/pareto.py TEACHER --data DIR --work FOLDER --phase measure --cpus 1 --threads 1

Contestants (`--peers`; `bench/peers/make_*.py` says how each is made, as its documentation advises):

    teacher          the plain float32 export in ONNX Runtime, the baseline
    ort              ONNX Runtime: its transformer optimizer, dynamic int8 after that, static int8 in QDQ form
    openvino         OpenVINO's float32, and NNCF's post-training quantization, with free and with fixed shapes
    olive            Olive: conversion, transformer optimization and quantization in one workflow
    inc              neural-compressor's ONNX quantization, dynamic and static
    kd               half of the layers, plain logit distillation, then ONNX Runtime's dynamic int8
    edgekd           finished runs or bundles (`--edgekd`), or made here (`--make-edgekd SPEEDUP …`)

Peers start from the same teacher (the same float ONNX, or its folder) and the same calibration examples of the training
split, each in an environment of its own that is made on first use (`--environments`). One that fails stays as a row
with its reason.

All artifacts run in one process, pinned, in turns: a block is one artifact on `--picked` examples of the test split at
evenly spaced quantiles of length, one at a time. `padded` examples have `--sequence` tokens with the mask of their own
length; `data` are as long as they are, but in artifacts with fixed shapes, which get the padded ones. Accuracy is that
of the same inputs, over the whole test split. A speedup is the ratio of median times (for `data` of the mean over the
examples of a block) with a 95 % interval over blocks.

Phases: `make` the artifacts, `score` them, `measure`, `report`. What is finished stays in the work folder: the same
command goes on. Results go to bench/results/pareto-NAME.json, .csv and .svg.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import digits_teacher, fingerprint, require_own_work
from peers.report import report

HERE = Path(__file__).parent
PEERS: dict[str, tuple[str, ...]] = {
    "ort": ("ort_fused", "ort_dynamic", "ort_static", "ort_static_matmul"),
    "openvino": ("openvino_float", "openvino_float_fixed", "nncf", "nncf_fixed"),
    "olive": ("olive_dynamic", "olive_static"),
    "inc": ("inc_dynamic", "inc_static"),
    "kd": ("kd_3", "kd_6"),
}
ENVIRONMENTS = {"openvino": "openvino", "olive": "olive", "inc": "neural_compressor"}
"""Requirements (`bench/peers/….txt`) of the peers that do not run beside edgekd."""
TEXT_ONLY = ("olive",)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", nargs="?", type=Path)
    parser.add_argument("--data", default="sklearn:digits")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-pareto"))
    parser.add_argument("--environments", type=Path, help="where peers are installed [default: in the work folder]")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--edgekd", nargs="*", type=Path, default=[], metavar="RUN_OR_BUNDLE")
    parser.add_argument("--make-edgekd", nargs="*", type=float, default=[], metavar="SPEEDUP")
    parser.add_argument("--kd-epochs", nargs="+", type=int, choices=(3, 6), default=[3, 6])
    parser.add_argument("--kd-rates", nargs="+", type=float, default=[5e-5, 1e-4, 2e-4])
    parser.add_argument("--calibration", type=int, default=300)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--lengths", nargs="+", choices=("padded", "data"), default=["padded", "data"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="0: all cores")
    parser.add_argument("--cpus", nargs="+", type=int, help="stay on these [default: the quietest]")
    parser.add_argument("--picked", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=120)
    parser.add_argument("--seconds", type=float, default=900.0, help="most that one measurement takes")
    parser.add_argument("--examples", type=int, help="draw only so many training examples, for all contestants")
    parser.add_argument("--limit", type=int, help="score this many test examples only, to try it out")
    parser.add_argument("--phase", choices=("make", "score", "measure", "report", "all"), default="all")
    parser.add_argument("--name", default="digits")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    options.work = options.work.resolve()
    options.environments = (options.environments or options.work / "environments").resolve()
    if options.teacher is None:
        options.teacher = Path(digits_teacher(options.work / "teacher", options.data))
    own = {name: getattr(options, name) for name in ("data", "calibration", "sequence", "limit")}
    own |= {} if options.examples is None else {"examples": options.examples}
    require_own_work(options.work, {"teacher": fingerprint(str(options.teacher)), **own})
    setup = prepared(options)
    if setup.task.kind != "text":
        options.peers = [peer for peer in options.peers if peer not in TEXT_ONLY]
        options.lengths = ["data"]
    if options.phase in ("make", "all"):
        make_all(options, setup)
    if options.phase in ("score", "all"):
        score_all(options, setup)
    if options.phase in ("measure", "all"):
        for threads in options.threads:
            for lengths in options.lengths:
                measure(options, setup, lengths, threads)
    if options.phase in ("report", "all"):
        report(options, contestants(options, setup))
    return 0


def prepared(options: argparse.Namespace) -> Any:
    from edgekd.context import Silent
    from edgekd.data import DataSpec
    from edgekd.pipeline.setup import prepare

    return prepare(options.teacher, DataSpec(path=options.data, seed=0, limit=options.examples), progress=Silent())


# Inputs: the same files of numbers for every tool.


def make_inputs(options: argparse.Namespace, setup: Any) -> None:
    """All splits as the teacher reads them, and the calibration examples, padded and as long as they are."""
    chosen = np.random.default_rng(0).permutation(len(setup.train))[: options.calibration]
    folder = options.work / "inputs"
    for split in ("train", "validation", "test") if "kd" in options.peers else ("test",):
        write_inputs(options, setup, split, folder)
    write_inputs(options, setup, "train", folder, name="calibration", chosen=chosen)


def write_inputs(
    options: argparse.Namespace,
    setup: Any,
    split: str,
    folder: Path,
    *,
    processor: Any = None,
    name: str = "",
    chosen: Any = None,
) -> None:
    """One split, `padded` to the sequence length and in its own lengths (`data`), as .npz files."""
    from edgekd.files import publish

    labels = getattr(setup, split).labels
    chosen = np.arange(len(labels)) if chosen is None else chosen
    if split == "test":
        chosen = chosen[: options.limit]
    folder.mkdir(parents=True, exist_ok=True)
    for form in ("padded", "data") if setup.task.kind == "text" else ("data",):
        file = folder / f"{name or split}-{form}.npz"
        if file.is_file():
            continue
        longest = options.sequence if form == "padded" else None
        encoded = setup.task.encode(processor or setup.processor, setup.raw[split], longest).take(chosen)
        arrays = collated(encoded, options.sequence if form == "padded" else None)
        draft = file.with_suffix(".draft.npz")
        np.savez(draft, labels=labels[chosen], padded=np.array(form == "padded"), **arrays)
        publish(draft, file)


def collated(encoded: Any, length: int | None) -> dict[str, Any]:
    """All examples in one batch; texts as long as `length`, or the longest."""
    places = np.arange(len(encoded), dtype=np.int64)
    width = {} if length is None else {"length": length}
    batch = encoded.collate(places, **width)
    return {name: values.numpy() for name, values in batch.items() if name != "labels"}


# Artifacts.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """One artifact, or (`file` None) the reason why there is none; `inputs` is the folder of its test split."""

    name: str
    peer: str
    facts: dict[str, Any]
    file: Path | None
    inputs: Path

    @property
    def engine(self) -> str:
        return str(self.facts.get("engine", "onnxruntime"))

    @property
    def size_bytes(self) -> int | None:
        """The file and what belongs to it (.bin, external data)."""
        if self.file is None:
            return None
        return sum(each.stat().st_size for each in self.file.parent.glob(f"{self.file.stem}.*"))

    def examples(self, lengths: str) -> Path:
        """The inputs it gets where `lengths` are asked; images have no others than `data`."""
        padded = self.inputs / "test-padded.npz"
        return padded if self.facts.get("fixed") and padded.is_file() else self.inputs / f"test-{lengths}.npz"

    def logits(self, lengths: str) -> str:
        """The name of the file with what it says to those."""
        return f"{self.name}-{self.examples(lengths).stem.removeprefix('test-')}.npz"


def make_all(options: argparse.Namespace, setup: Any) -> None:
    """The float graph, the inputs, and what every peer makes of them."""
    make_inputs(options, setup)
    teacher_graph(options, setup)
    for peer in options.peers:
        names = names_of(options, peer)
        left = [name for name in names if not (options.work / name / "facts.json").is_file()]
        if left:
            make(options, peer, left)
    for speedup in options.make_edgekd:
        make_edgekd(options, speedup)


def names_of(options: argparse.Namespace, peer: str) -> list[str]:
    """The artifacts of a peer; for KD only the asked epochs."""
    return [name for name in PEERS[peer] if peer != "kd" or int(name.removeprefix("kd_")) in options.kd_epochs]


def teacher_graph(options: argparse.Namespace, setup: Any) -> Path:
    from edgekd.export.onnx import export_float

    file = Path(options.work / "teacher.onnx")
    return file if file.is_file() else export_float(setup.teacher, setup.task.name, file)


def make(options: argparse.Namespace, peer: str, names: Sequence[str]) -> None:
    """Have a peer make artifacts, in its own environment; what keeps all of them from being made is their reason."""
    request = {
        "teacher": str(options.teacher.resolve()), "float": str(options.work / "teacher.onnx"),
        "inputs": str(options.work / "inputs"), "out": str(options.work), "sequence": options.sequence, "names": names,
        "settings": {"rates": options.kd_rates},
    }  # fmt: skip
    asked = options.work / f"{peer}.json"
    asked.write_text(json.dumps(request))
    try:
        python = environment(options, peer)
        words = [str(python), str(HERE / "peers" / f"make_{peer}.py"), str(asked)]
        run(words, options.work / f"{peer}.log", own=peer not in ENVIRONMENTS)
    except subprocess.CalledProcessError as error:
        for name in names:
            file = options.work / name / "facts.json"
            if not file.is_file():
                file.parent.mkdir(exist_ok=True)
                file.write_text(json.dumps({"failed": str(error.output), "seconds": None}))
    for name in names:
        facts = json.loads((options.work / name / "facts.json").read_text())
        print(f"{name:22} {facts.get('failed', 'made')}", flush=True)


def environment(options: argparse.Namespace, peer: str) -> Path:
    """The Python of a peer, with its requirements installed; this one for those that run beside edgekd."""
    if peer not in ENVIRONMENTS:
        return Path(sys.executable)
    name = ENVIRONMENTS[peer]
    folder, requirements = Path(options.environments) / name, HERE / "peers" / f"{name}.txt"
    python, stamp = folder / "bin" / "python", folder / requirements.name
    if not stamp.is_file() or stamp.read_text() != requirements.read_text():
        print(f"installing {name}", flush=True)
        log = options.work / f"install-{name}.log"
        run([sys.executable, "-m", "venv", str(folder)], log, own=False)
        run([str(python), "-m", "pip", "install", "--quiet", "--requirement", str(requirements)], log, own=False)
        stamp.write_text(requirements.read_text())
    return python


def run(words: Sequence[str], log: Path, *, own: bool, variables: Mapping[str, str] | None = None) -> None:
    """Run a command with its output in a log; `own`: it may import edgekd, from wherever this process does.

    Raises:
        CalledProcessError: it fails; its output is the last error in the log, or the last line.
    """
    told = {name: value for name, value in (variables or os.environ).items() if name != "PYTHONPATH"}
    told |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if own:
        told["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("w") as output:
        done = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT, env=told, check=False)
    if done.returncode:
        said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in said if "error" in line.lower()]
        reason = (errors or said or [f"exit code {done.returncode}, and said nothing"])[-1]
        raise subprocess.CalledProcessError(done.returncode, words[0], output=reason[:300])


def make_edgekd(options: argparse.Namespace, speedup: float) -> None:
    """A run of edgekd with a budget of this speedup; it goes on where it was stopped."""
    out = options.work / f"edgekd-{speedup:g}x"
    if (out / "manifest.json").is_file():
        return
    words = [sys.executable, "-m", "edgekd", "compress", str(options.teacher), "--data", str(options.data)]
    words += [] if options.examples is None else ["--limit", str(options.examples)]
    words += ["--speedup", f"{speedup:g}", "--sequence", str(options.sequence), "--threads", "1", "--out", str(out)]
    clock = out.with_name(f"{out.name}.json")
    before = json.loads(clock.read_text())["seconds"] if clock.is_file() else 0.0
    began = time.monotonic()
    try:
        run(words, options.work / f"edgekd-{speedup:g}x.log", own=True)
    except subprocess.CalledProcessError as error:
        # A budget that was missed leaves a bundle all the same.
        print(f"edgekd {speedup:g}x: {error.output}", flush=True)
    finally:
        clock.write_text(json.dumps({"seconds": before + time.monotonic() - began}))


def contestants(options: argparse.Namespace, setup: Any) -> list[Contestant]:
    """The teacher, what peers have made or failed to make, and edgekd's bundles."""
    inputs = options.work / "inputs"
    teacher = {"engine": "onnxruntime", "settings": {"precision": "fp32"}}
    found = [
        Contestant(name="teacher", peer="teacher", facts=teacher, file=options.work / "teacher.onnx", inputs=inputs)
    ]
    for peer in options.peers:
        for name in names_of(options, peer):
            folder = options.work / name
            if (folder / "facts.json").is_file():
                facts = json.loads((folder / "facts.json").read_text())
                file = folder / facts["file"] if "file" in facts else None
                found.append(Contestant(name=name, peer=peer, facts=facts, file=file, inputs=inputs))
    for speedup in options.make_edgekd:
        name = f"edgekd-{speedup:g}x"
        own = list(bundles(options, setup, options.work / name))
        missing = {"failed": f"there is no bundle; {name}.log says why", "settings": {"budget": {"speedup": speedup}}}
        left = Contestant(name=name.replace("-", "_"), peer="edgekd", facts=missing, file=None, inputs=inputs)
        found += own or [left]
    for folder in options.edgekd:
        own = list(bundles(options, setup, folder))
        if not own:
            raise SystemExit(f"{folder} is neither a bundle nor a run with one")
        found += own
    names = [each.name for each in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SystemExit(f"more than one run is called {', '.join(sorted(twice))}: rename their folders")
    return found


def bundles(options: argparse.Namespace, setup: Any, folder: Path) -> Iterator[Contestant]:
    """The bundles of a run, or the one that the folder is."""
    from edgekd.export.bundle import MANIFEST, read_manifest
    from edgekd.target import load_target

    places = [folder] if (folder / MANIFEST).is_file() else sorted(folder.glob("bundle*/"))
    stem = folder.resolve().parent.name if folder.name == "bundle" else folder.resolve().name
    for place in places:
        manifest = read_manifest(place)
        artifact = manifest["artifact"]
        name = stem.removeprefix("edgekd-") + place.name.removeprefix("bundle") if place != folder else stem
        # The ledger is of the last round alone, and has no measurements: only a run made here has its whole time.
        clock = folder.with_name(f"{folder.name}.json")
        facts = {
            "engine": load_target(manifest["latency"][0]["target"]).runtime,
            "fixed": bool(artifact.get("fixed")),
            "settings": {"budget": manifest.get("budget"), "form": artifact["lowering"], "shape": artifact["shape"]},
            "seconds": json.loads(clock.read_text())["seconds"] if clock.is_file() else None,
            "versions": {"edgekd": manifest["edgekd"]},
        }
        inputs = inputs_of(options, setup, place)
        file = place / artifact["file"]
        yield Contestant(name=f"edgekd_{name.removeprefix('edgekd_')}", peer="edgekd", facts=facts, file=file,
                         inputs=inputs)  # fmt: skip


def inputs_of(options: argparse.Namespace, setup: Any, bundle: Path) -> Path:
    """The test split as a bundle reads it: anew where its tokenizer is not the teacher's."""
    from edgekd.pipeline.setup import tokenizer_hash

    folder: Path = options.work / "inputs"
    if setup.task.kind == "text" and (own := tokenizer_hash(bundle)) != tokenizer_hash(options.teacher):
        folder = options.work / f"inputs-{own[:12]}"
        write_inputs(options, setup, "test", folder, processor=setup.task.load_processor(bundle))
    return folder


# Running.


def score_all(options: argparse.Namespace, setup: Any) -> None:
    """Logits of every artifact on the test split, for every kind of lengths asked."""
    from edgekd.files import sha256_file

    everything = contestants(options, setup)
    folder = options.work / "logits"
    folder.mkdir(exist_ok=True)
    for lengths in options.lengths:
        for each in everything:
            if each.file is None:
                continue
            file = folder / each.logits(lengths)
            told = file.with_suffix(".json")
            digest = sha256_file(each.file)
            if told.is_file() and json.loads(told.read_text())["sha256"] == digest:
                continue
            request = {"job": "logits", "subjects": [subject(each, lengths, threads=1)], "cpus": options.cpus}
            answer = run_all(options, everything, request, samples=file)
            told.write_text(json.dumps({"sha256": digest, **answer}))
            print(f"{each.name:22} {lengths:7} {answer['failed'].get(each.name, 'scored')}", flush=True)


def subject(each: Contestant, lengths: str, *, threads: int, picked: Sequence[int] = ()) -> dict[str, Any]:
    """One artifact as `peers/runtime.py` takes it: with the default settings of its engine."""
    from edgekd.devices import ort
    from edgekd.target import load_target

    if each.engine == "openvino":
        config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": str(threads)}
        session = {"engine": "openvino", "device": "CPU", "threads": threads, "static": False, "config": config}
    else:
        session = ort.prepare(load_target("local"), threads=threads, options={})
    inputs = str(each.examples(lengths).resolve())
    return {
        "name": each.name, "path": str(each.file), "inputs": inputs, "session": session,
        "picked": [int(i) for i in picked],
    }  # fmt: skip


def run_all(
    options: argparse.Namespace, everything: Sequence[Contestant], request: dict[str, Any], *, samples: Path
) -> dict[str, Any]:
    """Have `peers/runtime.py` do a job; a process that dies is the reason of all artifacts in the request.

    It runs in the environment of OpenVINO as soon as one artifact needs that: ONNX Runtime is there too.
    """
    import edgekd.latency.worker_engines as engines
    from edgekd.devices.process import environment as environment_of
    from edgekd.devices.process import threads_of

    needs_openvino = any(each.engine == "openvino" and each.file for each in everything)
    python = environment(options, "openvino") if needs_openvino else Path(sys.executable)
    asked, result = samples.with_suffix(".request.json"), samples.with_suffix(".result.json")
    for old in (samples, result):
        old.unlink(missing_ok=True)
    # It imports what lies beside it.
    variables = environment_of(threads_of(request))
    variables.pop("PYTHONSAFEPATH")
    whole = {**request, "engines": engines.__file__, "samples": str(samples), "result": str(result)}
    asked.write_text(json.dumps(whole))
    try:
        words = [str(python), str(HERE / "peers" / "runtime.py"), str(asked)]
        run(words, samples.with_suffix(".log"), own=False, variables=variables)
    except subprocess.CalledProcessError as error:
        return {"facts": {}, "failed": {each["name"]: str(error.output) for each in request["subjects"]}}
    answer: dict[str, Any] = json.loads(result.read_text())
    asked.unlink()
    result.unlink()
    return answer


def measure(options: argparse.Namespace, setup: Any, lengths: str, threads: int) -> None:
    """Time all artifacts in turns, unless these very ones were (`--phase measure` measures again)."""
    from edgekd.files import sha256_file
    from edgekd.host import cpu_name, physical_cores
    from edgekd.latency.bench import choose_cpus

    everything = [each for each in contestants(options, setup) if each.file is not None]
    digests = {each.name: sha256_file(each.file) for each in everything if each.file}
    asked = {"artifacts": digests, "blocks": options.blocks, "picked": options.picked, "cpus": options.cpus}
    folder = options.work / "times"
    folder.mkdir(exist_ok=True)
    file = folder / f"{lengths}-{threads}.npz"
    told = file.with_suffix(".json")
    if options.phase == "all" and told.is_file() and json.loads(told.read_text())["asked"] == asked:
        return
    count = threads or len(physical_cores())
    cpus = options.cpus or list(choose_cpus(count))
    picked = spread(everything[0].inputs / "test-data.npz", options.picked)
    request = {
        "job": "time", "cpus": cpus, "blocks": options.blocks, "max_seconds": options.seconds, "warmup_seconds": 1.0,
        "settle_runs": 2, "seed": 0,
        "subjects": [subject(each, lengths, threads=count, picked=picked) for each in everything],
    }  # fmt: skip
    load = os.getloadavg()[0]
    answer = run_all(options, everything, request, samples=file)
    host = {"cpu": cpu_name(), "cpus": cpus, "threads": count, "load": load}
    told.write_text(json.dumps({"asked": asked, "host": host, "picked": picked, **answer}))
    print(f"measured {len(everything)} artifacts, {lengths}, {count} threads; failed: {answer['failed']}", flush=True)


def spread(file: Path, count: int) -> list[int]:
    """Examples at evenly spaced quantiles of length; of images simply the first."""
    with np.load(file, allow_pickle=False) as archive:
        mask = archive["attention_mask"] if "attention_mask" in archive.files else None
        total = len(archive["labels"])
    if mask is None:
        return list(range(min(count, total)))
    order = np.argsort(mask.sum(axis=1), kind="stable")
    places = ((np.arange(count) + 0.5) / count * total).astype(int)
    return [int(index) for index in order[places]]


if __name__ == "__main__":
    raise SystemExit(main())
