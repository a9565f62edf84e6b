"""Dual clip, and the three ways to aggregate a loss."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import F32_OP
from torch.testing import assert_close

from rlhf_core.ops.losses import aggregate, clipped_surrogate

EXAMPLES = settings(max_examples=30)
VALUES = torch.tensor([[1.0, 2.0, 3.0, 6.0], [4.0, math.nan, math.inf, 0.0]])
MASK = torch.tensor([[True, True, True, True], [True, False, False, False]])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "is_clipped"),
    [
        (2.0, -1.0, 2.0, False),  # below c = 3
        (5.0, -1.0, 3.0, True),  # -c A instead of -ρ A
        (5.0, 1.0, -1.2, True),  # a good response is clipped as ever
        (0.5, -1.0, 0.8, True),
        (0.5, 1.0, -0.5, False),
    ],
)
def test_dual_clip_by_hand(ratio: float, advantage: float, loss: float, is_clipped: bool) -> None:
    log_ratios = torch.tensor([math.log(ratio)], requires_grad=True)
    found, clipped = clipped_surrogate(
        log_ratios, torch.tensor([advantage]), clip_range=0.2, clip_range_high=0.2, dual_clip=3.0
    )
    assert_close(found.detach(), torch.tensor([loss]), **F32_OP)
    assert clipped.tolist() == [is_clipped]
    found.sum().backward()
    assert log_ratios.grad is not None
    assert bool(log_ratios.grad == 0.0) is is_clipped


def test_dual_clip_must_be_above_one() -> None:
    with pytest.raises(ValueError, match=r"above 1, got 1\.0"):
        clipped_surrogate(torch.zeros(1), torch.zeros(1), clip_range=0.2, clip_range_high=0.2, dual_clip=1.0)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", (12 + 4) / 5),
        ("sequence_mean", (12 / 4 + 4 / 1) / 2),
        ("fixed_length", (12 + 4) / (2 * 10)),
    ],
)
def test_aggregation_by_hand(aggregation: str, expected: float) -> None:
    found = aggregate(VALUES, MASK, aggregation=aggregation, num_tokens=5, num_samples=2, max_response_len=10)
    assert float(found) == pytest.approx(expected)


@EXAMPLES
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    rows=st.integers(1, 6),
    aggregation=st.sampled_from(["token_mean", "sequence_mean", "fixed_length"]),
)
def test_the_shares_of_micro_batches_add_up(lengths: list[int], rows: int, aggregation: str) -> None:
    mask = torch.arange(6)[None, :] < torch.tensor(lengths)[:, None]
    values = torch.randn(mask.shape, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    sizes = {"num_tokens": sum(lengths), "num_samples": len(lengths), "max_response_len": 6}
    whole = aggregate(values, mask, aggregation=aggregation, **sizes)
    parts = [aggregate(v, m, aggregation=aggregation, **sizes)
             for v, m in zip(values.split(rows), mask.split(rows), strict=True)]  # fmt: skip
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-12, abs=1e-12)


def test_an_unknown_aggregation_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown loss aggregation 'mean'"):
        aggregate(VALUES, MASK, aggregation="mean", num_tokens=5, num_samples=2, max_response_len=10)
