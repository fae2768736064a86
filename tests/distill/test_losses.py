"""Laws every distillation loss keeps, and a few values worked out by hand."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from edgekd.distill.losses import LOSSES, Loss
from edgekd.distill.losses.affinity import feature_affinity, feature_affinity_fast
from edgekd.distill.losses.attention import attention_kl, minilm
from edgekd.distill.losses.feature import attention_output_mse, hidden_mse, raw_hidden_mse, squarehead
from edgekd.distill.losses.logit import cross_entropy, dkd, forward_kl, mse, nkd, soft_cross_entropy, ttm, wttm
from edgekd.distill.losses.relation import rkd

SAMPLES, CLASSES, TOKENS, WIDTH = 8, 5, 6, 12
# Their least value is above zero, or is not where both logits are equal.
NOT_ZERO_AT_TEACHER = {"cross_entropy", "nkd", "sinkd", "soft_cross_entropy", "ttm", "wttm"}
NAMES = sorted(LOSSES)

Make = Callable[[int], Any]


def _states(seed: int) -> Tensor:
    return torch.randn(SAMPLES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


SIGNALS: dict[str, Make] = {
    "logits": lambda seed: 2 * torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(seed)),
    "labels": lambda seed: 2 * torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(seed)),
    "hidden": lambda seed: [_states(seed)[_mask()], _states(seed + 100)[_mask()]],
    "embedding": lambda seed: _states(seed)[:, 0],
    "qkv": lambda seed: tuple(_states(seed + i) for i in (100, 200, 300)),
    "states": lambda seed: [_states(seed)[_mask()], _states(seed + 100)[_mask()]],
    "outputs": lambda seed: [_states(seed)[_mask()], _states(seed + 100)[_mask()]],
    "maps": lambda seed: [_maps(seed), _maps(seed + 100)],
    "features": lambda seed: [_states(seed), _states(seed + 100)],
}
ROWS = ("hidden", "states", "outputs")


def _maps(seed: int) -> Tensor:
    """Attention `[B, 3, S, S]` that leaves padding out; where a row is all padding, it is even."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(SAMPLES, 3, TOKENS, TOKENS, generator=generator)
    return scores.masked_fill(~_mask()[:, None, None, :], -1e4).softmax(-1)


def _mask() -> Tensor:
    lengths = torch.tensor([6, 5, 4, 3, 2, 6, 1, 4])
    return torch.arange(TOKENS)[None, :] < lengths[:, None]


def _labels() -> Tensor:
    return torch.arange(SAMPLES) % CLASSES


