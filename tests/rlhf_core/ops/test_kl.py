"""KL estimators and the adaptive coefficient. B responses, R response tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import EXACT, F32_OP, F64_OP
from torch import Tensor
from torch.testing import assert_close

from rlhf_core.ops.kl import MAX_LOG_RATIO, adaptive_kl_coef, kl_error, log_pi_kl_coef, token_kl

GOLDEN = Path(__file__).parents[2] / "golden"
TRL = json.loads((GOLDEN / "trl.json").read_text())["cases"]
SCIPY = json.loads((GOLDEN / "scientific.json").read_text())["cases"]
EXAMPLES = settings(max_examples=30)
ESTIMATORS = ["k1", "k2", "k3"]
LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**32 - 1)


def right_padded(lengths: list[int], width: int = 6) -> Tensor:
    return torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]


def draw_logprobs(seed: int, shape: torch.Size, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -torch.randn(shape, generator=generator, dtype=torch.float64).abs().to(dtype)


def loop_kl(logprob: float, ref_logprob: float, estimator: str) -> float:
    """Schulman's note: x is drawn from q, here the policy, and r = p(x) / q(x) with p the reference."""
    r = math.exp(ref_logprob) / math.exp(logprob)
    return {"k1": -math.log(r), "k2": math.log(r) ** 2 / 2, "k3": (r - 1) - math.log(r)}[estimator]


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # log π = -1, log π_ref = -2: d = 1;  and log π = -3, log π_ref = -2: d = -1
        ("k1", [1.0, -1.0]),
        ("k2", [0.5, 0.5]),  # d² / 2
        ("k3", [0.36787944, 0.71828183]),  # e⁻¹ - 1 + 1 = 1/e;  e - 1 - 1 = e - 2
    ],
)
def test_by_hand(estimator: str, expected: list[float]) -> None:
    logprobs_BR, ref_logprobs_BR = torch.tensor([[-1.0, -3.0, 9.0]]), torch.tensor([[-2.0, -2.0, math.nan]])
    kl_BR = token_kl(logprobs_BR, ref_logprobs_BR, right_padded([2], 3), estimator=estimator)
    assert_close(kl_BR, torch.tensor([[*expected, 0.0]]), **F32_OP)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_a_loop(seed: int, estimator: str, dtype: torch.dtype) -> None:
    mask_BR = right_padded([6, 2, 1, 4])
    logprobs_BR = draw_logprobs(seed, mask_BR.shape, dtype)
    ref_logprobs_BR = draw_logprobs(seed + 100, mask_BR.shape, dtype)
    expected_BR = torch.zeros(mask_BR.shape, dtype=torch.float64)
    for b, t in mask_BR.nonzero().tolist():
        expected_BR[b, t] = loop_kl(logprobs_BR[b, t].item(), ref_logprobs_BR[b, t].item(), estimator)
    kl_BR = token_kl(logprobs_BR, ref_logprobs_BR, mask_BR, estimator=estimator)
    assert_close(kl_BR.double(), expected_BR, **(F64_OP if dtype == torch.float64 else F32_OP))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_golden_trl(estimator: str) -> None:
    case = TRL["kl"]
    logprobs_BR, ref_logprobs_BR, expected_BR = (
        torch.tensor(case[name], dtype=torch.float64) for name in ("logprobs", "ref_logprobs", estimator)
    )
    everything_BR = torch.ones_like(logprobs_BR, dtype=torch.bool)
    assert_close(token_kl(logprobs_BR, ref_logprobs_BR, everything_BR, estimator=estimator), expected_BR, **F64_OP)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_expectation_over_the_vocabulary_is_scipys_kl(estimator: str) -> None:
    case = SCIPY["exact_kl"]
    probs_V, ref_probs_V = (torch.tensor(case[name], dtype=torch.float64) for name in ("policy", "reference"))
    everything = torch.ones(1, len(probs_V), dtype=torch.bool)
    kl_V = token_kl(probs_V.log()[None], ref_probs_V.log()[None], everything, estimator=estimator)[0]
    assert_close((probs_V * kl_V).sum().item(), case["kl"], **F64_OP)


