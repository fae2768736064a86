"""`compress`: from a recipe to a run folder with a bundle per target."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgekd.constraints import remarks
from edgekd.context import Progress, Silent
from edgekd.devices import unavailable
from edgekd.errors import BudgetError, EdgekdError, ModelError, RecipeError, StoreError, TargetError
from edgekd.export.bundle import MANIFEST, read_manifest
from edgekd.files import explained, sha256_json, write_json, write_text
from edgekd.latency.verdict import FAIL, Verdict
from edgekd.pipeline.baseline import Baseline, baseline
from edgekd.pipeline.finish import Judged, exit_code, write_bundle
from edgekd.pipeline.keys import FORMAT, contents
from edgekd.pipeline.rounds import HEADROOM, ROUND, Made, judge, overshoot, read_round
from edgekd.pipeline.setup import Setup, fitted, prepare
from edgekd.pipeline.stages import Track, travel
from edgekd.recipe import Recipe
from edgekd.report.html import write_report
from edgekd.store import CACHE, RunFolder, publish
from edgekd.target import Target, load_target, probe


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to: its folder, one bundle manifest per target, and the exit code they amount to."""

    folder: Path
    bundles: Mapping[str, Path]
    manifests: Mapping[str, Mapping[str, Any]]
    verdicts: tuple[Verdict, ...]
    exit_code: int

    @property
    def latency(self) -> list[Any]:
        """The manifests' latency objects, all targets."""
        return [entry for manifest in self.manifests.values() for entry in manifest["latency"]]

    def to_dict(self) -> dict[str, Any]:
        """What `compress --json` prints."""
        keep = ("task", "teacher", "artifact", "quality")
        return {
            "run": str(self.folder),
            "bundles": {name: str(path) for name, path in self.bundles.items()},
            "results": {name: {key: m[key] for key in keep} for name, m in self.manifests.items()},
            "latency": self.latency,
            "verdict": [verdict.to_dict() for verdict in self.verdicts],
            "exit_code": self.exit_code,
        }


def compress(recipe: Recipe, out: str | Path, *, fresh: bool = False, progress: Progress | None = None) -> Result:
    """Run a recipe in a run folder; what an earlier, perhaps killed, run of the same recipe finished is taken up.

    Raises:
        EdgekdError: as the stages, the data and the store raise them; nothing half-written counts as finished.
    """
    progress = progress or Silent()
    # What was probed must not part runs whose budget says how many threads: they may see different cores.
    probed = [probe(load_target(name)) for name in recipe.targets]
    targets = [replace(target, threads=recipe.budget.threads or target.threads) for target in probed]
    run = RunFolder(out)
    try:
        with run.lock():
            if fresh:
                run.fresh()
            return _run(run, recipe, targets, progress)
    except EdgekdError:
        run.forget_if_new()
        raise


def _run(run: RunFolder, recipe: Recipe, targets: list[Target], progress: Progress) -> Result:
    setup = prepare(
        recipe.teacher,
        recipe.data.spec(recipe.seed),
        task=recipe.task,
        max_length=recipe.data.max_length,
        progress=progress,
    )
    if recipe.budget.min_accuracy is not None and setup.metric == "agreement":
        raise RecipeError(
            f"budget.min_accuracy is {recipe.budget.min_accuracy:g}, and the data has no labels to measure it on: give "
            "labelled validation or test rows, or budget.accuracy_drop, which is then of agreement with the teacher"
        )
    key = _run_key(recipe, setup, targets)
    if (done := _finished(run, key, targets, progress)) is not None:
        return done
    write_text(run.path / "recipe.yaml", recipe.to_yaml())
    for line in remarks(targets, recipe.stages):
        progress.say(line)
    base = baseline(run, setup, progress)
    outcomes, troubles = [], {}
    for target in targets:
        try:
            outcomes.append(_one_target(run, recipe, setup, base, target, progress))
        except (ModelError, TargetError) as error:
            if len(targets) == 1:
                raise
            # A board that is gone or a compiler that refuses is no reason to leave the other targets undone.
            troubles[target.name] = str(error)
            progress.say(f"{target.name}: {error}")
    if troubles:
        ready = ", ".join(str(outcome.bundle) for outcome in outcomes if outcome.bundle is not None) or "none"
        told = "; ".join(f"{name}: {text}" for name, text in troubles.items())
        raise TargetError(f"{told}. Bundles of the other targets: {ready}; the same command goes on from here")
    return _finish(run, recipe, key, outcomes, progress)


