"""What `edgekd compress` costs beside finetuning the teacher: both commands in turns, on the same cores.

    python bench/cost.py                                          # digits, with a teacher made on the spot
    taskset -c 1 python bench/cost.py TEACHER --data DIR --speedup 12 --preset fast --name movies

The teacher is finetuned once more from its own weights, with the defaults of `edgekd finetune`, before every
`compress`. Seconds are those of the clock and of the processors (what other processes take is in the former alone).
Options that are not this script's go to `compress`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import digits_teacher, head, write


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", nargs="?")
    parser.add_argument("--data", default="sklearn:digits")
    parser.add_argument("--speedup", default="4")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--name", default="digits")
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.teacher is None:
            options.teacher = digits_teacher(Path(scratch) / "teacher", options.data)
        both = [options.teacher, "--data", options.data]
        ours = ["compress", *both, "--speedup", options.speedup, "--preset", options.preset, "--threads", "1", *more]
        finetunes, compresses = list[dict[str, Any]](), list[dict[str, Any]]()
        for _ in range(options.rounds):
            finetunes.append(timed(["finetune", *both], Path(scratch)))
            compresses.append(timed(ours, Path(scratch)))
    pairs = list(zip(compresses, finetunes, strict=True))
    ratios = {clock: [ours[clock] / theirs[clock] for ours, theirs in pairs] for clock in ("seconds", "cpu_seconds")}
    write(f"cost-{options.name}", {**head(), "ratio": ratios, "compress": compresses, "finetune": finetunes})
    print(json.dumps(ratios, indent=1))
    return 0


def timed(words: list[str], scratch: Path) -> dict[str, Any]:
    """Run a command of edgekd to its end: what it took, what it says of accuracy and speed, and its log."""
    out = scratch / f"{words[0]}-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "edgekd", *words, "--out", str(out), "--json"]
    before, began = os.times(), time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds, after = time.monotonic() - began, os.times()
    answer = json.loads(done.stdout) if done.stdout else {"error": done.stderr[-500:]}
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    log = done.stderr.replace(str(out), "OUT")
    for word in words:
        log = log.replace(word, Path(word).name) if "/" in word else log
    keep = {key: answer[key] for key in ("results", "verdict", "metric", "validation", "error") if key in answer}
    print(words[0], f"{seconds:.0f} s, {cpu:.0f} s of processors, exit code {done.returncode}", flush=True)
    named = " ".join(["edgekd", *(Path(word).name if "/" in word else word for word in words)])
    return {
        "command": named, "seconds": seconds, "cpu_seconds": cpu, "exit_code": done.returncode, **keep,
        "log": log.splitlines(),
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
