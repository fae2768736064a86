"""Space, steps, strategies, halving, front and the measured loop, on shapes whose cost and score are known."""

from __future__ import annotations

import csv
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from edgekd.arch import Arch, Layer
from edgekd.context import Budget, Silent
from edgekd.errors import BudgetError, RecipeError, StageError
from edgekd.latency.cell import Cell, Curve, Frame
from edgekd.latency.table import Conditions, LatencyTable
from edgekd.search import Search
from edgekd.search.candidates import Means, Pool, is_even
from edgekd.search.evidence import load_evidence, save_evidence
from edgekd.search.evolution import UNSCORED, Evolution, evolve
from edgekd.search.front import FILES, Candidate, Front, pareto
from edgekd.search.greedy import stepped
from edgekd.search.halving import Finalist, Standing, halve, rungs
from edgekd.search.hunt import CLOSE, Hunt
from edgekd.search.predictor import Reference
from edgekd.search.proxies import PROXIES, ProxyContext
from edgekd.search.space import Space, Steps, multiples, with_hidden
from edgekd.search.steps import choose_steps, rises
from edgekd.search.tournament import Tournament
from edgekd.search.variants import Lengths, fit_saving, plain, probes, variant_of, vary
from edgekd.student import load_student
from edgekd.supernet.space import kept_layers
from edgekd.surgery import Importance, measure_importance


def arch_of(depth: int = 3, heads: int = 4, neurons: int = 128, hidden: int = 64) -> Arch:
    layers = tuple(Layer(source=i, heads=heads, neurons=neurons) for i in range(depth))
    return Arch(family="bert", hidden=hidden, head_dim=8, vocabulary=100, layers=layers)


ARCH = arch_of()
FRAME = Frame(family="bert", hidden=64, head_dim=8, lowering="fp32", sequence=16)


def cost(arch: Arch) -> float:
    return 0.3 + sum(0.1 + 0.05 * layer.heads + 0.002 * layer.neurons for layer in arch.layers) * arch.hidden / 64


def harm(arch: Arch) -> float:
    """What the shape lacks of the whole: layer 1 hardly matters, heads less than neurons."""
    own = {layer.source: layer for layer in arch.layers}
    worth = {0: 3.0, 1: 0.3, 2: 2.0}
    kept = sum(
        worth[i] * (0.4 + 0.2 * own[i].heads / 4 + 0.4 * (own[i].neurons / 128) ** 0.5) for i in worth if i in own
    )
    return sum(worth.values()) - kept


def even(depth: int = 3, heads: int = 4, neurons: int = 128) -> Importance:
    return Importance(
        tuple(torch.ones(heads) for _ in range(depth)),
        tuple(torch.ones(neurons) for _ in range(depth)),
        torch.tensor([3.0, 0.3, 2.0][:depth]),
    )


COARSE = Steps(2, 64)


def space_of(steps: Steps = COARSE, **options: object) -> Space:
    return Space.of(ARCH, [True] * 3, steps, **options)


def pool_of(settings: Search, limit_of=cost, score=harm, steps: Steps = COARSE, depths=(), **means: object) -> Pool:
    space = Space.of(ARCH, [True] * 3, steps, min_layers=settings.min_layers, order=(0, 2, 1), depths=depths)
    return Pool(settings, Means(space=space, steps=steps, score=score, predict=limit_of, importance=even(), **means))


@pytest.mark.parametrize("droppable", [(True, True, True), (False, True, True), (True, False, False)])
@pytest.mark.parametrize("min_layers", [1, 2])
def test_the_space_counts_and_lists_every_shape_once(droppable, min_layers):
    space = Space.of(ARCH, droppable, Steps(2, 64), min_layers=min_layers, hidden=(32, 64))
    shapes = list(space.shapes())
    assert len(shapes) == len(set(shapes)) == space.size
    assert {layer.heads for shape in shapes for layer in shape.layers} == {1, 2, 4}
    assert {layer.neurons for shape in shapes for layer in shape.layers} == {64, 128}
    assert {shape.hidden for shape in shapes} == {32, 64}
    for shape in shapes:
        kept = {layer.source for layer in shape.layers}
        assert len(kept) >= min_layers
        assert all(i in kept for i, drop in enumerate(droppable) if not drop)
    assert min(shapes, key=cost) == space.smallest()