@dataclass(frozen=True)
class _Outcome:
    target: Target
    bundle: Path | None
    manifest: Mapping[str, Any] | None
    judgement: Judged | None
    verdict: Verdict


def _one_target(
    run: RunFolder, recipe: Recipe, setup: Setup, base: Baseline, target: Target, progress: Progress
) -> _Outcome:
    suffix = f"-{target.name}" if len(recipe.targets) > 1 else ""
    whole, setup = setup, fitted(setup, target, recipe.budget)
    strictness, rounds, known = 1.0, list[dict[str, Any]](), dict[str, Any]()
    made: Made | None = None
    for number in range(1, recipe.max_rounds + 1):
        track = Track(
            run=run,
            setup=setup,
            whole=whole,
            target=target,
            budget=recipe.budget,
            seed=recipe.seed,
            teacher_graph=base.graph,
            suffix=suffix if number == 1 else f"{suffix}-round{number}",
            progress=progress,
            known=known,
        )
        try:
            travelled = travel(track, recipe.stages, strictness=strictness)
        except (BudgetError, ModelError, TargetError) as error:
            if made is None and not isinstance(error, BudgetError):
                raise
            if made is None:
                return _Outcome(target, None, None, None, Verdict(target.name, FAIL, str(error)))
            rounds.append({"round": number, "strictness": strictness, "status": FAIL, "reason": str(error)})
            progress.say(f"round {number}: {error}; what the round before made stays")
            break
        work = run.begin(run.stage(len(recipe.stages) + 1, "bundle" + track.suffix, travelled.key))
        may_go_on = "search" in recipe.stages and number < recipe.max_rounds
        if may_go_on and (before := read_round(work / ROUND)) is not None:
            # Measured again, the next round would have another key, and what a killed run has of it would be lost.
            made, strictness = Made(travelled, work, None), before["strictness"]
            rounds.append(before["round"])
            progress.say(f"round {number}: measured before: {before['round']['reason']}")
        else:
            judgement = judge(travelled, setup, base, target, recipe.budget, work, progress)
            made = Made(travelled, work, judgement)
            rounds.append({"round": number, "strictness": strictness, **judgement.verdict.to_dict()})
            over = overshoot(judgement, recipe.budget)
            if over is None or not may_go_on:
                break
            strictness *= HEADROOM / max(over, 1.0)
            write_json(work / ROUND, {"round": rounds[-1], "strictness": strictness})
        progress.say(f"round {number + 1}: the budget is tightened to {strictness:.1%} inside")
    assert made is not None
    travelled, work = made.travelled, made.work
    judgement = made.judgement or judge(travelled, setup, base, target, recipe.budget, work, progress)
    draft = work / "bundle"
    manifest = write_bundle(
        draft,
        judgement,
        travelled.student,
        setup,
        base,
        ledger=travelled.ledger,
        rounds=rounds,
        recipe_hash=recipe.fingerprint(),
        seed=recipe.seed,
        budget=recipe.budget,
    )
    final = run.path / f"bundle{suffix}"
    publish(draft, final, marker=MANIFEST)
    return _Outcome(target, final, manifest, judgement, judgement.verdict)


