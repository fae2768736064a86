"""One `edgekd compress` as a user types it; the figures and the log go to bench/results/NAME.json and NAME.log.

    python bench/compress.py                                   # digits, with a teacher made on the spot
    python bench/compress.py --name movies TEACHER --data DIR --speedup 4 --threads 1

What follows `--name NAME` goes to `edgekd compress` as it stands.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from edgekd.host import cpu_name, logical_cpus

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="digits")
    parser.add_argument("--out", type=Path, help="keep the run in this folder")
    options, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch) / "run"
        command = ["compress", *rest, "--out", str(out)] if rest else ["demo", "--out", str(out)]
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "edgekd", *command, "--json"], capture_output=True, text=True, check=False
        )
        seconds = time.monotonic() - began
    RESULTS.mkdir(exist_ok=True)
    log = done.stderr.replace(str(out), "RUN")
    for argument in rest:
        if "/" in argument:
            log = log.replace(argument, Path(argument).name)
    (RESULTS / f"{options.name}.log").write_text(log, encoding="utf-8")
    answer = json.loads(done.stdout) if done.stdout else {"error": log}
    answer.pop("run", None)
    answer.pop("bundles", None)
    facts = {
        "command": " ".join(["edgekd", *(Path(a).name if "/" in a else a for a in command[:-2])]),
        "seconds": round(seconds, 1),
        "exit_code": done.returncode,
        "machine": {"cpu": cpu_name(), "cpus": len(logical_cpus()), "python": platform.python_version()},
        **answer,
    }
    (RESULTS / f"{options.name}.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(facts, indent=2))
    return 0 if done.stdout else 1


if __name__ == "__main__":
    raise SystemExit(main())
