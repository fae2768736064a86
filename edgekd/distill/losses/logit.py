"""Losses on logits `[N, C]`: summed over classes, averaged over N (see each function for its temperature scale)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekd.distill.losses.loss import Loss, table

if TYPE_CHECKING:
    from torch import Tensor


def _kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher ‖ student) of log-probabilities `[N, C]`, one value per row `[N]`."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """-log q of the true class: logits `[N, C]`, labels int64 `[N]`."""
    return -student.float().log_softmax(-1).gather(-1, labels[:, None]).mean()


def forward_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL of tempered class probabilities, times the squared temperature.

    Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
    """
    teacher_log = (teacher.detach().float() / temperature).log_softmax(-1)
    student_log = (student.float() / temperature).log_softmax(-1)
    return _kl(teacher_log, student_log).mean() * temperature**2


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """-Σ p log q of the teacher's and the student's probabilities: `forward_kl` plus what no student can change.

    Kim et al. 2022, "Understanding and Improving Knowledge Distillation for Quantization-Aware Training of Large
    Transformer Encoders", arXiv:2211.11014.
    """
    return -(teacher.detach().float().softmax(-1) * student.float().log_softmax(-1)).sum(-1).mean()


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of raw logits.

    Ba, Caruana 2014, "Do Deep Nets Really Need to be Deep?", arXiv:1312.6184.
    """
    return (student.float() - teacher.detach().float()).square().mean()


def standardized_kl(student: Tensor, teacher: Tensor, *, temperature: float = 2.0) -> Tensor:
    """KL of tempered probabilities after each row of logits is brought to mean 0 and deviation 1, times T².

    Sun et al. 2024, "Logit Standardization in Knowledge Distillation", arXiv:2403.01427; weight about 9 there. Of two
    logits only the order is left, so it takes three classes or more.
    """
    return forward_kl(_z_score(student), _z_score(teacher), temperature=temperature)


def _z_score(logits: Tensor) -> Tensor:
    logits = logits.float()
    centred = logits - logits.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-7).sqrt()


def nkd(student: Tensor, teacher: Tensor, labels: Tensor, *, gamma: float = 1.5, temperature: float = 1.0) -> Tensor:
    """Normalized KD: cross-entropy, plus it weighted by the teacher's target probability, plus the other classes.

    -log q_t - p_t log q_t - gamma T² Σ_{i≠t} p̂_i log q̂_i, with p̂, q̂ tempered softmaxes over the other classes.
    Two classes leave the last term empty. Yang et al. 2023, arXiv:2303.13005.
    """
    target = labels[:, None]
    student_log = student.float().log_softmax(-1).gather(-1, target).squeeze(-1)
    teacher_target = teacher.detach().float().softmax(-1).gather(-1, target).squeeze(-1)
    others = -(_others(teacher.detach(), target, temperature).exp() * _others(student, target, temperature)).sum(-1)
    return (-(1 + teacher_target) * student_log + gamma * temperature**2 * others).mean()


def _others(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Tempered log-probabilities over the C-1 classes that are not the target: `[N, C-1]`."""
    keep = logits.new_ones(logits.shape).scatter(-1, target, 0.0) > 0
    rest = logits.float()[keep].view(logits.shape[0], logits.shape[1] - 1)
    return (rest / temperature).log_softmax(-1)


def ttm(student: Tensor, teacher: Tensor, *, gamma: float = 0.1) -> Tensor:
    """Transformed teacher matching: KL from the teacher raised to the power gamma to the untempered student.

    Zheng, Yang 2024, arXiv:2402.11148; no T² scale; weight 45 with gamma 0.1 there.
    """
    return _kl(_power(teacher, gamma), student.float().log_softmax(-1)).mean()


def wttm(student: Tensor, teacher: Tensor, *, gamma: float = 0.2) -> Tensor:
    """`ttm` with each row weighted by Σ_j p_j^gamma, so that uncertain rows count more.

    Zheng, Yang 2024, arXiv:2402.11148; weights an order of magnitude below those of `ttm`.
    """
    weight = (gamma * teacher.detach().float().log_softmax(-1)).logsumexp(-1).exp()
    return (weight * _kl(_power(teacher, gamma), student.float().log_softmax(-1))).mean()