@EXAMPLES
@given(LENGTHS, SEEDS, st.sampled_from(ESTIMATORS), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_padding_is_irrelevant(lengths: list[int], seed: int, estimator: str, garbage: float) -> None:
    mask_BR = right_padded(lengths)
    logprobs_BR, ref_logprobs_BR = (draw_logprobs(seed + i, mask_BR.shape) for i in (0, 1))
    kl_BR = token_kl(logprobs_BR, ref_logprobs_BR, mask_BR, estimator=estimator)
    soiled_BR = logprobs_BR.masked_fill(~mask_BR, garbage)
    assert_close(token_kl(soiled_BR, ref_logprobs_BR, mask_BR, estimator=estimator), kl_BR, **EXACT)
    assert (kl_BR[~mask_BR] == 0).all()


@EXAMPLES
@given(LENGTHS, SEEDS, st.sampled_from(ESTIMATORS))
def test_the_order_of_responses_is_irrelevant(lengths: list[int], seed: int, estimator: str) -> None:
    mask_BR = right_padded(lengths)
    logprobs_BR, ref_logprobs_BR = (draw_logprobs(seed + i, mask_BR.shape) for i in (0, 1))
    order_B = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    kl_BR = token_kl(logprobs_BR, ref_logprobs_BR, mask_BR, estimator=estimator)
    permuted_BR = token_kl(logprobs_BR[order_B], ref_logprobs_BR[order_B], mask_BR[order_B], estimator=estimator)
    assert_close(permuted_BR, kl_BR[order_B], **EXACT)


@EXAMPLES
@given(st.lists(st.floats(-30, 0, width=32), min_size=1, max_size=8), SEEDS)
def test_k2_and_k3_are_never_negative_and_equal_policies_have_no_kl(logprobs: list[float], seed: int) -> None:
    logprobs_BR = torch.tensor([logprobs])
    everything = torch.ones_like(logprobs_BR, dtype=torch.bool)
    ref_logprobs_BR = draw_logprobs(seed, logprobs_BR.shape, torch.float32)
    near_BR = logprobs_BR * (1 + 1e-6)  # differences of a rounding or two
    for estimator in ESTIMATORS:
        assert (token_kl(logprobs_BR, logprobs_BR, everything, estimator=estimator) == 0).all()
    for estimator in ("k2", "k3"):
        assert (token_kl(logprobs_BR, ref_logprobs_BR, everything, estimator=estimator) >= 0).all()
        assert (token_kl(logprobs_BR, near_BR, everything, estimator=estimator) >= 0).all()
    k1_BR = token_kl(logprobs_BR, ref_logprobs_BR, everything, estimator="k1")
    assert_close(token_kl(ref_logprobs_BR, logprobs_BR, everything, estimator="k1"), -k1_BR, **EXACT)


def test_k3_of_an_impossible_token_stays_finite() -> None:
    # the policy drew a token that it gives e^-200 of what the reference does: e^200 is no float32, e^20 is
    everything = torch.ones(1, 2, dtype=torch.bool)
    kl_BR = token_kl(torch.tensor([[-200.0, 0.0]]), torch.tensor([[0.0, -200.0]]), everything, estimator="k3")
    assert torch.isfinite(kl_BR).all()
    assert_close(kl_BR[0, 0].item(), math.exp(MAX_LOG_RATIO), **F32_OP)
    # k1 is not clamped: the penalty of such a token is what it is
    k1_BR = token_kl(torch.tensor([[-200.0, 0.0]]), torch.tensor([[0.0, -200.0]]), everything, estimator="k1")
    assert_close(k1_BR, torch.tensor([[-200.0, 200.0]]), **EXACT)


POLICY, REFERENCE = [0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]


def exact_gradient(of: str) -> list[float]:
    """By hand, with respect to the logits z of π = softmax(z).

    KL(π ‖ ref) = Σ π_v d_v, d = log π - log ref:   ∂/∂z_v = π_v (d_v - KL)
    KL(ref ‖ π) = -Σ ref_v log π_v + constant:      ∂/∂z_v = π_v - ref_v
    """
    if of == "nothing":
        return [0.0] * 4
    if of == "KL(ref ‖ π)":
        return [p - r for p, r in zip(POLICY, REFERENCE, strict=True)]
    d = [math.log(p / r) for p, r in zip(POLICY, REFERENCE, strict=True)]
    kl = math.fsum(p * x for p, x in zip(POLICY, d, strict=True))
    return [p * (x - kl) for p, x in zip(POLICY, d, strict=True)]


def every_token(estimator: str) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, log π of each token, its estimate): one row that samples every token once."""
    logits_V = torch.tensor(POLICY, dtype=torch.float64).log().requires_grad_()
    logprobs_1V = logits_V.log_softmax(dim=0)[None]
    ref_1V = torch.tensor([REFERENCE], dtype=torch.float64).log()
    return logits_V, logprobs_1V, token_kl(logprobs_1V, ref_1V, right_padded([4], 4), estimator=estimator)


@pytest.mark.parametrize(
    ("estimator", "of"),
    [("k1", "nothing"), ("k2", "KL(π ‖ ref)"), ("k3", "KL(ref ‖ π)"), ("k3+", "KL(π ‖ ref)")],
)
def test_the_expected_gradient_in_the_loss(estimator: str, of: str) -> None:
    """Samples of π are weighted by their probabilities, which are no part of the loss."""
    logits_V, _, kl_1V = every_token(estimator)
    (kl_1V[0] * torch.tensor(POLICY, dtype=torch.float64)).sum().backward()
    assert logits_V.grad is not None
    assert_close(logits_V.grad, torch.tensor(exact_gradient(of), dtype=torch.float64), **F64_OP)


def test_the_expected_gradient_in_the_reward() -> None:
    """As a number that weighs ∇log π: that of the KL for k1; for k3 the other direction's is subtracted."""
    found: dict[str, Tensor] = {}
    for estimator in ESTIMATORS:
        logits_V, logprobs_1V, kl_1V = every_token(estimator)
        (logprobs_1V[0] * kl_1V[0].detach() * torch.tensor(POLICY, dtype=torch.float64)).sum().backward()
        assert logits_V.grad is not None
        found[estimator] = logits_V.grad
    right, other = (torch.tensor(exact_gradient(f), dtype=torch.float64) for f in ("KL(π ‖ ref)", "KL(ref ‖ π)"))
    assert_close(found["k1"], right, **F64_OP)
    assert_close(found["k3"], right - other, **F64_OP)
    assert (found["k2"] - right).abs().max() > 0.01