def _finish(run: RunFolder, recipe: Recipe, key: str, outcomes: list[_Outcome], progress: Progress) -> Result:
    verdicts = tuple(outcome.verdict for outcome in outcomes)
    reached = [outcome.judgement for outcome in outcomes if outcome.judgement is not None]
    code = 3 if len(reached) < len(outcomes) else exit_code(reached)
    bundles = {o.target.name: o.bundle for o in outcomes if o.bundle is not None}
    result = Result(
        folder=run.path,
        bundles=bundles,
        manifests={o.target.name: o.manifest for o in outcomes if o.manifest is not None},
        verdicts=verdicts,
        exit_code=code,
    )
    _drop_earlier(run.path, bundles, progress)
    for outputs in (run.path / CACHE).glob("teacher-*"):
        shutil.rmtree(outputs) if outputs.is_dir() else outputs.unlink()
    write_report(run.path / "report.html", result.manifests, [v.to_dict() for v in verdicts], recipe.to_yaml())
    run.finish(
        {
            "schema": 1,
            "key": key,
            "recipe": recipe.fingerprint(),
            "bundles": {name: path.name for name, path in bundles.items()},
            "verdict": [verdict.to_dict() for verdict in verdicts],
            "exit_code": code,
        }
    )
    return result


def _drop_earlier(run: Path, bundles: Mapping[str, Path], progress: Progress) -> None:
    """Remove the bundles that earlier recipes left in the run folder and this one did not make anew.

    Such a bundle has a manifest and the name that a run gives it; anything else named `bundle…` is left alone.
    """
    current = {path.name for path in bundles.values()}
    for folder in sorted(run.glob("bundle*")):
        if folder.name in current or folder.is_symlink() or not _is_of_a_run(folder):
            continue
        progress.say(f"{folder.name}: of an earlier recipe, removed")
        # Renamed first: a half-removed bundle would be taken for somebody else's folder.
        removed = folder.with_name(f".{folder.name}.old-{secrets.token_hex(4)}")
        with explained("remove", folder):
            os.rename(folder, removed)
            shutil.rmtree(removed)


def _is_of_a_run(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return folder.name in ("bundle", f"bundle-{manifest['latency'][0]['target']}")
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return False


def _run_key(recipe: Recipe, setup: Setup, targets: list[Target]) -> str:
    named = [contents(stage) for stage in recipe.stages.values()]
    places = [target.fingerprint for target in targets]
    return sha256_json([FORMAT, recipe.fingerprint(), dict(setup.key), places, named])


def report_again(folder: str | Path) -> Result:
    """Read a finished run and write its report anew.

    Raises:
        StoreError: the run is not finished, or its bundles are damaged.
    """
    run = Path(folder)
    try:
        manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
        recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
        result = _read_result(run, manifest)
    except (OSError, ValueError, KeyError, TypeError):
        raise StoreError(f"{run} is not a finished run; finish it with `edgekd compress … --out {run}`") from None
    write_report(run / "report.html", result.manifests, [v.to_dict() for v in result.verdicts], recipe)
    return result


def _finished(run: RunFolder, key: str, targets: Sequence[Target], progress: Progress) -> Result | None:
    """The result of this very run if it was finished before and its bundles are whole."""
    try:
        manifest = json.loads((run.path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["key"] != key or not manifest["bundles"]:
            return None
        result = _read_result(run.path, manifest)
    except (OSError, ValueError, KeyError, TypeError, EdgekdError):
        return None
    there = {target.name for target in targets if unavailable(target) is None}
    if any(entry["kind"] == "unavailable" and entry["target"] in there for entry in result.latency):
        return None
    progress.say(f"{run.path} is finished; nothing to do (--fresh runs it again)")
    return result


def _read_result(run: Path, manifest: Mapping[str, Any]) -> Result:
    bundles = {name: run / folder for name, folder in manifest["bundles"].items()}
    return Result(
        folder=run,
        bundles=bundles,
        manifests={name: read_manifest(path) for name, path in bundles.items()},
        verdicts=tuple(Verdict(**verdict) for verdict in manifest["verdict"]),
        exit_code=int(manifest["exit_code"]),
    )