def _map(signal: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(signal) if isinstance(signal, Tensor) else type(signal)(change(part) for part in signal)


def _call(loss: Loss, student: Any, teacher: Any, mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
    values = {"mask": _mask() if mask is None else mask, "labels": _labels() if labels is None else labels}
    second = values["labels"] if loss.needs[0] == "labels" else teacher
    torch.manual_seed(0)  # for those that draw noise
    return loss.function(student, second, **{need: values[need] for need in loss.needs[1:]})


def _tensors(signal: Any) -> list[Tensor]:
    return [signal] if isinstance(signal, Tensor) else list(signal)


@pytest.mark.parametrize("name", sorted(set(NAMES) - NOT_ZERO_AT_TEACHER))
def test_equal_signals_give_zero_and_no_gradient(name: str) -> None:
    loss = LOSSES[name]
    teacher = SIGNALS[loss.needs[0]](1)
    student = _map(teacher, lambda t: t.clone().requires_grad_())
    # Maps are the result of a softmax, which takes no notice of a gradient that is the same all along a row.
    shown = _map(student, lambda t: t.clamp_min(1e-30).log().softmax(-1)) if "maps" in loss.needs else student
    value = _call(loss, shown, teacher)
    value.backward()
    assert abs(value.item()) < 1e-5
    assert all(t.grad is not None and t.grad.abs().max() < 1e-4 for t in _tensors(student))


@pytest.mark.parametrize("name", NAMES)
def test_values_are_nonnegative_scalars_in_fp32(name: str) -> None:
    loss = LOSSES[name]
    for seed in range(3):
        value = _call(loss, SIGNALS[loss.needs[0]](seed), SIGNALS[loss.needs[0]](seed + 7))
        assert (value.shape, value.dtype) == ((), torch.float32)
        assert value.item() >= 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_low_precision_inputs_stay_finite(name: str, dtype: torch.dtype, scale: float) -> None:
    loss = LOSSES[name]
    make = SIGNALS[loss.needs[0]]
    student = _map(make(1), lambda t: (scale * t).to(dtype).requires_grad_())
    value = _call(loss, student, _map(make(2), lambda t: (scale * t).to(dtype)))
    value.backward()
    assert torch.isfinite(value)
    assert all(t.grad is not None and torch.isfinite(t.grad).all() for t in _tensors(student))


@pytest.mark.parametrize("name", NAMES)
def test_only_the_student_gets_a_gradient(name: str) -> None:
    loss = LOSSES[name]
    make = SIGNALS[loss.needs[0]]
    student = _map(make(1), lambda t: t.requires_grad_())
    teacher = _map(make(2), lambda t: t.requires_grad_())
    _call(loss, student, teacher).backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in _tensors(student))
    assert all(t.grad is None for t in _tensors(teacher))


@pytest.mark.parametrize("name", [name for name in NAMES if "mask" in LOSSES[name].needs])
def test_padding_has_no_influence(name: str) -> None:
    loss = LOSSES[name]
    make = SIGNALS[loss.needs[0]]
    padded = (~_mask())[:, None, :, None] if "maps" in loss.needs else (~_mask())[..., None]
    student = _map(make(1), lambda t: t.requires_grad_())
    value = _call(loss, student, make(2))
    value.backward()
    changed = _call(
        loss, _map(make(1), lambda t: t.masked_fill(padded, 9.0)), _map(make(2), lambda t: t.masked_fill(padded, -5.0))
    )
    assert torch.allclose(value, changed, atol=1e-6)
    assert all((t.grad * padded).abs().max() == 0 for t in _tensors(student))


@pytest.mark.parametrize("name", NAMES)
def test_order_of_the_batch_does_not_matter(name: str) -> None:
    loss = LOSSES[name]
    make = SIGNALS[loss.needs[0]]
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(3))
    value = _call(loss, make(1), make(2))
    tokens = torch.randperm(int(_mask().sum()), generator=torch.Generator().manual_seed(4))
    rows = tokens if loss.needs[0] in ROWS else order
    student, teacher = (_map(make(seed), lambda t: t[rows]) for seed in (1, 2))
    shuffled = _call(loss, student, teacher, mask=_mask()[order], labels=_labels()[order])
    assert torch.allclose(value, shuffled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_cites_or_explains_itself_and_is_keyed_by_its_name(name: str) -> None:
    loss = LOSSES[name]
    assert loss.name == name
    assert inspect.getdoc(loss.function)
    assert all(isinstance(value, int | float) for value in loss.defaults.values())


def test_forward_kl_by_hand() -> None:
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert forward_kl(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert forward_kl(2 * student, 2 * teacher, temperature=2.0).item() == pytest.approx(4 * expected, rel=1e-5)


def test_forward_kl_is_a_mean_over_samples() -> None:
    student, teacher = SIGNALS["logits"](1), SIGNALS["logits"](2)
    twice = forward_kl(torch.cat([student, student]), torch.cat([teacher, teacher]))
    assert torch.allclose(twice, forward_kl(student, teacher))


def test_cross_entropy_and_mse_agree_with_torch() -> None:
    student, teacher = SIGNALS["logits"](1), SIGNALS["logits"](2)
    assert torch.allclose(cross_entropy(student, _labels()), torch.nn.functional.cross_entropy(student, _labels()))
    assert torch.allclose(mse(student, teacher), torch.nn.functional.mse_loss(student, teacher))


def test_nkd_of_two_classes_is_weighted_cross_entropy() -> None:
    student, teacher, labels = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([0])
    assert nkd(student, teacher, labels).item() == pytest.approx(1.75 * math.log(2), rel=1e-5)


def test_dkd_of_two_classes_is_kl() -> None:
    student, teacher = SIGNALS["logits"](1)[:, :2], SIGNALS["logits"](2)[:, :2]
    labels = torch.zeros(SAMPLES, dtype=torch.int64)
    assert torch.allclose(dkd(student, teacher, labels, temperature=4.0), forward_kl(student, teacher, temperature=4.0))


def test_dkd_parts_make_up_kl() -> None:
    """KL = TCKD + (1 - p_t) NCKD when all rows share p_t."""
    student = SIGNALS["logits"](1)[:1]
    teacher, labels = SIGNALS["logits"](2)[:1], torch.zeros(1, dtype=torch.int64)
    rest = 1 - teacher.softmax(-1)[0, 0].item()
    both = dkd(student, teacher, labels, beta=rest, temperature=1.0)
    assert torch.allclose(both, forward_kl(student, teacher), rtol=1e-4)


def test_ttm_is_least_at_the_powered_teacher() -> None:
    teacher = SIGNALS["logits"](1)
    assert ttm(0.1 * teacher, teacher, gamma=0.1).item() == pytest.approx(0, abs=1e-6)
    assert wttm(0.2 * teacher, teacher, gamma=0.2).item() == pytest.approx(0, abs=1e-5)


def test_wttm_weight_of_a_uniform_teacher() -> None:
    student, teacher = SIGNALS["logits"](1), torch.zeros(SAMPLES, CLASSES)
    expected = ttm(student, teacher, gamma=0.2) * CLASSES**0.8
    assert torch.allclose(wttm(student, teacher, gamma=0.2), expected, rtol=1e-5)


def test_sinkd_is_smaller_at_the_teacher_than_elsewhere() -> None:
    sinkd, teacher = LOSSES["sinkd"].function, SIGNALS["logits"](1)
    assert sinkd(teacher, teacher) < sinkd(SIGNALS["logits"](2), teacher)


def test_squarehead_by_hand() -> None:
    teacher, student = torch.full((2, 3), 2.0), torch.full((2, 3), 3.0)
    assert squarehead([student, teacher], [teacher, teacher]).item() == pytest.approx(0.25)
    assert squarehead([student, student], [teacher, teacher]).item() == pytest.approx(0.5)


def test_hidden_mse_ignores_scale_and_shift_of_a_token() -> None:
    states = SIGNALS["hidden"](1)
    assert hidden_mse([3 * states[0] + 1], [states[0]]).item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("student_width", "teacher_width"), [(12, 48), (20, 48), (7, 12)])
def test_minilm_takes_other_widths(student_width: int, teacher_width: int) -> None:
    student = tuple(torch.randn(SAMPLES, TOKENS, student_width) for _ in range(3))
    teacher = tuple(torch.randn(SAMPLES, TOKENS, teacher_width) for _ in range(3))
    assert minilm(student, teacher, _mask()).item() > 0


def test_minilm_by_hand() -> None:
    """Two tokens, one relation head of width 1: a softmax over products."""
    mask = torch.tensor([[True, True]])
    student, teacher = torch.zeros(1, 2, 1), torch.tensor([[[0.0], [1.0]]])
    p = math.e / (1 + math.e)
    row = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    value = minilm((student,) * 3, (teacher,) * 3, mask, relation_heads=1)
    assert value.item() == pytest.approx(3 * row / 2, rel=1e-5)


def test_rkd_does_not_see_rotation_or_scale() -> None:
    embeddings = SIGNALS["embedding"](1)
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5)))[0]
    assert rkd(4 * embeddings @ rotation, embeddings).item() == pytest.approx(0, abs=1e-5)