def test_k3_plus_has_the_value_of_k3() -> None:
    logprobs_BR, ref_logprobs_BR = draw_logprobs(1, torch.Size([3, 6])), draw_logprobs(2, torch.Size([3, 6]))
    values = [token_kl(logprobs_BR, ref_logprobs_BR, right_padded([6, 2, 4]), estimator=e) for e in ("k3", "k3+")]
    assert_close(values[1], values[0], **EXACT)


def test_bad_arguments_are_refused() -> None:
    zeros, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="k4"):
        token_kl(zeros, zeros, mask, estimator="k4")
    with pytest.raises(ValueError, match="shapes"):
        token_kl(zeros, zeros[:1], mask, estimator="k1")
    with pytest.raises(ValueError, match="shapes"):
        token_kl(zeros, zeros, mask[:, :2], estimator="k1")


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (12.0, 0.15 * 1.01024),  # 12 / 6 - 1 = 1, clipped to 0.2;  0.2 · 512 / 10000 = 0.01024
        (0.0, 0.15 * 0.98976),  # -1, clipped to -0.2
        (6.6, 0.15 * 1.00512),  # 0.1, not clipped;  0.1 · 0.0512 = 0.00512
        (5.7, 0.15 * 0.99744),  # -0.05;  0.05 · 0.0512 = 0.00256
        (6.0, 0.15),  # on target
    ],
)
def test_adaptive_coefficient_by_hand(kl: float, expected: float) -> None:
    assert_close(adaptive_kl_coef(0.15, kl, target=6.0, horizon=10_000, num_samples=512), expected, **F64_OP)


def test_adaptive_coefficient_golden_trl() -> None:
    case = TRL["adaptive_kl"]
    kl_coef, settings_ = case["kl_coef"], {name: case[name] for name in ("target", "horizon", "num_samples")}
    for kl, expected in zip(case["kl"], case["kl_coefs"], strict=True):
        kl_coef = adaptive_kl_coef(kl_coef, kl, **settings_)
        assert_close(kl_coef, expected, **F64_OP)


@EXAMPLES
@given(
    st.floats(1e-4, 10),
    st.floats(-50, 200),
    st.floats(-50, 200),
    st.floats(0.01, 50),
    st.integers(1, 4096),
    st.floats(0.25, 1e3),
)
def test_adaptive_coefficient_is_bounded_and_rises_with_the_kl(
    kl_coef: float, kl: float, other_kl: float, target: float, num_samples: int, horizon_per_sample: float
) -> None:
    horizon = horizon_per_sample * num_samples
    low, high = (
        adaptive_kl_coef(kl_coef, x, target=target, horizon=horizon, num_samples=num_samples)
        for x in sorted([kl, other_kl])
    )
    step = 0.2 * num_samples / horizon
    assert 0 < low <= high
    slack = F64_OP["rtol"]
    assert kl_coef * (1 - step) * (1 - slack) <= low
    assert high <= kl_coef * (1 + step) * (1 + slack)
    assert (low <= kl_coef) if min(kl, other_kl) <= target else (low >= kl_coef)


@pytest.mark.parametrize(
    ("kl", "target", "horizon", "message"),
    [
        (1.0, 0.0, 10_000.0, "target"),
        (1.0, -6.0, 10_000.0, "target"),
        (1.0, 6.0, 102.0, "horizon"),  # 0.2 · 512 = 102.4
        (math.nan, 6.0, 10_000.0, "nan"),
        (math.inf, 6.0, 10_000.0, "inf"),
    ],
)
def test_adaptive_coefficient_refuses(kl: float, target: float, horizon: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adaptive_kl_coef(0.15, kl, target=target, horizon=horizon, num_samples=512)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.0), (6.0 * math.e**0.5, 0.5), (3.0, -math.log(2)), (60.0, 1.0), (0.01, -1.0), (-3.0, -1.0)],
)
def test_kl_error_by_hand(kl: float, expected: float) -> None:
    assert kl_error(kl, target=6.0) == pytest.approx(expected)


def test_controllers_of_the_log_refuse_bad_arguments() -> None:
    with pytest.raises(ValueError, match="target must be positive"):
        kl_error(1.0, target=0.0)
    with pytest.raises(ValueError, match="must not enter"):
        kl_error(math.nan, target=6.0)
    for gains in ((-0.1, 0.1), (0.1, -0.1)):
        with pytest.raises(ValueError, match="must not be negative"):
            log_pi_kl_coef(0.1, 0.0, 0.0, proportional_gain=gains[0], integral_gain=gains[1])
