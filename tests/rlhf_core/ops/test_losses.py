"""The terms of the PPO loss. B responses, R response tokens, N elements."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import EXACT, F32_CANCELLED, F32_OP, F64_OP, Tolerance
from torch import Tensor
from torch.testing import assert_close

from rlhf_core.ops.kl import MAX_LOG_RATIO
from rlhf_core.ops.losses import (
    approx_kl,
    clipped_surrogate,
    clipped_value_loss,
    explained_variance,
    importance_weights,
    log_ratio,
)
from rlhf_core.ops.masking import masked_mean, masked_sum

GOLDEN = Path(__file__).parents[2] / "golden"
TRL = json.loads((GOLDEN / "trl.json").read_text())["cases"]
RLAX = json.loads((GOLDEN / "jax.json").read_text())["cases"]
SKLEARN = json.loads((GOLDEN / "scientific.json").read_text())["cases"]["explained_variance"]
EXAMPLES = settings(max_examples=30)
LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**32 - 1)
CLIP_RANGES = st.floats(0.05, 0.9)


def right_padded(lengths: list[int], width: int = 6) -> Tensor:
    return torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]


def draw(seed: int, *shape: int, std: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (std * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def tolerance(dtype: torch.dtype) -> Tolerance:
    return F64_OP if dtype == torch.float64 else F32_OP


# --- importance weights


def test_importance_weights_by_hand() -> None:
    # token: e^{-1 + 1.5} = e^0.5, cut at 1.5;  e^{-2 + 1} = e^-1;  masked: 1.  sequence: e^{0.5 - 1} = e^-0.5
    now_BR, drawn_BR = torch.tensor([[-1.0, -2.0, 5.0]]), torch.tensor([[-1.5, -1.0, math.nan]])
    mask_BR = right_padded([2], 3)
    by_token = importance_weights(now_BR, drawn_BR, mask_BR, level="token", cap=1.5)
    assert_close(by_token, torch.tensor([[1.5, math.exp(-1.0), 1.0]]), **F32_OP)
    by_sequence = importance_weights(now_BR, drawn_BR, mask_BR, level="sequence", cap=1.5)
    assert_close(by_sequence, torch.tensor([math.exp(-0.5)]), **F32_OP)


def test_weighted_samples_of_another_policy_have_the_mean_of_the_own() -> None:
    """What importance weights are for: E_q[w f] = E_p[f], here summed over the whole support instead of sampled."""
    logits_p, logits_q, f = draw(7, 6), draw(8, 6), draw(9, 6)
    p, q = logits_p.log_softmax(0), logits_q.log_softmax(0)
    weights = importance_weights(p[:, None], q[:, None], right_padded([1] * 6, 1), level="token", cap=1e6)[:, 0]
    assert_close((q.exp() * weights * f).sum(), (p.exp() * f).sum(), **F64_OP)


def test_importance_weights_have_no_gradient_and_need_a_cap_of_at_least_one() -> None:
    now_BR = torch.zeros(1, 2, requires_grad=True)
    mask_BR = right_padded([2], 2)
    assert not importance_weights(now_BR, torch.zeros(1, 2), mask_BR, level="token", cap=1.0).requires_grad
    with pytest.raises(ValueError, match=r"cap must be at least 1, got 0\.5"):
        importance_weights(now_BR, torch.zeros(1, 2), mask_BR, level="token", cap=0.5)


# --- log-ratio


def test_log_ratio_by_hand() -> None:
    # token: -1 - (-1.5) = 0.5;  -2 - (-1) = -1;  sequence: 0.5 - 1 = -0.5
    logprobs_BR, old_logprobs_BR = torch.tensor([[-1.0, -2.0, 5.0]]), torch.tensor([[-1.5, -1.0, math.nan]])
    mask_BR = right_padded([2], 3)
    assert_close(
        log_ratio(logprobs_BR, old_logprobs_BR, mask_BR, level="token"), torch.tensor([[0.5, -1.0, 0.0]]), **EXACT
    )
    assert_close(log_ratio(logprobs_BR, old_logprobs_BR, mask_BR, level="sequence"), torch.tensor([-0.5]), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(3))
def test_log_ratio_agrees_with_a_loop(seed: int, dtype: torch.dtype) -> None:
    lengths = [6, 3, 1]
    mask_BR = right_padded(lengths)
    logprobs_BR, old_logprobs_BR = draw(seed, 3, 6, dtype=dtype), draw(seed + 1, 3, 6, dtype=dtype)
    expected_BR = torch.zeros(3, 6, dtype=torch.float64)
    for b, n in enumerate(lengths):
        for t in range(n):
            expected_BR[b, t] = logprobs_BR[b, t].item() - old_logprobs_BR[b, t].item()
    token_BR = log_ratio(logprobs_BR, old_logprobs_BR, mask_BR, level="token")
    assert_close(token_BR.double(), expected_BR, **tolerance(dtype))
    sequence_B = log_ratio(logprobs_BR, old_logprobs_BR, mask_BR, level="sequence")
    expected_B = torch.tensor([math.fsum(row) for row in expected_BR.tolist()], dtype=torch.float64)
    assert_close(sequence_B.double(), expected_B, **tolerance(dtype))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_ratio_is_clamped_and_stays_finite(level: str) -> None:
    # per token ± 150: e^150 is no float32
    logprobs_BR, old_logprobs_BR = torch.tensor([[0.0], [-150.0]]), torch.tensor([[-150.0], [0.0]])
    log_ratios = log_ratio(logprobs_BR, old_logprobs_BR, right_padded([1, 1], 1), level=level)
    assert_close(log_ratios.flatten(), torch.tensor([MAX_LOG_RATIO, -MAX_LOG_RATIO]), **EXACT)
    assert torch.isfinite(log_ratios.exp()).all()


def test_the_sum_is_clamped_and_not_its_tokens() -> None:
    # 15 + 15 - 25 = 5 is within ± 20, though one token is not
    logprobs_BR = torch.tensor([[15.0, 15.0, -25.0]])
    log_ratios_B = log_ratio(logprobs_BR, torch.zeros(1, 3), right_padded([3], 3), level="sequence")
    assert_close(log_ratios_B, torch.tensor([5.0]), **EXACT)


@EXAMPLES
@given(LENGTHS, SEEDS, st.sampled_from(["token", "sequence"]), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_padding_is_irrelevant_to_the_log_ratio(lengths: list[int], seed: int, level: str, garbage: float) -> None:
    mask_BR = right_padded(lengths)
    logprobs_BR, old_logprobs_BR = draw(seed, *mask_BR.shape), draw(seed + 1, *mask_BR.shape)
    clean = log_ratio(logprobs_BR, old_logprobs_BR, mask_BR, level=level)
    soiled = log_ratio(logprobs_BR, old_logprobs_BR.masked_fill(~mask_BR, garbage), mask_BR, level=level)
    assert_close(soiled, clean, **EXACT)
    order_B = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    permuted = log_ratio(logprobs_BR[order_B], old_logprobs_BR[order_B], mask_BR[order_B], level=level)
    assert_close(permuted, clean[order_B], **EXACT)


def test_log_ratio_refuses_bad_arguments() -> None:
    zeros, mask_BR = torch.zeros(2, 3), right_padded([3, 1], 3)
    with pytest.raises(ValueError, match="paragraph"):
        log_ratio(zeros, zeros, mask_BR, level="paragraph")
    with pytest.raises(ValueError, match="shapes"):
        log_ratio(zeros, zeros[:1], mask_BR, level="token")
    with pytest.raises(ValueError, match="shapes"):
        log_ratio(zeros, zeros, mask_BR[:1], level="token")


# --- clipped surrogate


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "is_clipped"),
    [
        # ε = 0.2 below, 0.4 above
        (1.1, 2.0, -2.2, False),  # inside: -1.1 · 2
        (1.5, 2.0, -2.8, True),  # -min(3, 1.4 · 2)
        (0.5, 2.0, -1.0, False),  # -min(1, 1.6): pessimistic
        (1.5, -2.0, 3.0, False),  # -min(-3, -2.8)
        (0.5, -2.0, 1.6, True),  # -min(-1, -1.6)
        (1.3, 0.0, 0.0, False),
    ],
)
def test_clipped_surrogate_by_hand(ratio: float, advantage: float, loss: float, is_clipped: bool) -> None:
    log_ratios_N = torch.tensor([math.log(ratio)], requires_grad=True)
    loss_N, is_clipped_N = clipped_surrogate(
        log_ratios_N, torch.tensor([advantage]), clip_range=0.2, clip_range_high=0.4
    )
    assert_close(loss_N.detach(), torch.tensor([loss]), **F32_OP)
    assert is_clipped_N.tolist() == [is_clipped]
    loss_N.sum().backward()
    # d(-ρA) / d log ρ = -ρA, and nothing where the clip holds
    assert log_ratios_N.grad is not None
    assert_close(log_ratios_N.grad.item(), 0.0 if is_clipped else -ratio * advantage, **F32_OP)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.5, 0.1)])
def test_clipped_surrogate_agrees_with_a_loop(low: float, high: float, dtype: torch.dtype) -> None:
    log_ratios_N, advantages_N = draw(1, 200, std=0.5, dtype=dtype), draw(2, 200, dtype=dtype)
    expected, expected_clipped = [], []
    for x, advantage in zip(log_ratios_N.tolist(), advantages_N.tolist(), strict=True):
        ratio = math.exp(x)
        bounded = min(max(ratio, 1 - low), 1 + high)
        expected.append(-min(ratio * advantage, bounded * advantage))
        expected_clipped.append(bounded * advantage < ratio * advantage)
    loss_N, is_clipped_N = clipped_surrogate(log_ratios_N, advantages_N, clip_range=low, clip_range_high=high)
    assert_close(loss_N.double(), torch.tensor(expected, dtype=torch.float64), **tolerance(dtype))
    assert is_clipped_N.tolist() == expected_clipped
    assert 20 < sum(expected_clipped) < 180


@pytest.mark.parametrize("name", [name for name in RLAX if name.startswith("clipped_surrogate")])
def test_clipped_surrogate_golden_rlax(name: str) -> None:
    case = RLAX[name]
    log_ratios_N = torch.tensor(case["log_ratios"], dtype=torch.float64, requires_grad=True)
    advantages_N, epsilon = torch.tensor(case["advantages"], dtype=torch.float64), case["clip_range"]
    loss_N, is_clipped_N = clipped_surrogate(log_ratios_N, advantages_N, clip_range=epsilon, clip_range_high=epsilon)
    loss_N.mean().backward()
    gradient_N = torch.tensor(case["gradient"], dtype=torch.float64)
    assert_close(loss_N.mean().item(), case["loss"], **F64_OP)
    assert_close(log_ratios_N.grad, gradient_N, **F64_OP)
    assert_close(is_clipped_N, gradient_N == 0, **EXACT)


def test_losses_golden_trl() -> None:
    case, mask_BR = TRL["ppo_losses"], torch.tensor(TRL["mask"])

    def tensor(name: str) -> Tensor:
        return torch.tensor(case[name], dtype=torch.float64)

    log_ratios_BR = log_ratio(tensor("new_logprobs"), tensor("mb_logprobs"), mask_BR, level="token")
    loss_BR, is_clipped_BR = clipped_surrogate(
        log_ratios_BR, tensor("mb_advantage"), clip_range=case["clip_range"], clip_range_high=case["clip_range"]
    )
    assert_close(masked_mean(loss_BR, mask_BR).item(), case["pg_loss"], **F64_OP)
    assert_close(is_clipped_BR, torch.tensor(case["pg_clipped"]), **EXACT)
    loss_BR, is_clipped_BR = clipped_value_loss(
        tensor("vpred"), tensor("mb_values"), tensor("mb_return"), value_clip_range=case["value_clip_range"]
    )
    assert_close(masked_mean(loss_BR, mask_BR).item(), case["vf_loss"], **F64_OP)
    assert_close(is_clipped_BR, torch.tensor(case["vf_clipped"]), **EXACT)
    assert_close(masked_mean(is_clipped_BR.double(), mask_BR).item(), case["vf_clipfrac"], **F32_OP)


@EXAMPLES
@given(LENGTHS, SEEDS, CLIP_RANGES, CLIP_RANGES, st.sampled_from(["token", "sequence"]))
def test_an_unmoved_policy_is_not_clipped(lengths: list[int], seed: int, low: float, high: float, level: str) -> None:
    mask_BR = right_padded(lengths)
    old_logprobs_BR = draw(seed, *mask_BR.shape)
    logprobs_BR = old_logprobs_BR.clone().requires_grad_()
    log_ratios = log_ratio(logprobs_BR, old_logprobs_BR, mask_BR, level=level)
    advantages = draw(seed + 1, *log_ratios.shape)
    loss, is_clipped = clipped_surrogate(log_ratios, advantages, clip_range=low, clip_range_high=high)
    assert not is_clipped.any()
    assert (approx_kl(log_ratios) == 0).all()
    assert_close(loss.detach(), -advantages, **F64_OP)
    # the first gradient of an iteration is the policy gradient: -A on each token
    loss.sum().backward()
    per_token = advantages if level == "token" else advantages[:, None].expand(mask_BR.shape)
    assert_close(logprobs_BR.grad, torch.where(mask_BR, -per_token, 0.0), **F64_OP)


@EXAMPLES
@given(SEEDS, CLIP_RANGES, CLIP_RANGES, st.floats(0.01, 3))
def test_the_surrogate_is_a_pessimistic_bound(seed: int, low: float, high: float, std: float) -> None:
    log_ratios_N, advantages_N = draw(seed, 20, std=std).requires_grad_(), draw(seed + 1, 20)
    loss_N, is_clipped_N = clipped_surrogate(log_ratios_N, advantages_N, clip_range=low, clip_range_high=high)
    loss_N.sum().backward()
    plain_N = (-log_ratios_N.exp() * advantages_N).detach()
    assert (loss_N >= plain_N).all()
    assert_close(log_ratios_N.grad, torch.where(is_clipped_N, 0.0, plain_N), **F64_OP)


@EXAMPLES
@given(st.lists(st.integers(1, 6), min_size=2, max_size=5), SEEDS, st.integers(1, 4))
def test_accumulated_gradients_are_those_of_the_full_batch(lengths: list[int], seed: int, rows: int) -> None:
    mask_BR = right_padded(lengths)
    shape = tuple(mask_BR.shape)
    start_BR, old_logprobs_BR, advantages_BR, returns_BR = (draw(seed + i, *shape, std=0.3) for i in range(4))

    def loss_sum(parameters_BR: Tensor, part: slice) -> Tensor:
        x_bR, mask_bR = parameters_BR[part], mask_BR[part]
        log_ratios_bR = log_ratio(x_bR, old_logprobs_BR[part], mask_bR, level="token")
        policy_bR, _ = clipped_surrogate(log_ratios_bR, advantages_BR[part], clip_range=0.2, clip_range_high=0.2)
        value_bR, _ = clipped_value_loss(x_bR, old_logprobs_BR[part], returns_BR[part], value_clip_range=0.2)
        return masked_sum(policy_bR + 0.1 * value_bR, mask_bR)

    full_BR, accumulated_BR = start_BR.clone().requires_grad_(), start_BR.clone().requires_grad_()
    (loss_sum(full_BR, slice(None)) / mask_BR.sum()).backward()
    for start in range(0, len(lengths), rows):
        (loss_sum(accumulated_BR, slice(start, start + rows)) / mask_BR.sum()).backward()
    assert_close(accumulated_BR.grad, full_BR.grad, **F64_OP)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.2), (1.0, 0.2), (-0.1, 0.2), (0.2, 0.0), (0.2, -0.1)])
def test_clipped_surrogate_refuses_bad_ranges(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="clip_range"):
        clipped_surrogate(torch.zeros(2), torch.zeros(2), clip_range=low, clip_range_high=high)
    with pytest.raises(ValueError, match="shapes"):
        clipped_surrogate(torch.zeros(2), torch.zeros(3), clip_range=0.2, clip_range_high=0.2)


# --- value loss


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "is_clipped", "gradient"),
    [
        # ε = 0.5
        (1.2, 1.0, 3.0, 1.62, False, -1.8),  # ½ (1.2 - 3)²
        (2.0, 1.0, 3.0, 1.125, True, 0.0),  # moved by 1, held at 1.5: ½ max(1, 2.25)
        (0.0, 1.0, 3.0, 4.5, False, -3.0),  # moved away, held at 0.5: ½ max(9, 6.25)
        (2.0, 1.0, 1.0, 0.5, False, 1.0),  # ½ max(1, 0.25)
    ],
)
def test_value_loss_by_hand(
    value: float, old: float, target: float, loss: float, is_clipped: bool, gradient: float
) -> None:
    values_N = torch.tensor([value], requires_grad=True)
    loss_N, is_clipped_N = clipped_value_loss(
        values_N, torch.tensor([old]), torch.tensor([target]), value_clip_range=0.5
    )
    loss_N.sum().backward()
    assert_close(loss_N.detach(), torch.tensor([loss]), **F32_OP)
    assert is_clipped_N.tolist() == [is_clipped]
    assert_close(values_N.grad, torch.tensor([gradient]), **F32_OP)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("clip", [0.2, 1.0, None])
def test_value_loss_agrees_with_a_loop(clip: float | None, dtype: torch.dtype) -> None:
    values_N, old_values_N, returns_N = (draw(seed, 100, dtype=dtype) for seed in range(3))
    expected, expected_clipped = [], []
    for v, old, g in zip(values_N.tolist(), old_values_N.tolist(), returns_N.tolist(), strict=True):
        near = v if clip is None else min(max(v, old - clip), old + clip)
        expected.append(max((v - g) ** 2, (near - g) ** 2) / 2)
        expected_clipped.append((near - g) ** 2 > (v - g) ** 2)
    loss_N, is_clipped_N = clipped_value_loss(values_N, old_values_N, returns_N, value_clip_range=clip)
    assert_close(loss_N.double(), torch.tensor(expected, dtype=torch.float64), **tolerance(dtype))
    assert is_clipped_N.tolist() == expected_clipped
    assert any(expected_clipped) is (clip is not None)


@EXAMPLES
@given(SEEDS, st.floats(0.01, 2))
def test_the_clipped_value_loss_is_never_below_the_plain_one(seed: int, clip: float) -> None:
    values_N, old_values_N, returns_N = (draw(seed + i, 20) for i in range(3))
    clipped_N, is_clipped_N = clipped_value_loss(values_N, old_values_N, returns_N, value_clip_range=clip)
    plain_N, _ = clipped_value_loss(values_N, old_values_N, returns_N, value_clip_range=None)
    assert (clipped_N >= plain_N).all()
    assert_close(clipped_N[~is_clipped_N], plain_N[~is_clipped_N], **EXACT)
    unmoved_N, none_clipped_N = clipped_value_loss(old_values_N, old_values_N, returns_N, value_clip_range=clip)
    assert not none_clipped_N.any()
    assert_close(unmoved_N, 0.5 * (old_values_N - returns_N) ** 2, **EXACT)


def test_value_loss_refuses_bad_arguments() -> None:
    zeros = torch.zeros(2)
    for clip in (0.0, -0.2):
        with pytest.raises(ValueError, match="positive"):
            clipped_value_loss(zeros, zeros, zeros, value_clip_range=clip)
    with pytest.raises(ValueError, match="shapes"):
        clipped_value_loss(zeros, zeros, torch.zeros(3), value_clip_range=0.2)
    with pytest.raises(ValueError, match="shapes"):
        clipped_value_loss(zeros, torch.zeros(3), zeros, value_clip_range=None)


# --- statistics


def test_approx_kl_by_hand() -> None:
    # ρ - 1 - log ρ:  2 - 1 - 0.693147 = 0.306853;  0.5 - 1 + 0.693147 = 0.193147
    log_ratios_N = torch.tensor([math.log(2.0), -math.log(2.0), 0.0])
    assert_close(approx_kl(log_ratios_N), torch.tensor([0.306853, 0.193147, 0.0]), **F32_OP)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_approx_kl_agrees_with_a_loop(dtype: torch.dtype) -> None:
    log_ratios_N = draw(1, 100, std=0.5, dtype=dtype)
    expected = [math.exp(x) - 1 - x for x in log_ratios_N.tolist()]
    assert_close(approx_kl(log_ratios_N).double(), torch.tensor(expected, dtype=torch.float64), **tolerance(dtype))


@EXAMPLES
@given(st.lists(st.floats(-MAX_LOG_RATIO, MAX_LOG_RATIO, width=32), min_size=1, max_size=20))
def test_approx_kl_is_never_negative(log_ratios: list[float]) -> None:
    assert (approx_kl(torch.tensor(log_ratios)) >= 0).all()


def test_small_kls_keep_their_digits() -> None:
    # x = 1e-3: x² / 2 + x³ / 6 + … = 5.0016671e-7, where exp(x) - 1 - x in float32 has one digit left
    assert_close(approx_kl(torch.tensor([1e-3])).item(), 5.0016671e-7, **F32_CANCELLED)


def test_explained_variance_by_hand() -> None:
    # returns 1, 2, 3, 4: variance 1.25;  G - V = -1, 1, -1, 1: variance 1;  1 - 1 / 1.25 = 0.2
    returns_N = torch.tensor([1.0, 2.0, 3.0, 4.0])
    values_N = returns_N - torch.tensor([-1.0, 1.0, -1.0, 1.0])
    assert_close(explained_variance(values_N, returns_N), torch.tensor(0.2), **F32_OP)
    assert explained_variance(returns_N, returns_N) == 1.0
    assert explained_variance(returns_N + 7, returns_N) == 1.0  # a constant offset is not counted
    assert explained_variance(torch.zeros(4), returns_N) == 0.0
    assert explained_variance(-returns_N, returns_N) == -3.0  # Var(2G) = 4 Var(G)
    assert explained_variance(returns_N, torch.ones(4)) == 0.0


def test_explained_variance_of_large_constant_returns_is_0() -> None:
    returns_N = torch.full((512 * 24,), 100.1)
    assert explained_variance(returns_N + draw(1, len(returns_N), dtype=torch.float32), returns_N) == 0.0


@pytest.mark.parametrize("case", SKLEARN, ids=["unrelated", "half", "perfect"])
def test_explained_variance_golden_sklearn(case: dict) -> None:
    values_N, returns_N = (torch.tensor(case[name], dtype=torch.float64) for name in ("values", "returns"))
    assert_close(explained_variance(values_N, returns_N).item(), case["explained_variance"], **F64_OP)


@EXAMPLES
@given(SEEDS, st.integers(2, 40))
def test_explained_variance_agrees_with_a_loop(seed: int, count: int) -> None:
    values, returns = draw(seed, count).tolist(), draw(seed + 1, count).tolist()

    def variance(numbers: list[float]) -> float:
        mean = math.fsum(numbers) / len(numbers)
        return math.fsum((x - mean) ** 2 for x in numbers) / len(numbers)

    expected = 1 - variance([g - v for g, v in zip(returns, values, strict=True)]) / variance(returns)
    actual = explained_variance(torch.tensor(values, dtype=torch.float64), torch.tensor(returns, dtype=torch.float64))
    assert_close(actual.item(), expected, **F64_OP)
    assert actual <= 1


def test_explained_variance_refuses_different_shapes() -> None:
    with pytest.raises(ValueError, match="shapes"):
        explained_variance(torch.zeros(3), torch.zeros(2))