def test_soft_cross_entropy_is_forward_kl_and_the_teacher_s_entropy() -> None:
    student, teacher = SIGNALS["logits"](1), SIGNALS["logits"](2)
    entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1).mean()
    assert torch.allclose(soft_cross_entropy(student, teacher), forward_kl(student, teacher) + entropy)


def test_raw_differences_are_summed_over_layers() -> None:
    zero, one = torch.zeros(3, 4), torch.ones(3, 4)
    for loss in (raw_hidden_mse, attention_output_mse):
        assert loss([one, 2 * one], [zero, zero]).item() == pytest.approx(1 + 4)


def test_attention_kl_by_hand() -> None:
    """Two examples, one with a padded token, one head: mean over query rows, then over examples."""
    mask = torch.tensor([[True, True], [True, False]])
    even, sharp = torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.25])
    student = torch.stack([torch.stack([even, even]), torch.tensor([[1.0, 0.0], [0.3, 0.7]])])[:, None]
    teacher = torch.stack([torch.stack([sharp, even]), torch.tensor([[1.0, 0.0], [0.9, 0.1]])])[:, None]
    row = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert attention_kl([student], [teacher], mask).item() == pytest.approx((row / 2 + 0) / 2, rel=1e-5)
    assert attention_kl([student] * 2, [teacher] * 2, mask).item() == pytest.approx(row / 2, rel=1e-5)


def test_attention_kl_stays_finite_where_the_student_attends_to_nothing() -> None:
    student, teacher = torch.eye(2)[None, None].requires_grad_(), torch.eye(2).flip(0)[None, None]
    value = attention_kl([student], [teacher], torch.ones(1, 2, dtype=torch.bool))
    value.backward()
    assert value.item() == pytest.approx(-math.log(1e-8), rel=1e-4)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_feature_affinity_by_hand() -> None:
    """Two positions: their cosine is 1 for the student and 0 for the teacher, in two of four entries."""
    student, teacher = torch.tensor([[[1.0, 1.0], [2.0, 2.0]]]), torch.tensor([[[3.0, 0.0, 0.0], [0.0, 5.0, 0.0]]])
    assert feature_affinity([student], [teacher]).item() == pytest.approx(0.5, rel=1e-4)


def test_affinities_do_not_see_rotation_or_scale() -> None:
    features = SIGNALS["features"](1)[0]
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5)))[0]
    for loss in (feature_affinity, feature_affinity_fast):
        assert loss([4 * features @ rotation], [features]).item() == pytest.approx(0, abs=1e-4)


def test_fast_affinity_draws_fresh_noise_from_torch_s_generator() -> None:
    student, teacher = SIGNALS["features"](1), SIGNALS["features"](2)
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append([feature_affinity_fast(student, teacher).item() for _ in range(2)])
    assert values[0] == values[1] != values[2]
    assert values[0][0] != values[0][1]


def test_fast_affinity_is_the_product_of_exact_differences_with_noise() -> None:
    student, teacher = SIGNALS["features"](1)[:1], SIGNALS["features"](2)[:1]
    torch.manual_seed(3)
    fast = feature_affinity_fast(student, teacher, columns=4)
    torch.manual_seed(3)
    noise = torch.randn(TOKENS, 4)
    unit = [each[0] / each[0].norm(dim=-1, keepdim=True) for each in (student, teacher)]
    difference = (unit[0] @ unit[0].transpose(1, 2) - unit[1] @ unit[1].transpose(1, 2)) @ noise
    assert torch.allclose(fast, difference.abs().sum(1).mean() / TOKENS**2, rtol=1e-4)
