"""Evolution of shapes: NSGA-II over (proxy, predicted latency), kept in a journal so that a killed search goes on.

Deb et al. 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II"; optuna's sampler does the work.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.arch import Arch
from edgekd.errors import StageError
from edgekd.files import sha256_json
from edgekd.search.evidence import load_evidence
from edgekd.search.front import Candidate
from edgekd.search.space import Predict, Score, Space

if TYPE_CHECKING:
    import optuna

    from edgekd.context import Progress

UNSCORED = 1e6
"""The proxy of shapes over the limit: they are only ranked by how far they are over it, so none is worked out."""
LATENCY = "latency"


@dataclass(frozen=True, kw_only=True)
class Evolution:
    """One evolution; its journal lies in `folder`. Of one process it is a function of these values alone.

    `limit` is in predicted milliseconds, `trials` how many shapes are looked at in all, those of earlier, killed runs
    included, and `population` how many of them make one generation. `label` says what the proxy depends on: a journal
    of another is not gone on with.
    """

    space: Space
    limit: float
    trials: int
    population: int
    folder: Path
    seed: int = 0
    label: str = ""

    @property
    def name(self) -> str:
        """Name of the study: a hash of all that its trials depend on."""
        return sha256_json([asdict(self.space), f"{self.limit:.9g}", self.population, self.seed, self.label])[:24]

    def study(self) -> optuna.Study:
        """The study, with the trials that are there already."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder.mkdir(parents=True, exist_ok=True)
        storage = JournalStorage(JournalFileBackend(str(self.folder / "trials.journal")))
        return optuna.create_study(
            study_name=self.name, directions=["minimize", "minimize"], storage=storage, load_if_exists=True
        )


def evolve(
    evolution: Evolution,
    score: Score,
    predict: Predict,
    *,
    starts: Sequence[Arch] = (),
    progress: Progress,
    jobs: int = 1,
    evidence: tuple[str, Path] | None = None,
) -> list[Candidate]:
    """All shapes under the limit that evolution looked at, scored.

    Args:
        evolution: what to do.
        score: the proxy, lower is better.
        predict: milliseconds of a shape.
        starts: shapes that belong to the first generation.
        progress: where to report.
        jobs: processes that share the journal, this one included. With more than one the result depends on timing.
        evidence: for `jobs` above 1: the name of the proxy, and the folder of `save_evidence` to work it out from.

    Raises:
        StageError: `jobs` is above 1, and there is no evidence.
    """
    if not evolution.space.genes() or not evolution.trials:
        return []
    study = evolution.study()
    _abandon(study)
    _enqueue(study, evolution.space, starts)
    others = _spawn(evolution, predict, jobs - 1, evidence)
    progress.start("search: evolution", evolution.trials)
    progress.advance(_begun(study))
    try:
        work(evolution, score, predict, progress=progress, jobs=jobs)
        for process in others:
            process.join()
        _abandon(study)
        work(evolution, score, predict, progress=progress)
    finally:
        for process in others:
            process.terminate()
        progress.stop()
    return candidates_of(study, evolution.space)


def work(
    evolution: Evolution,
    score: Score,
    predict: Predict,
    *,
    progress: Progress | None = None,
    jobs: int = 1,
    worker: int = 0,
) -> None:
    """Look at shapes until there are as many as asked for."""
    from optuna.samplers import NSGAIISampler
    from optuna.trial import TrialState

    study = evolution.study()
    known = {candidate.arch: candidate.proxy for candidate in candidates_of(study, evolution.space)}
    while (number := _begun(study)) < evolution.trials:
        # A generator of its own for every trial: one that is gone on with then draws what it would have drawn.
        seed = (evolution.seed * 1_000_003 + number * jobs + worker) % 2**32
        study.sampler = NSGAIISampler(population_size=evolution.population, seed=seed)
        trial = study.ask()
        if _begun(study, before=trial.number) >= evolution.trials:
            # Another process took the last one between the two questions.
            study.tell(trial, state=TrialState.FAIL)
            return
        trial.set_user_attr("worker", worker)
        genes = {name: trial.suggest_int(name, 0, count - 1) for name, count in evolution.space.genes().items()}
        shape = evolution.space.decode(genes)
        latency = predict(shape)
        trial.set_constraint(LATENCY, latency / evolution.limit - 1)
        if latency <= evolution.limit and shape not in known:
            known[shape] = score(shape)
        study.tell(trial, [known.get(shape, UNSCORED) if latency <= evolution.limit else UNSCORED, latency])
        if progress is not None:
            progress.advance()


def candidates_of(study: optuna.Study, space: Space) -> list[Candidate]:
    """The scored shapes of a study, each once."""
    found: dict[Arch, Candidate] = {}
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name == "COMPLETE" and trial.values[0] < UNSCORED:
            shape = space.decode(trial.params)
            found[shape] = Candidate(arch=shape, proxy=trial.values[0], predicted_ms=trial.values[1], by="evolution")
    return list(found.values())


def _begun(study: optuna.Study, before: int | None = None) -> int:
    """Trials that are finished or being worked on, of those with a number below `before`."""
    trials = study.get_trials(deepcopy=False)[:before]
    return sum(trial.state.name in ("COMPLETE", "RUNNING") for trial in trials)


def _abandon(study: optuna.Study) -> None:
    """Give up the trials that a killed process left behind."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


def _enqueue(study: optuna.Study, space: Space, starts: Sequence[Arch]) -> None:
    waiting = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name in ("COMPLETE", "WAITING"):
            waiting.append(trial.params or trial.system_attrs.get("fixed_params", {}))
    for start in starts:
        genes = space.encode(start)
        if genes not in waiting:
            study.enqueue_trial(genes)
            waiting.append(genes)


def _spawn(evolution: Evolution, predict: Predict, count: int, evidence: tuple[str, Path] | None) -> list[Any]:
    if count < 1:
        return []
    if evidence is None:
        raise StageError("evolution in several processes needs files to work from")
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_worker, args=(evolution, predict, evidence, number, count + 1), daemon=True)
        for number in range(1, count + 1)
    ]
    for process in processes:
        process.start()
    return processes


def _worker(evolution: Evolution, predict: Predict, evidence: tuple[str, Path], number: int, jobs: int) -> None:
    import torch

    from edgekd.search.proxies import PROXIES

    torch.set_num_threads(max(torch.get_num_threads() // jobs, 1))
    name, folder = evidence
    work(evolution, PROXIES[name](load_evidence(folder)), predict, jobs=jobs, worker=number)