def test_genes_say_every_shape_and_nothing_else():
    space = space_of(hidden=(32, 64), min_layers=2, order=(0, 2, 1))
    for shape in space.shapes():
        genes = space.encode(shape)
        assert all(0 <= genes[name] < count for name, count in space.genes().items())
        assert space.decode(genes) == shape
    shallow = space.decode({"keep0": 0, "keep1": 1, "keep2": 0})
    assert [layer.source for layer in shallow.layers] == [0, 1]
    odd = replace(ARCH, layers=tuple(replace(layer, heads=3, neurons=100) for layer in ARCH.layers))
    assert {(layer.heads, layer.neurons) for layer in space.decode(space.encode(odd)).layers} == {(2, 64)}


def test_layers_that_cannot_go_have_no_gene():
    space = Space.of(ARCH, [False, True, True], Steps(4, 128))
    assert set(space.genes()) == {"keep1", "keep2", "heads0", "heads1", "heads2"}


def test_a_narrower_stream_shrinks_the_stages_of_a_convolutional_net_in_proportion():
    net = replace(ARCH, hidden=128, channels=(16, 16, 64, 128))
    assert with_hidden(net, 64).channels == (8, 8, 32, 64)
    assert with_hidden(net, 64).hidden == 64
    assert with_hidden(net, 128) == net
    assert multiples(48, 128) == (96, 128)


def cell(heads: Curve, neurons: Curve) -> Cell:
    return Cell(frame=FRAME, base_ms=0.1, layer_ms={-1: 0.1}, heads=heads, neurons={-1: neurons}, deepest=6)


