"""The tilted reference against a world whose exact tilt is known, a plain loop, and what must hold of any scores."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import F64_OP, HAND, SIGMAS
from torch import Tensor
from torch.testing import assert_close

from rlhf_core.ops.frontier import (
    attainable_score,
    frontier,
    halved_score,
    samples_for,
    tilt,
    tilt_at,
    trusted_kl,
)

EXAMPLES = settings(max_examples=40)
SEEDS = st.integers(0, 2**32 - 1)

PROBABILITIES = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
REWARDS = torch.tensor([[0.0, 1.0, 2.0, 4.0], [-1.0, 0.5, 0.0, 2.0]], dtype=torch.float64)
"""A world of two prompts with four responses each."""
BETA_GRID = (8.0, 2.0, 1.0, 0.5)


def scores_of(seed: int, prompts: int = 3, samples: int = 40) -> Tensor:
    return torch.randn(prompts, samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_tilt(beta: float) -> tuple[Tensor, Tensor]:
    """(KL, score) of each prompt of the world: π* = p e^(r/β) / Z, KL = E*[r]/β - log Z."""
    unnormalised = PROBABILITIES * (REWARDS / beta).exp()
    partition = unnormalised.sum(dim=1)
    score = (unnormalised * REWARDS).sum(dim=1) / partition
    return score / beta - partition.log(), score


def sampled(num_samples: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(PROBABILITIES, num_samples, replacement=True, generator=generator)
    return REWARDS.gather(1, drawn)


# --- tilt


def test_tilt_by_hand() -> None:
    # scores 0 and log 3 at β = 1: weights 1/4 and 3/4
    # score 3/4 log 3 = 0.82395922;  KL = log 2 + 1/4 log 1/4 + 3/4 log 3/4 = 0.13081204;  1 / (1/16 + 9/16) = 1.6
    found = tilt(torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64), 1.0)
    assert_close((found.score, found.kl, float(found.ess_Q)), (0.82395922, 0.13081204, 1.6), **HAND)


@pytest.mark.parametrize("beta", BETA_GRID)
def test_tilt_is_exact_where_samples_are_the_distribution(beta: float) -> None:
    """20 samples in the very proportions of the world."""
    counts = (PROBABILITIES * 20).round().long()
    score_QN = torch.stack([REWARDS[q].repeat_interleave(counts[q]) for q in range(2)])
    found, (kl, score) = tilt(score_QN, beta), exact_tilt(beta)
    assert_close((found.kl_Q, found.score_Q), (kl, score), **F64_OP)


@pytest.mark.parametrize("beta", BETA_GRID)
def test_tilt_of_random_samples_comes_to_the_exact_one(beta: float) -> None:
    """Within its own spread over 16 independent sets of samples, and within the 1 / N bias."""
    found = [tilt(sampled(4_000, seed), beta) for seed in range(16)]
    for name, exact in zip(("kl", "score"), exact_tilt(beta), strict=True):
        values = torch.tensor([getattr(f, name) for f in found])
        error = float(values.std()) / math.sqrt(len(values))
        assert abs(float(values.mean()) - float(exact.mean())) < SIGMAS * error + 1e-3, name


def test_tilt_is_the_plain_loop() -> None:
    score_QN, beta = scores_of(3), 0.7
    found = tilt(score_QN, beta)
    for q, row in enumerate(score_QN.tolist()):
        raw = [math.exp(r / beta) for r in row]
        weights = [value / sum(raw) for value in raw]
        score = sum(w * r for w, r in zip(weights, row, strict=True))
        kl = math.log(len(row)) + sum(w * math.log(w) for w in weights)
        ess = 1 / sum(w * w for w in weights)
        assert_close((float(found.score_Q[q]), float(found.kl_Q[q]), float(found.ess_Q[q])), (score, kl, ess), **F64_OP)


@given(SEEDS, st.floats(0.05, 20), st.floats(1.01, 5))
@EXAMPLES
def test_score_and_kl_rise_as_beta_falls(seed: int, beta: float, factor: float) -> None:
    weak, strong = tilt(scores_of(seed), beta * factor), tilt(scores_of(seed), beta)
    assert bool((strong.kl_Q >= weak.kl_Q).all())
    assert bool((strong.score_Q > weak.score_Q).all())
    assert bool((strong.ess_Q <= weak.ess_Q).all())


@given(SEEDS, st.floats(0.1, 10), st.floats(-50, 50))
@EXAMPLES
def test_a_constant_moves_the_score_alone_and_order_is_irrelevant(seed: int, beta: float, constant: float) -> None:
    score_QN = scores_of(seed)
    shifted, found = tilt(score_QN + constant, beta), tilt(score_QN, beta)
    assert_close((shifted.kl_Q, shifted.score_Q - constant), (found.kl_Q, found.score_Q), rtol=0, atol=1e-9)
    permuted = score_QN[:, torch.randperm(score_QN.shape[1], generator=torch.Generator().manual_seed(seed))]
    assert_close(tilt(permuted, beta).score_Q, found.score_Q, **F64_OP)


@given(SEEDS, st.floats(0.1, 10), st.floats(0.1, 10))
@EXAMPLES
def test_units_of_the_score_are_those_of_beta(seed: int, beta: float, unit: float) -> None:
    found, scaled = tilt(scores_of(seed), beta), tilt(unit * scores_of(seed), unit * beta)
    assert_close((scaled.kl_Q, scaled.score_Q), (found.kl_Q, unit * found.score_Q), **F64_OP)


def test_extremes_are_the_reference_and_the_best_sample_without_overflow() -> None:
    score_QN = torch.tensor([[-1000.0, 0.0, 1000.0]])
    reference, best = tilt(score_QN, math.inf), tilt(score_QN, 1e-3)
    assert_close((reference.kl, reference.score, float(reference.ess_Q)), (0.0, 0.0, 3.0), **F64_OP)
    assert (best.kl, best.score, float(best.ess_Q)) == (pytest.approx(math.log(3)), 1000.0, 1.0)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_a_beta_that_is_not_positive_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="beta must be positive"):
        tilt(scores_of(0), beta)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,)])
def test_scores_without_a_sample_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="prompts, samples"):
        tilt(torch.zeros(shape), 1.0)


# --- at a KL


@given(SEEDS, st.floats(0.001, 3.0))
@EXAMPLES
def test_the_tilt_at_a_kl_has_it(seed: int, kl: float) -> None:
    assert tilt_at(scores_of(seed), kl).kl == pytest.approx(kl, rel=1e-9)


def test_where_the_samples_cannot_reach_a_kl_the_strongest_tilt_is_given() -> None:
    found = tilt_at(torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 2.0, 3.0]]), 50.0)
    assert found.kl == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert found.score == pytest.approx(2.0)


@pytest.mark.parametrize("score_QN", [torch.ones(2, 5), torch.tensor([[1.0, 1.0], [3.0, 3.0]])])
def test_scores_that_are_all_alike_leave_the_reference(score_QN: Tensor) -> None:
    found = tilt_at(score_QN, 1.0)
    assert (found.beta, found.kl, found.score) == (math.inf, 0.0, float(score_QN.mean()))
    assert tilt_at(scores_of(0), -0.1).beta == math.inf


def test_no_other_reweighting_of_the_samples_scores_higher_at_its_kl() -> None:
    """The defining property: best mean score of all weights with the same mean KL."""
    score_QN = scores_of(5, prompts=4, samples=30)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        logits = score_QN * torch.rand(4, 1, generator=generator, dtype=torch.float64) * 2
        logits += 0.3 * torch.randn(score_QN.shape, generator=generator, dtype=torch.float64)
        weights = logits.softmax(dim=1)
        kl = (math.log(30) + (weights * weights.log()).sum(dim=1)).mean()
        assert float((weights * score_QN).sum(dim=1).mean()) <= tilt_at(score_QN, float(kl)).score + 1e-9


# --- attainable at a policy's KL


def test_attainable_has_the_mean_of_the_frontier() -> None:
    score_QN, kl_Q = scores_of(8, prompts=5), torch.tensor([0.2, 1.0, 0.4, 0.9, 0.5], dtype=torch.float64)
    assert float(attainable_score(score_QN, kl_Q).mean()) == pytest.approx(tilt_at(score_QN, 0.6).score, rel=1e-9)


def test_attainable_tells_how_the_frontier_moves_without_a_prompt() -> None:
    """Leaving out one of 200 prompts: the mean of the rest is the frontier computed anew, to second order."""
    score_QN = scores_of(9, prompts=200, samples=50)
    kl_Q = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    could_Q = attainable_score(score_QN, kl_Q)
    for left_out in (0, 50, 199):
        rest = torch.arange(200) != left_out
        anew = tilt_at(score_QN[rest], float(kl_Q[rest].mean())).score
        moved = abs(float(could_Q.mean()) - anew)
        assert abs(float(could_Q[rest].mean()) - anew) < 0.02 * moved + 1e-5


def test_attainable_without_kl_is_the_reference_and_prompts_must_agree() -> None:
    score_QN = scores_of(2)
    assert_close(attainable_score(score_QN, torch.zeros(3)), score_QN.mean(dim=1), **F64_OP)
    with pytest.raises(ValueError, match="3 prompts have samples, 2 a KL"):
        attainable_score(score_QN, torch.zeros(2))


# --- trust


def test_half_of_the_samples_see_less() -> None:
    score_QN = scores_of(4, prompts=64, samples=256)
    whole, half = tilt_at(score_QN, 3.0).score, halved_score(score_QN, 3.0)
    assert 0.01 < (whole - half) / whole < 0.06
    again = (tilt_at(score_QN[:, ::2], 3.0).score + tilt_at(score_QN[:, 1::2], 3.0).score) / 2
    assert half == pytest.approx(again)
    with pytest.raises(ValueError, match="at least two"):
        halved_score(score_QN[:, :1], 1.0)


@pytest.mark.parametrize("num_samples", [128, 512])
def test_at_the_trusted_kl_a_gaussian_frontier_is_five_percent_low_and_far_beyond_it_fails(num_samples: int) -> None:
    """The exact frontier of Gaussian scores is √(2 KL)."""
    score_QN = scores_of(num_samples, prompts=200, samples=num_samples)
    limit = trusted_kl(num_samples)
    assert 0.93 < tilt_at(score_QN, limit).score / math.sqrt(2 * limit) < 0.98
    assert tilt_at(score_QN, limit + 2).score / math.sqrt(2 * (limit + 2)) < 0.91


def test_the_trusted_kl_leaves_ten_samples() -> None:
    assert trusted_kl(1024) == pytest.approx(6.931471805599453 - 2.302585092994046)
    assert trusted_kl(10) == 0.0
    for kl in (0.5, 3.0, 6.0):
        assert trusted_kl(samples_for(kl)) >= kl > trusted_kl(samples_for(kl) - 1)
    with pytest.raises(ValueError, match="at least 1"):
        trusted_kl(0)


def test_the_curve_covers_the_trusted_kl_in_even_steps_of_its_root_and_goes_a_little_beyond() -> None:
    score_QN = scores_of(6, prompts=8, samples=256)
    curve, limit = frontier(score_QN, num_trusted=12), trusted_kl(256)
    kl = [row.kl for row in curve]
    assert (kl[0], curve[0].beta, curve[0].score) == (0.0, math.inf, pytest.approx(float(score_QN.mean())))
    assert kl[:13] == pytest.approx([limit * (i / 12) ** 2 for i in range(13)], abs=1e-9)
    assert limit + 0.5 < kl[-1] < limit + math.log(10) / 2 + 1e-9
    assert all(a.score < b.score and a.beta > b.beta for a, b in itertools.pairwise(curve))


def test_the_curve_ends_at_the_strongest_tilt_and_needs_samples() -> None:
    pass_or_fail = (scores_of(7, prompts=4, samples=100) > 0).double()
    curve = frontier(pass_or_fail)
    assert curve[-1].score == pytest.approx(1.0)
    assert curve[-1].kl == pytest.approx(tilt_at(pass_or_fail, 99.0).kl)
    assert len(frontier(torch.ones(3, 50))) == 1
    with pytest.raises(ValueError, match="more than 10 samples a prompt, got 10"):
        frontier(torch.zeros(2, 10))
