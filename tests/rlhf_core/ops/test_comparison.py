"""Intervals over prompts, and who wins."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import F64_OP
from torch import Tensor
from torch.testing import assert_close

from rlhf_core.ops.comparison import interval, student_quantile, win_rate

EXAMPLES = settings(max_examples=30)
SEEDS = st.integers(0, 2**32 - 1)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("degrees", "probability", "quantile"),
    [
        (1, 0.975, 12.706204736174694),
        (2, 0.975, 4.302652729749462),
        (3, 0.9, 1.637744353696209),
        (4, 0.995, 4.604094871349992),
        (5, 0.975, 2.5705818356363146),
        (47, 0.975, 2.0117405137297655),
        (200, 0.6, 0.25368437919014747),
    ],
)
def test_quantiles_of_student_are_those_of_scipy(degrees: int, probability: float, quantile: float) -> None:
    """scipy 1.17.1, scipy.stats.t.ppf(probability, degrees)."""
    assert student_quantile(degrees, probability) == pytest.approx(quantile, rel=1e-12)


@pytest.mark.parametrize(("degrees", "probability"), [(0, 0.9), (3, 0.5), (3, 1.0)])
def test_quantiles_out_of_range_are_refused(degrees: int, probability: float) -> None:
    with pytest.raises(ValueError, match="degrees must be"):
        student_quantile(degrees, probability)


def test_the_interval_of_a_mean_by_hand() -> None:
    # 1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7, se √(7/3) = 1.52752523; t with 2 degrees 4.30265273
    found = interval(torch.tensor([1.0, 2.0, 6.0]))
    reach = 4.30265273 * 1.52752523
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3 - reach, 3 + reach), abs=1e-7)


def test_the_interval_of_a_ratio_is_the_jackknife_by_a_plain_loop() -> None:
    value, per = draw(0, 12) + 3, draw(1, 12).abs() + 1
    found = interval(value, per)
    without = [float((value.sum() - value[q]) / (per.sum() - per[q])) for q in range(12)]
    centre = sum(without) / 12
    error = math.sqrt(11 / 12 * sum((x - centre) ** 2 for x in without))
    assert found.mean == pytest.approx(float(value.sum() / per.sum()))
    assert found.high - found.low == pytest.approx(2 * 2.200985160082949 * error)  # scipy: t.ppf(0.975, 11)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """2,000 experiments of 10 prompts: 95 % of the intervals hold the mean; of ratios of correlated means, about so."""
    base, noise = draw(2, 2000, 10) + 4, draw(3, 2000, 10)
    of_means = sum(i.low <= 4 <= i.high for i in map(interval, base))
    of_ratios = sum(i.low <= 0.5 <= i.high for i in map(interval, 0.5 * base + 0.3 * noise, base))
    assert 0.935 < of_means / 2000 < 0.965
    assert 0.92 < of_ratios / 2000 < 0.975


@pytest.mark.parametrize(
    ("value", "per", "said"),
    [
        (torch.ones(1), None, "at least two prompts, got 1"),
        (torch.ones(3), torch.ones(2), "shapes differ"),
        (torch.ones(2), torch.tensor([1.0, -1.0]), "sums to 0"),
    ],
)
def test_an_interval_without_a_meaning_is_refused(value: Tensor, per: Tensor | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        interval(value, per)


def test_the_win_rate_by_hand() -> None:
    # sample 0 (3): against r_1 = 1 a win; r_2 = 3 a tie.  sample 1 (1): against r_0 = 0 a win, r_2 = 3 a loss
    rate_Q = win_rate(torch.tensor([[3.0, 1.0]]), torch.tensor([[0.0, 1.0, 3.0]]))
    assert rate_Q.tolist() == [(1 + 0.5 + 1 + 0) / 4]


@given(SEEDS)
@EXAMPLES
def test_win_rates_of_both_sides_add_up_to_one(seed: int) -> None:
    mine, other = draw(seed, 4, 6).round(), draw(seed + 1, 4, 6).round()
    assert_close(win_rate(mine, other) + win_rate(other, mine), torch.ones(4, dtype=torch.float64), **F64_OP)
    assert_close(win_rate(mine, mine), torch.full((4,), 0.5, dtype=torch.float64), **F64_OP)
    assert win_rate(mine + 1000, other).tolist() == [1.0] * 4


def test_pairs_of_the_same_dice_are_left_out() -> None:
    other = draw(0, 3, 5)
    better_by_a_hair = win_rate(other + 1e-9, other)
    assert_close(better_by_a_hair, torch.full((3,), 0.5, dtype=torch.float64), **F64_OP)


def test_a_win_rate_needs_the_same_prompts_and_two_samples() -> None:
    for mine, other in ((torch.ones(2, 3), torch.ones(3, 3)), (torch.ones(2, 1), torch.ones(2, 1))):
        with pytest.raises(ValueError, match="at least two samples"):
            win_rate(mine, other)
