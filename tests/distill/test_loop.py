"""Laws of the training loop, on a small network with dropout and batch statistics."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from edgekd.context import Silent
from edgekd.distill.job import Job, Outcome
from edgekd.distill.loop import train
from edgekd.distill.schedule import SCHEDULES, rate_at
from edgekd.distill.settings import Training
from edgekd.errors import RecipeError

SAMPLES = 50


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 6, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def _plan(epoch: int) -> list[np.ndarray]:
    return np.array_split(np.random.default_rng(epoch).permutation(SAMPLES), 7)


def make_job(metrics: list[float] | None = None, **changes: Any) -> tuple[Net, Job]:
    torch.manual_seed(7)
    net, (x, y) = Net(), _data()
    scores = iter(metrics or [])

    def evaluate() -> float:
        if metrics is not None:
            return next(scores)
        with torch.no_grad():
            return float((net(x).argmax(-1) == y).float().mean())

    job = Job(
        modules=net,
        plan=changes.get("plan", _plan),
        collate=lambda indices: {"x": x[torch.from_numpy(indices)]},
        loss=changes.get(
            "loss", lambda batch, i: nn.functional.cross_entropy(net(batch["x"]).float(), y[torch.from_numpy(i)])
        ),
        evaluate=evaluate,
        after_step=changes.get("after_step"),
    )
    return net, job


def _run(job: Job, work: Path, **settings: Any) -> Outcome:
    values = {"learning_rate": 0.01, "epochs": 3, "precision": "fp32", **settings}
    return train(job, Training(**values), seed=1, work=work, progress=Silent())


def _bits(net: nn.Module) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in net.state_dict().values()]


class Kill(BaseException):
    """Stands for SIGKILL: nothing gets to clean up."""


def _killer(at: int) -> Callable[[], None]:
    left = [at]

    def after_step() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Kill

    return after_step


def test_it_learns(tmp_path: Path) -> None:
    net, job = make_job()
    outcome = _run(job, tmp_path, epochs=12)
    assert outcome.metric > 0.8
    assert outcome.steps == 12 * 7
    assert outcome.metric == job.evaluate()
    assert not net.training


def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    nets = []
    for name in "ab":
        net, job = make_job()
        _run(job, tmp_path / name)
        nets.append(_bits(net))
    assert nets[0] == nets[1]


@pytest.mark.parametrize("at", [1, 2, 6, 7, 8, 13, 21])
@pytest.mark.parametrize(
    "settings",
    [{}, {"ema": 0.9, "gradient_accumulation": 2, "schedule": "cosine"}, {"evaluate_steps": 4, "precision": "bf16"}],
    ids=["plain", "ema", "often"],
)
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, at: int, settings: dict[str, Any]) -> None:
    whole, job = make_job()
    expected = _run(job, tmp_path / "whole", **settings)
    _, job = make_job(after_step=_killer(at))
    if at <= expected.steps:
        with pytest.raises(Kill):
            _run(job, tmp_path / "killed", checkpoint_steps=2, **settings)
    resumed, job = make_job()
    outcome = _run(job, tmp_path / "killed", checkpoint_steps=2, **settings)
    assert _bits(resumed) == _bits(whole)
    assert outcome == expected


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    whole, job = make_job()
    expected = _run(job, tmp_path)
    again, job = make_job(after_step=_killer(1))
    assert _run(job, tmp_path) == expected
    assert _bits(again) == _bits(whole)


def test_a_checkpoint_of_another_run_is_ignored(tmp_path: Path) -> None:
    _, job = make_job()
    _run(job, tmp_path, learning_rate=0.02)
    used, job = make_job()
    _run(job, tmp_path)
    fresh, job = make_job()
    _run(job, tmp_path / "fresh")
    assert _bits(used) == _bits(fresh)


def test_a_damaged_checkpoint_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"\x00" * 40)
    net, job = make_job()
    _run(job, tmp_path)
    fresh, job = make_job()
    _run(job, tmp_path / "fresh")
    assert _bits(net) == _bits(fresh)


def test_checkpoints_hold_fp32_and_no_half_written_file_stays(tmp_path: Path) -> None:
    _, job = make_job()
    _run(job, tmp_path, precision="bf16")
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    tensors = load_file(tmp_path / "checkpoint.safetensors")
    groups = {name.partition("/")[0] for name in tensors}
    assert groups == {"weights", "moments", "best", "rng"}
    floating = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    assert floating == {torch.float32}


def test_the_best_weights_are_kept_and_the_earlier_ones_at_a_tie(tmp_path: Path) -> None:
    seen: list[list[bytes]] = []
    net, job = make_job(metrics=[0.5, 0.8, 0.8, 0.7])
    evaluate = job.evaluate

    def record() -> float:
        seen.append(_bits(net))
        return evaluate()

    outcome = _run(Job(**{**vars(job), "evaluate": record}), tmp_path, epochs=4)
    assert (outcome.metric, outcome.best_step) == (0.8, 14)
    assert _bits(net) == seen[1]


def test_the_last_step_is_evaluated_once(tmp_path: Path) -> None:
    _, job = make_job()
    outcome = _run(job, tmp_path, epochs=2, evaluate_steps=7)
    assert [each["step"] for each in outcome.history] == [7, 14]
    assert all(each["loss"] > 0 for each in outcome.history)


def test_patience_stops_early(tmp_path: Path) -> None:
    _, job = make_job(metrics=[0.5, 0.4, 0.5, 0.6])
    outcome = _run(job, tmp_path, epochs=4, patience=2)
    assert [entry["metric"] for entry in outcome.history] == [0.5, 0.4, 0.5]
    assert outcome.steps == 21


def test_accumulated_batches_act_like_one_large_batch(tmp_path: Path) -> None:
    """Batches of unequal size, weighted by their samples; without dropout and batch statistics."""
    weights = []
    for size, accumulation in ((24, 1), (8, 3)):
        net, job = make_job(plan=lambda epoch, size=size: [np.arange(i, min(i + size, 20)) for i in range(0, 20, size)])
        net.layers[1], net.layers[3] = nn.Identity(), nn.Identity()
        _run(job, tmp_path / str(size), gradient_accumulation=accumulation, epochs=2)
        weights.append(net.layers[0].weight.detach())
    assert torch.allclose(*weights, atol=1e-6)


def test_weight_decay_spares_vectors(tmp_path: Path) -> None:
    net, job = make_job(loss=lambda batch, i: sum(p.sum() for p in net.parameters()) * 0.0)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    _run(job, tmp_path, weight_decay=0.5, warmup=0.0)
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name]) == (parameter.dim() == 1)


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    net, job = make_job()
    net.layers[0].weight.requires_grad_(False)
    before = net.layers[0].weight.clone()
    _run(job, tmp_path)
    assert torch.equal(net.layers[0].weight, before)
    assert "weights/layers.0.weight" not in load_file(tmp_path / "checkpoint.safetensors")


def test_a_diverged_run_says_what_to_do(tmp_path: Path) -> None:
    net, job = make_job(loss=lambda batch, i: net(batch["x"]).sum() * float("inf"))
    with pytest.raises(
        RecipeError, match=r"training diverged before step 7: the loss is (inf|-inf|nan); set learning_"
    ):
        _run(job, tmp_path)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_the_rate_ramps_up_then_never_rises(schedule: str) -> None:
    rates = [rate_at(step, 100, warmup=0.1, schedule=schedule) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert all(0 <= later <= earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert rate_at(0, 100, warmup=0.0, schedule=schedule) == 1


_CHILD = """
import sys, time, torch
from pathlib import Path
sys.path.insert(0, {folder!r})
torch.set_num_threads(1)
import test_loop as t
net, job = t.make_job(after_step=lambda: time.sleep(float(sys.argv[2])))
t._run(job, Path(sys.argv[1]), epochs=6, checkpoint_steps=1)
Path(sys.argv[1], "bits").write_bytes(b"".join(t._bits(net)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.4, 1.1])
def test_sigkill_then_resume_gives_the_same_bits(tmp_path: Path, delay: float) -> None:
    code = _CHILD.format(folder=str(Path(__file__).parent))

    def start(name: str, pause: float) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code, str(tmp_path / name), str(pause)])

    assert start("whole", 0).wait() == 0
    child = start("killed", 0.06)
    checkpoint = tmp_path / "killed" / "checkpoint.safetensors"
    while not checkpoint.exists() and child.poll() is None:
        pass
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(timeout=delay)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert start("killed", 0).wait() == 0
    assert (tmp_path / "killed" / "bits").read_bytes() == (tmp_path / "whole" / "bits").read_bytes()


_RANK = """
import sys, torch
from pathlib import Path
import numpy as np
sys.path.insert(0, {folder!r})
torch.set_num_threads(1)
import test_loop as t
from edgekd.distill.processes import this_process
net, job = t.make_job(plan=lambda epoch: [np.arange(i, i + 5) for i in range(0, 45, 5)])
net.layers[1], net.layers[3] = torch.nn.Identity(), torch.nn.Identity()
t._run(job, Path(sys.argv[1]), gradient_accumulation=int(sys.argv[2]), checkpoint_steps=2)
if this_process().main:
    Path(sys.argv[1], "weights").write_bytes(net.layers[0].weight.detach().numpy().tobytes())
"""


@pytest.mark.slow
def test_two_processes_act_like_accumulating_two_batches(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(_RANK.format(folder=str(Path(__file__).parent)))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--main_process_port", "29611", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no"]
    subprocess.run([*launch, str(script), str(tmp_path / "two"), "1"], check=True, timeout=200)
    subprocess.run([sys.executable, str(script), str(tmp_path / "one"), "2"], check=True, timeout=100)
    two, one = (np.frombuffer((tmp_path / name / "weights").read_bytes(), np.float32) for name in ("two", "one"))
    assert np.allclose(two, one, atol=1e-6)
