"""Comparing a policy with the reference on the same prompts, with confidence intervals.

The prompt is the independent unit: responses to one prompt resemble each other, so every interval is over prompts.
Q prompts, K samples of the policy and N of the reference a prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Example: ``Interval(0.81, 0.77, 0.85)``
    """

    mean: float
    low: float
    high: float


def interval(value_Q: Tensor, per_Q: Tensor | None = None) -> Interval:
    """Mean over prompts, or ratio of two means over the same prompts, with its 95 % interval.

        θ = Σ v_q / Σ u_q;    se² = (Q - 1)/Q Σ (θ_-q - mean θ_-q)²;    θ ± t_{Q-1} · se

    Args:
        value_Q: [Q], one number a prompt.
        per_Q: [Q], the denominator's; None: ones, which gives the mean and its usual t interval.
    Returns: estimate and interval, in float64.
    Raises: ValueError with fewer than two prompts, different shapes, or a denominator that sums to 0.
    Source: the delete-one jackknife, Efron and Tibshirani 1993, chapter 11; Student's t for its few prompts.
    """
    num = len(value_Q)
    if num < 2:
        raise ValueError(f"an interval needs at least two prompts, got {num}")
    over_Q = torch.ones(num, dtype=torch.float64) if per_Q is None else per_Q.double()
    if over_Q.shape != value_Q.shape:
        raise ValueError(f"shapes differ: {tuple(value_Q.shape)}, {tuple(over_Q.shape)}")
    value_Q = value_Q.double()
    total, over = value_Q.sum(), over_Q.sum()
    if float(over) == 0:
        raise ValueError("the denominator sums to 0")
    without_Q = (total - value_Q) / (over - over_Q)
    spread = float(((without_Q - without_Q.mean()) ** 2).sum())
    reach = student_quantile(num - 1, (1 + CONFIDENCE) / 2) * math.sqrt((num - 1) / num * spread)
    mean = float(total / over)
    return Interval(mean, mean - reach, mean + reach)


def win_rate(score_QK: Tensor, ref_score_QN: Tensor) -> Tensor:
    """How often a response of the policy scores higher than one of the reference to the same prompt; a tie is half.

        mean over i, j with i ≠ j of  [s_i > r_j] + ½ [s_i = r_j]

    Args:
        score_QK: [Q, K], the policy's.
        ref_score_QN: [Q, N], the reference's, N at least 2. Samples of one index were drawn with the same random
            numbers and resemble each other: such pairs are left out, so that the responses compared are independent.
    Returns: [Q] float64, in [0, 1].
    Raises: ValueError if the numbers of prompts differ, or N < 2.
    Source: the Mann-Whitney statistic, prompt by prompt.
    """
    if score_QK.shape[0] != ref_score_QN.shape[0] or ref_score_QN.shape[1] < 2:
        raise ValueError(
            f"a win rate needs the same prompts and at least two samples of the reference; got "
            f"{tuple(score_QK.shape)} and {tuple(ref_score_QN.shape)}"
        )
    independent_KN = ~torch.eye(score_QK.shape[1], ref_score_QN.shape[1], dtype=torch.bool)
    rates: list[Tensor] = []
    for mine_K, other_N in zip(score_QK, ref_score_QN, strict=True):  # prompt by prompt: K x N pairs at a time
        wins_KN = (mine_K[:, None] > other_N).double() + 0.5 * (mine_K[:, None] == other_N).double()
        rates.append(wins_KN[independent_KN].mean())
    return torch.stack(rates)


def student_quantile(degrees: int, probability: float) -> float:
    """Quantile of Student's t distribution.

    Args:
        degrees: of freedom, at least 1.
        probability: in (0.5, 1).
    Returns: t with P(T <= t) = probability, to twelve digits.
    Raises: ValueError if an argument is out of range.
    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4 (finite series of the distribution function); bisection.
    """
    if degrees < 1 or not 0.5 < probability < 1:
        raise ValueError(f"degrees must be at least 1 and probability in (0.5, 1); got {degrees} and {probability}")
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # bisects the angle θ = atan(t / √degrees)
        middle = (low + high) / 2
        if (1 + _within(degrees, middle)) / 2 < probability:
            low = middle
        else:
            high = middle
    return math.tan((low + high) / 2) * math.sqrt(degrees)


def _within(degrees: int, angle: float) -> float:
    """P(|T| <= √degrees · tan angle)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2 == 1
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine**2 * ((k - 1) / k)
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