def _power(teacher: Tensor, gamma: float) -> Tensor:
    return (gamma * teacher.detach().float().log_softmax(-1)).log_softmax(-1)


def luminet(student: Tensor, teacher: Tensor, *, alpha: float = 2.0, temperature: float = 0.7) -> Tensor:
    """KL of logits standardized per class over the batch, times alpha² (not T²).

    Hossain et al. 2025, arXiv:2310.03669. Batch statistics are noisy below about 64 rows.
    """
    student_log = (_standardize(student) / temperature).log_softmax(-1)
    teacher_log = (_standardize(teacher.detach()) / temperature).log_softmax(-1)
    return alpha**2 * _kl(teacher_log, student_log).mean()


def _standardize(logits: Tensor) -> Tensor:
    logits = logits.float()
    centred = logits - logits.mean(0, keepdim=True)
    return centred / (centred.square().mean(0, keepdim=True) + 1e-5).sqrt()


def sinkd(
    student: Tensor, teacher: Tensor, *, temperature: float = 2.0, smoothing: float = 0.1, iterations: int = 20
) -> Tensor:
    """Cost of the Sinkhorn plan `[N, N]` between the rows' tempered probabilities under the L1 distance.

    Scales with N; weight 0.001 at N=16 in the paper. Cui et al. 2024, arXiv:2402.17110.
    """
    p = (student.float() / temperature).softmax(-1)
    q = (teacher.detach().float() / temperature).softmax(-1)
    cost = (p[:, None] - q[None]).abs().sum(-1)
    plan = (-cost / smoothing).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * cost).sum()


def dkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 2.0,
    temperature: float = 4.0,
) -> Tensor:
    """Decoupled KD: binary KL on the target class plus KL over the others, both times T².

    Two classes leave the second term empty. Zhao et al. 2022, arXiv:2203.08679.
    """
    target = labels[:, None]
    student_target, student_rest = _binary(student, target, temperature)
    teacher_target, teacher_rest = _binary(teacher.detach(), target, temperature)
    binary = teacher_target.exp() * (teacher_target - student_target)
    binary = binary + teacher_rest.exp() * (teacher_rest - student_rest)
    others = _kl(_others(teacher.detach(), target, temperature), _others(student, target, temperature))
    return (alpha * binary + beta * others).mean() * temperature**2


def _binary(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the target and of all other classes together: `[N]` each."""
    log = (logits.float() / temperature).log_softmax(-1)
    return log.gather(-1, target).squeeze(-1), log.scatter(-1, target, float("-inf")).logsumexp(-1)


def dist(
    student: Tensor, teacher: Tensor, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """One minus the Pearson correlation of probabilities, over classes (beta) and over the batch (gamma), times T².

    Two classes leave the first of the two constant. Huang et al. 2022, "Knowledge Distillation from A Stronger
    Teacher", arXiv:2205.10536.
    """
    p = (student.float() / temperature).softmax(-1)
    q = (teacher.detach().float() / temperature).softmax(-1)
    between = beta * (1 - _pearson(p, q)).mean() + gamma * (1 - _pearson(p.T, q.T)).mean()
    return between * temperature**2


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of the rows of two `[N, C]` matrices: `[N]`."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return (a * b).sum(-1) / (_length(a) * _length(b))


def _length(rows: Tensor) -> Tensor:
    return (rows.square().sum(-1) + 1e-16).sqrt()


LOGIT = table(
    Loss(name="cross_entropy", function=cross_entropy, needs=("labels",)),
    Loss(name="forward_kl", function=forward_kl),
    Loss(name="soft_cross_entropy", function=soft_cross_entropy),
    Loss(name="mse", function=mse),
    Loss(name="standardized_kl", function=standardized_kl, classes=3),
    Loss(name="nkd", function=nkd, needs=("logits", "labels")),
    Loss(name="ttm", function=ttm),
    Loss(name="wttm", function=wttm),
    Loss(name="luminet", function=luminet),
    Loss(name="sinkd", function=sinkd),
    Loss(name="dkd", function=dkd, needs=("logits", "labels")),
    Loss(name="dist", function=dist),
)