def stairs(width: int, full: int, rise: float = 1.0) -> Curve:
    """A device that computes in blocks: any width costs as much as the next multiple of `width`."""
    knots = [0.0]
    ms = [0.0]
    for block in range(1, full // width + 1):
        knots += [(block - 1) * width + 1, block * width]
        ms += [block * rise, block * rise]
    return Curve(tuple(knots), tuple(ms))


@pytest.mark.parametrize("width", [32, 64, 128])
def test_steps_are_the_blocks_that_the_device_computes_in(width):
    arch = arch_of(heads=12, neurons=1024)
    steps = choose_steps([cell(stairs(4, 12), stairs(width, 1024))], arch, None, None)
    assert steps == Steps(4, width)
    assert choose_steps([cell(stairs(4, 12), stairs(width, 1024))], arch, 3, 20) == Steps(3, 20)


def test_steps_of_a_smooth_device_are_the_finest():
    line = cell(Curve((0, 12), (0, 1)), Curve((0, 1024), (0, 1)))
    assert choose_steps([line], arch_of(heads=12, neurons=1024), None, None) == Steps(1, 32)
    assert choose_steps([line], arch_of(heads=4, neurons=64), None, None) == Steps(1, 4)
    assert rises(stairs(64, 256), 32, 256) == pytest.approx(0.5)
    assert rises(Curve((0, 10), (0, 0)), 1, 10) == 0.0


def test_looking_at_everything_finds_the_best_shape_that_fits():
    limit = 1.2
    pool = pool_of(Search(strategy="exhaustive", exhaustive_limit=1000))
    best = pool.under(limit)[0]
    known = min((shape for shape in space_of().shapes() if cost(shape) <= limit), key=harm)
    assert best.arch == known
    assert best.proxy == harm(known)
    assert best.predicted_ms == cost(known) <= limit
    assert len(pool.known) == sum(cost(shape) <= limit for shape in space_of().shapes())


def test_what_is_too_much_to_look_at_is_refused_or_left_to_other_strategies():
    with pytest.raises(RecipeError, match=r"there are 342 shapes, and exhaustive_limit is 64"):
        pool_of(Search(strategy="exhaustive")).under(1.0)
    assert pool_of(Search()).strategy == "auto"
    assert pool_of(Search(exhaustive_limit=342)).strategy == "exhaustive"


def test_shapes_of_error_curves_are_candidates_if_they_fit():
    def allocate(kept, limit):
        return replace(ARCH, layers=ARCH.layers[: 1 if kept is None else 3])

    found = pool_of(Search(), allocate=allocate).under(1.2)
    assert {candidate.by for candidate in found} == {"greedy", "allocate"}
    only = pool_of(Search(strategy="allocate"), allocate=allocate).under(1.2)
    assert [(candidate.by, candidate.arch.layers) for candidate in only] == [("allocate", ARCH.layers[:1])]
    none = pool_of(Search(strategy="allocate"), allocate=lambda kept, limit: None).under(1.2)
    assert {candidate.by for candidate in none} == {"greedy"}


def test_a_field_has_different_depths_and_every_variant():
    pool = pool_of(Search(variants=["rank", "shares"]), steps=Steps(1, 16), lengths=Lengths(16, 16))
    field = pool.field(1.5, 7)
    assert len(field) == 7
    assert {variant_of(candidate.arch) for candidate in field} == {"", "rank", "shares"}
    assert {is_even(candidate.arch) for candidate in field if not variant_of(candidate.arch)} == {True, False}
    field = pool_of(Search(), steps=Steps(1, 16)).field(0.87, 4)
    assert {len(candidate.arch.layers) for candidate in field} == {1, 2, 3}
    # One layer, however wide, uses only 0.856 ms.
    field = pool_of(Search(), steps=Steps(1, 16)).field(1.1, 4)
    assert {len(candidate.arch.layers) for candidate in field} == {2, 3}
    assert all(candidate.predicted_ms <= 1.1 for candidate in field)


@pytest.mark.parametrize("limit", [0.75, 0.9, 1.1, 1.4])
def test_a_shape_is_brought_to_a_limit_in_finer_steps_if_need_be(limit):
    pool = pool_of(Search(), steps=Steps(2, 64))
    start = replace(ARCH, layers=tuple(replace(x, heads=2, neurons=64) for x in (ARCH.layers[0], ARCH.layers[2])))
    found = pool.fitted(start, limit)
    assert [layer.source for layer in found.layers] == [0, 2]
    assert 0.92 * limit <= cost(found) <= limit
    assert pool.fitted(start, limit, avoid=[found]) != found


def test_what_was_measured_already_does_not_lead_to_the_narrowest_shape():
    pool, limit = pool_of(Search(), steps=Steps(2, 64)), 1.1
    start = replace(ARCH, layers=tuple(replace(x, heads=2, neurons=64) for x in ARCH.layers))
    seen = []
    while (found := pool.fitted(start, limit, avoid=seen)) is not None:
        assert cost(found) >= 0.7 * limit
        seen.append(found)
    assert len(seen) >= 2
    narrow = pool.fitted(start, 0.01)
    assert all((layer.heads, layer.neurons) == (1, 4) for layer in narrow.layers)


def test_layers_that_use_little_of_the_budget_are_not_settled_for(tmp_path):
    hunt, _ = hunt_of(cost, 1.0, tmp_path)
    shallow = replace(ARCH, layers=ARCH.layers[:1])
    for used, chosen in ((0.4, ARCH), (0.75, shallow)):
        hunt.measured = {ARCH: 0.88, shallow: used}
        assert hunt.settle(shallow) == chosen
    hunt.measured = {ARCH: 1.2, shallow: math.inf}
    assert hunt.settle(ARCH) == ARCH


def test_steps_go_both_ways():
    space = space_of(Steps(1, 16))
    small = space.smallest()
    wide = stepped(small, 0.55, cost, space, even())
    assert cost(small) < 0.5 < cost(wide) <= 0.55
    narrow = stepped(ARCH, 1.0, cost, space, even())
    assert 0.95 < cost(narrow) <= 1.0
    assert len(narrow.layers) == 3
    assert stepped(ARCH, 0.1, cost, space, even()) is None


def evolution(folder: Path, trials: int, *, limit: float = 1.2, seed: int = 0) -> Evolution:
    space = space_of(Steps(1, 32), order=(0, 2, 1))
    return Evolution(space=space, limit=limit, trials=trials, population=8, folder=folder, seed=seed)


def trials_of(run: Evolution) -> list[tuple[dict[str, int], list[float]]]:
    return [(trial.params, trial.values) for trial in run.study().trials if trial.state.name == "COMPLETE"]


def test_evolution_keeps_to_the_limit_and_finds_better_shapes_than_it_began_with(tmp_path):
    run = evolution(tmp_path, 60)
    scored = []

    def score(arch):
        scored.append(arch)
        return harm(arch)

    start = run.space.smallest()
    found = evolve(run, score, cost, starts=[start], progress=Silent())
    assert found
    assert all(candidate.predicted_ms <= 1.2 and candidate.predicted_ms == cost(candidate.arch) for candidate in found)
    assert all(candidate.proxy == harm(candidate.arch) for candidate in found)
    assert len(scored) == len(set(scored)) == len(found)
    assert start in scored
    first = [values for _, values in trials_of(run)[:9]]
    assert min(candidate.proxy for candidate in found) < min(value for value, _ in first)
    over = [values for _, values in trials_of(run) if values[1] > 1.2]
    assert over
    assert all(value == UNSCORED for value, _ in over)


def test_a_killed_evolution_goes_on_and_ends_as_one_that_was_not(tmp_path):
    whole, half = evolution(tmp_path / "a", 28), evolution(tmp_path / "b", 13)
    evolve(whole, harm, cost, starts=[whole.space.smallest()], progress=Silent())
    evolve(half, harm, cost, starts=[half.space.smallest()], progress=Silent())
    half.study().ask()  # what a kill in the middle of a trial leaves behind
    rest = replace(half, trials=28)
    scored = []

    def score(arch):
        scored.append(arch)
        return harm(arch)

    done = {rest.space.decode(params) for params, values in trials_of(half) if values[0] < UNSCORED}
    found = evolve(rest, score, cost, starts=[rest.space.smallest()], progress=Silent())
    assert trials_of(rest) == trials_of(whole)
    assert len(trials_of(rest)) == 28
    assert not done & set(scored)
    assert {candidate.arch for candidate in found} == done | set(scored)
    evolve(rest, lambda arch: pytest.fail("nothing is left to do"), cost, progress=Silent())


def test_evolution_of_one_process_depends_on_its_seed_alone(tmp_path):
    runs = [evolution(tmp_path / name, 14, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    for run in runs:
        evolve(run, harm, cost, progress=Silent())
    assert trials_of(runs[0]) == trials_of(runs[1]) != trials_of(runs[2])
    assert runs[0].name != replace(runs[0], limit=1.3).name


@pytest.fixture
def evidence(make_model) -> ProxyContext:
    student = load_student(make_model("bert"), auto_class="AutoModelForSequenceClassification")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 40, (8, 6), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    importance = measure_importance(student, [batch])
    labels = [torch.zeros(8, dtype=torch.long)]
    return ProxyContext(student=student, teacher=student, importance=importance, batches=[batch], labels=labels)


def test_evidence_on_disk_gives_the_same_scores(evidence, tmp_path):
    again = load_evidence(save_evidence(evidence, tmp_path, auto_class="AutoModelForSequenceClassification"))
    arch = evidence.student.arch
    small = replace(arch, layers=tuple(replace(layer, heads=2, neurons=24) for layer in arch.layers[:2]))
    assert PROXIES["kl"](again)(small) == pytest.approx(PROXIES["kl"](evidence)(small), rel=1e-5)
    assert again.teacher is again.student


def test_two_processes_share_one_evolution(evidence, tmp_path):
    folder = save_evidence(evidence, tmp_path / "files", auto_class="AutoModelForSequenceClassification")
    own = replace(cell(Curve((0, 4), (0, 0.2)), Curve((0, 64), (0, 0.128))), frame=replace(FRAME, hidden=32))
    table = LatencyTable(conditions=Conditions(target="local"), cells=(own,))
    predict = Reference(table=table, frame=own.frame, teacher_ms=1.0).predictor()
    space = Space.of(evidence.student.arch, [True] * 3, Steps(1, 16))
    run = Evolution(space=space, limit=1.2, trials=12, population=4, folder=tmp_path / "run")
    score = PROXIES["kl"](evidence)

    study = run.study()

    def patient(arch):
        end = time.monotonic() + 300
        while time.monotonic() < end and not any(trial.user_attrs.get("worker") for trial in study.trials):
            time.sleep(0.2)
        return score(arch)

    with pytest.raises(StageError, match="needs files"):
        evolve(run, score, predict, progress=Silent(), jobs=2)
    found = evolve(run, patient, predict, progress=Silent(), jobs=2, evidence=("kl", folder))
    finished = [trial for trial in run.study().trials if trial.state.name == "COMPLETE"]
    assert len(finished) == 12
    assert {trial.user_attrs["worker"] for trial in finished} == {0, 1}
    assert all(candidate.proxy == pytest.approx(score(candidate.arch), rel=1e-4) for candidate in found)


def test_the_front_has_nothing_that_another_beats():
    points = [(3.0, 1.0), (2.0, 2.0), (2.5, 3.0), (1.0, 4.0), (1.0, 5.0), (3.0, 1.5)]
    assert pareto(points) == [0, 1, 3]
    rng = np.random.default_rng(0)
    many = [tuple(row) for row in rng.random((60, 2)).tolist()]
    best = set(pareto(many))
    for i, (a, b) in enumerate(many):
        beaten = any(c <= a and d <= b and (c, d) != (a, b) for c, d in many)
        assert (i in best) == (not beaten)


def test_the_front_is_written_for_people_tables_and_pages(tmp_path):
    shapes = list(space_of().shapes())[::9]
    front = Front([Candidate(arch=s, proxy=harm(s), predicted_ms=cost(s), by="x") for s in [*shapes, shapes[0]]])
    chosen = front.candidates[front.best[1]].arch
    front.write(tmp_path, chosen, limit=1.2, reason="it is so")
    data = json.loads((tmp_path / FILES[0]).read_text())
    assert data["reason"] == "it is so"
    assert len(data["points"]) == len(shapes)
    assert [Arch.from_dict(row["arch"]) for row in data["points"] if row["chosen"]] == [chosen]
    with (tmp_path / FILES[1]).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["proxy"]) for row in rows] == [point["proxy"] for point in data["points"]]
    svg = (tmp_path / FILES[2]).read_text()
    assert svg.count("<circle") == len(shapes) + len(front.best) + 1
    assert svg.startswith("<svg")
    assert svg.count("chosen") == 1
    listed = front.points(chosen)
    assert len(listed) == len(front.best)
    assert all(row["front"] for row in listed)


def test_a_front_of_one_point_can_be_drawn(tmp_path):
    Front([Candidate(arch=ARCH, proxy=0.0, predicted_ms=1.0)]).write(tmp_path, None, limit=None, reason="")
    assert "<circle" in (tmp_path / FILES[2]).read_text()


def test_rungs_halve_the_field_and_double_the_steps():
    assert rungs(4, 400) == [(4, 50), (2, 100)]
    assert rungs(2, 100) == [(2, 50)]
    assert [count for count, _ in rungs(7, 1000)] == [7, 4, 2]
    for count in range(2, 12):
        assert 0.4 * 1000 < sum(size * steps for size, steps in rungs(count, 1000)) <= 1000


def finalists(count: int) -> list[Finalist]:
    return [Finalist(arch=replace(ARCH, layers=ARCH.layers[:1], vocabulary=100 + i)) for i in range(count)]


def test_halving_lets_a_slow_starter_win_and_keeps_what_it_found(tmp_path):
    field = finalists(4)
    curve = {field[0].key: (0.1, 0.09), field[1].key: (0.2, 0.05), field[2].key: (0.3, 0.0), field[3].key: (0.4, 0.0)}
    calls = []

    def train(finalist, rung, steps):
        calls.append((finalist.key, rung, steps))
        return curve[finalist.key][rung]

    standings = halve(field, train, tmp_path, steps=400, label="a")
    assert [standing.finalist for standing in standings] == [field[1], field[0], field[2], field[3]]
    assert [standing.rung for standing in standings] == [1, 1, 0, 0]
    assert sorted(steps for _, _, steps in calls) == [50, 50, 50, 50, 100, 100]
    again = halve(field, lambda *asked: pytest.fail(f"trained twice: {asked}"), tmp_path, steps=400, label="a")
    assert again == standings
    (tmp_path / f"{field[2].key}-0.json").write_text("{")
    calls.clear()
    assert halve(field, train, tmp_path, steps=400, label="a") == standings
    assert calls == [(field[2].key, 0, 50)]
    halve(field, train, tmp_path, steps=400, label="b")
    assert len(calls) == 7


def test_a_single_finalist_is_not_trained(tmp_path):
    (only,) = halve(finalists(1), lambda *asked: pytest.fail("trained"), tmp_path, steps=10, label="")
    assert only.finalist == finalists(1)[0]


def reshape(arch: Arch) -> Arch:
    """The last layer passes on its first token alone."""
    return replace(arch, layers=(*arch.layers[:-1], replace(arch.layers[-1], tokens=1)))


def layer_costs(arch: Arch) -> np.ndarray:
    return np.asarray([[0.05, 0.05 * layer.heads, 0.002 * layer.neurons] for layer in arch.layers])


def saved_ms(arch: Arch) -> float:
    last = arch.layers[-1]
    return 0.02 + 0.03 * last.heads + 0.0015 * last.neurons


def test_savings_of_operators_are_learnt_from_a_few_shapes():
    shapes = probes(arch_of(6))
    assert {len(shape.layers) for shape in shapes} == {1, 3, 6}
    assert len({shape.layers[0].neurons for shape in shapes}) == 5
    pairs = [(s, reshape(s)) for s in shapes]
    saving = fit_saving(pairs, [saved_ms(s) for s in shapes], [1.0] * len(shapes), layer_costs, 16)
    other = replace(ARCH, layers=(ARCH.layers[0], replace(ARCH.layers[1], heads=3, neurons=70)))
    assert saving(other, reshape(other), layer_costs) == pytest.approx(saved_ms(other), rel=0.15)
    assert saving(other, other, layer_costs) == 0.0
    table = LatencyTable(
        conditions=Conditions(target="local"),
        cells=(cell(Curve((0, 4), (0, 0.2)), Curve((0, 128), (0, 0.256))),),
    )
    reference = Reference(table=table, frame=FRAME, teacher_ms=1.0, savings={"": saving})
    before = reference.predictor()(ARCH)
    assert reference.predictor(reshape)(ARCH) == pytest.approx(
        before - saving(ARCH, reshape(ARCH), reference.predictor().costs)
    )


def test_variants_change_how_layers_compute_and_nothing_else():
    lengths = Lengths(16, 12)
    for name in ("padding", "tokens", "shares", "rank", "activation", "norm"):
        changed = vary(name, ARCH, lengths)
        assert changed != ARCH
        assert variant_of(changed) == name
        assert plain(changed) == ARCH
    assert [layer.tokens for layer in vary("tokens", ARCH, lengths).layers] == [12, 2, 0]
    assert [layer.tokens for layer in vary("padding", ARCH, lengths).layers] == [12, 0, 0]
    assert vary("padding", ARCH, Lengths(16, 16)) == ARCH
    uneven = replace(ARCH, layers=(ARCH.layers[0], replace(ARCH.layers[1], heads=2)))
    assert [(layer.heads, layer.shares) for layer in vary("shares", uneven, lengths).layers] == [(2, False), (2, True)]
    assert vary("", ARCH, lengths) == ARCH


class FakeGauge:
    """Measures what `truth` says, in shares of a budget of `budget_ms`."""

    how = "measured"
    teacher_ms = 10.0

    def __init__(self, truth, budget_ms: float) -> None:
        self.truth, self.budget_ms, self.runs = truth, budget_ms, []

    def used(self, plans):
        self.runs.append([arch for _, arch, _ in plans])
        return [self.truth(arch) / self.budget_ms for _, arch, _ in plans]

    def out_of_reach(self, used, shape):
        return f"out of reach: {used:.2f} of {shape}"


def hunt_of(truth, budget_ms, tmp_path, settings=None, score=harm, **ctx):
    settings = settings or Search(checks=6)
    surroundings = {
        "budget": Budget(speedup=10.0 / budget_ms), "strictness": 1.0, "progress": Silent(), "reshape": lambda a: a,
        "work": tmp_path, "seed": 0,
    }  # fmt: skip
    context = SimpleNamespace(**{**surroundings, **ctx})
    pool = pool_of(settings, score=score, steps=Steps(1, 32))
    gauge = FakeGauge(truth, budget_ms)
    return Hunt(settings, pool, gauge, SimpleNamespace(), 1.0, context), gauge


def crooked(arch: Arch) -> float:
    """Slower than predicted where it is shallow, quicker where it is deep."""
    return cost(arch) * {1: 1.3, 2: 1.1, 3: 0.8}[len(arch.layers)]


@pytest.mark.parametrize("budget_ms", [0.6, 0.8, 1.0, 1.3])
@pytest.mark.parametrize("truth", [cost, lambda arch: 1.25 * cost(arch), lambda arch: 0.7 * cost(arch), crooked])
def test_the_choice_uses_90_to_100_percent_of_the_budget_as_measured(truth, budget_ms, tmp_path):
    hunt, gauge = hunt_of(truth, budget_ms, tmp_path)
    plan = hunt.run()
    assert 0.9 <= truth(plan) / budget_ms <= 1.0
    assert len(gauge.runs) <= 6
    assert all(layer.neurons % 4 == 0 for layer in plan.layers)
    assert truth(plan) / budget_ms in [check["used"] for check in hunt.checks]


def test_without_a_shape_that_fits_the_smallest_is_named(tmp_path):
    hunt, _ = hunt_of(cost, 0.1, tmp_path)
    with pytest.raises(BudgetError, match="out of reach"):
        hunt.run()


def test_what_is_measured_is_what_will_ship(tmp_path):
    hunt, gauge = hunt_of(cost, 1.0, tmp_path, reshape=reshape)
    plan = hunt.run()
    assert all(arch.layers[-1].tokens == 1 for run in gauge.runs for arch in run)
    assert all(layer.plain for layer in plan.layers)


@pytest.mark.parametrize("truth", [cost, crooked])
def test_the_winner_of_the_short_distillations_is_brought_to_the_budget(truth, tmp_path, monkeypatch):
    settings = Search(checks=6, finalists=3)
    hunt, gauge = hunt_of(truth, 1.0, tmp_path, settings)
    tournament = Tournament(settings, hunt, SimpleNamespace(), even(), hunt.ctx)
    monkeypatch.setattr(Tournament, "label", lambda self, checkpoints: "label")
    monkeypatch.setattr("edgekd.search.tournament.Tryout", lambda *parts: lambda finalist, rung, steps: float(
        abs(len(finalist.arch.layers) - 2)
    ))  # fmt: skip
    plan = tournament.run()
    assert len(plan.layers) == 2
    assert 0.9 <= truth(plan) <= 1.0
    assert len(gauge.runs[0]) == 3
    assert {len(arch.layers) for arch in gauge.runs[0]} == {2, 3}
    assert len(gauge.runs) <= 6
    first = tournament.standings[0].finalist.arch
    assert plan == first or not CLOSE <= truth(first) <= 1.0
    assert [row["divergence"] for row in tournament.table()] == sorted(row["divergence"] for row in tournament.table())


def test_a_winner_that_fits_is_not_replaced_by_a_larger_loser(tmp_path):
    hunt, _ = hunt_of(cost, 1.0, tmp_path, Search(checks=6))
    winner, loser = (replace(ARCH, layers=tuple(replace(x, neurons=n) for x in ARCH.layers)) for n in (64, 96))
    hunt.measured = {winner: 0.93, loser: 0.97}
    assert hunt.refine(winner) == winner
    relu = replace(winner, layers=tuple(replace(x, activation="relu") for x in winner.layers))
    hunt.measured = {loser: 0.97, relu: 1.2}
    assert hunt.alike(relu) == [relu]


def test_shallower_layers_are_proposed_when_the_limit_falls():
    pool = pool_of(Search(strategy="greedy", finalists=0))
    depths = [{len(found.arch.layers) for found in pool.under(cost(ARCH) * share)} for share in (1.6, 0.5)]
    assert 1 not in depths[0]
    assert 1 in depths[1]


def test_a_supernet_s_shapes_are_those_that_were_trained():
    droppable, limit = (True, True, True), cost(ARCH) * 0.5
    depths = [kept_layers(droppable, keep) for keep in (2, 3)]
    bounded = Steps(1, 16, least=((2, 40), (1, 16), (3, 64)))
    for strategy in ("greedy", "exhaustive"):
        settings = Search(strategy=strategy, finalists=0, exhaustive_limit=10**6)
        pool = pool_of(settings, steps=bounded, depths=depths)
        shapes = [found.arch for found in pool.under(limit)]
        shapes += [pool.fitted(shape, limit) for shape in shapes[:5]]
        assert {tuple(layer.source for layer in shape.layers) for shape in shapes} <= set(depths)
        assert all(
            layer.heads >= bounded.least[layer.source][0] and layer.neurons >= bounded.least[layer.source][1]
            for shape in shapes
            for layer in shape.layers
        )
        free = pool_of(settings, steps=Steps(1, 16))
        assert {tuple(layer.source for layer in found.arch.layers) for found in free.under(limit)} - set(depths)
    space = Space.of(ARCH, droppable, Steps(2, 64), depths=depths)
    shapes = list(space.shapes())
    assert len(shapes) == len(set(shapes)) == space.size
    assert min(shapes, key=cost) == space.smallest()
    assert all(space.decode(space.encode(shape)) == shape for shape in shapes)


def test_savings_of_heads_and_neurons_are_told_apart():
    """Last layers of many heads and few neurons, or the other way round, are predicted as they are."""
    full = arch_of(depth=6, heads=12, neurons=1536, hidden=384)

    def saved(arch: Arch) -> float:
        return 0.02 + 0.03 * arch.layers[-1].heads + 0.0008 * arch.layers[-1].neurons

    pairs = [(shape, reshape(shape)) for shape in probes(full)]
    saving = fit_saving(pairs, [saved(before) for before, _ in pairs], [1.0] * len(pairs), layer_costs, 64)
    for heads, neurons in ((12, 128), (1, 1536), (1, 112), (12, 1536)):
        shape = arch_of(depth=4, heads=heads, neurons=neurons, hidden=384)
        assert saving(shape, reshape(shape), layer_costs) == pytest.approx(saved(shape), abs=0.02)


def test_savings_of_fewer_tokens_follow_them_through_the_layers():
    """Tokens that leave early save in every later layer; both ways to drop them are learnt together."""
    full, lengths = arch_of(depth=6, heads=12, neurons=1536, hidden=384), Lengths(64, 40)

    def ms(arch: Arch) -> float:
        total, left = 0.0, 64
        for layer in arch.layers:
            total += left / 64 * 0.05 * layer.heads
            left = layer.tokens or left
            total += left / 64 * 0.001 * layer.neurons + 0.01 * (layer.tokens > 1)
        return total

    pairs = [(shape, reshape(vary(name, shape, lengths))) for name in ("padding", "tokens") for shape in probes(full)]
    saved = [ms(before) - ms(after) for before, after in pairs]
    saving = fit_saving(pairs, saved, [ms(after) for _, after in pairs], layer_costs, 64)
    for name in ("padding", "tokens"):
        shape = arch_of(depth=5, heads=3, neurons=400, hidden=384)
        after = reshape(vary(name, shape, lengths))
        assert saving(shape, after, layer_costs) == pytest.approx(ms(shape) - ms(after), rel=0.05)


@pytest.mark.parametrize(
    ("most", "texts", "usual"), [(64, [10] * 9 + [60], 16), (64, [80] * 5, 64), (None, [5], 0), (64, [], 64)]
)
def test_the_usual_length_is_read_from_texts(most, texts, usual):
    assert Lengths.of(most, texts) == Lengths(most or 0, usual)


def test_without_a_winner_that_fits_the_best_finalist_within_the_budget_is_taken(tmp_path, monkeypatch):
    settings = Search(checks=6, finalists=3)
    hunt, _ = hunt_of(cost, 1.0, tmp_path, settings)
    tournament = Tournament(settings, hunt, SimpleNamespace(), even(), hunt.ctx)
    first, second, third = (replace(ARCH, layers=ARCH.layers[:depth]) for depth in (3, 2, 1))
    tournament.standings = [
        Standing(finalist=Finalist(arch=arch), rung=rung, steps=10, divergence=divergence)
        for arch, rung, divergence in ((first, 1, 0.1), (second, 0, 0.2), (third, 0, 0.3))
    ]
    hunt.measured = {first: 1.2, second: 0.8, third: 0.95}
    assert tournament.runner_up(third) == second
    hunt.measured = {first: 1.2, second: 1.1, third: 0.95}
    assert tournament.runner_up(first) == third
    hunt.measured = {first: 1.2, second: 1.1, third: 1.3}
    assert tournament.runner_up(second) == second


def test_a_measurement_that_was_off_does_not_bring_back_the_same_size(tmp_path):
    """The first seemed to need half of its time: what comes next lies between it and the one that was too slow."""
    hunt, _ = hunt_of(cost, 1.0, tmp_path, Search(checks=6))
    small, large = (replace(ARCH, layers=tuple(replace(x, neurons=n) for x in ARCH.layers)) for n in (32, 128))
    hunt.measured = {small: 0.6, large: 1.4}
    limit = hunt.between([small, large])
    assert limit == pytest.approx(cost(small) + (hunt.aim - 0.6) / 0.8 * (cost(large) - cost(small)))
    assert hunt.between([large]) is None
    found = hunt.refined(large)
    assert cost(small) < cost(found) <= limit
    hunt.measured = {small: 1.4, large: 0.6}
    assert hunt.between([small, large]) is None
