"""Means, variances and whitening over real tokens. B responses, R response tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import EXACT, F32_OP, F32_SUM, F64_OP
from torch import Tensor
from torch.testing import assert_close

from rlhf_core.ops.masking import MIN_STD, last_real, masked_mean, masked_std, masked_sum, whiten

TRL = json.loads((Path(__file__).parents[2] / "golden" / "trl.json").read_text())["cases"]
EXAMPLES = settings(max_examples=30)
LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=5).filter(lambda lengths: sum(lengths) > 1)
SEEDS = st.integers(0, 2**32 - 1)
GARBAGE = st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 0.0])


def right_padded(lengths: list[int], width: int = 6) -> Tensor:
    return torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]


def draw(
    seed: int, mask_BR: Tensor, *, mean: float = 0.0, std: float = 1.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (mean + std * torch.randn(mask_BR.shape, generator=generator, dtype=torch.float64)).to(dtype)


def real_values(values_BR: Tensor, mask_BR: Tensor) -> list[float]:
    rows = zip(values_BR.tolist(), mask_BR.tolist(), strict=True)
    return [value for row, mask in rows for value, real in zip(row, mask, strict=True) if real]


def test_by_hand() -> None:
    # real values 1, 2, 3 and 4: sum 10, mean 2.5, squared deviations 2.25 + 0.25 + 0.25 + 2.25 = 5, variance 1.25
    values_BR = torch.tensor([[1.0, 2.0, 3.0], [4.0, math.nan, math.inf]])
    mask_BR = right_padded([3, 1], 3)
    std = math.sqrt(1.25)
    assert masked_sum(values_BR, mask_BR) == 10.0
    assert masked_mean(values_BR, mask_BR) == 2.5
    assert_close(masked_std(values_BR, mask_BR).item(), std, **F32_OP)
    whitened_BR, flat = whiten(values_BR, mask_BR, keep_mean=False)
    expected_BR = torch.tensor([[-1.5, -0.5, 0.5], [1.5, 0.0, 0.0]]) / std
    assert not flat
    assert_close(whitened_BR, expected_BR, **F32_OP)
    kept_BR, flat = whiten(values_BR, mask_BR, keep_mean=True)
    assert not flat
    assert_close(kept_BR, torch.where(mask_BR, expected_BR + 2.5, 0.0), **F32_OP)


def test_keeping_the_mean_by_hand() -> None:
    """Mean 4, std 2: (2 - 4) / 2 + 4 = 3 and (6 - 4) / 2 + 4 = 5, as Ziegler's ``whiten(shift_mean=False)``."""
    whitened_BR, flat = whiten(torch.tensor([[2.0, 6.0, 99.0]]), right_padded([2], 3), keep_mean=True)
    assert not flat
    assert_close(whitened_BR, torch.tensor([[3.0, 5.0, 0.0]]), **EXACT)


def test_nothing_real_is_zero() -> None:
    values_BR, mask_BR = torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool)
    assert masked_sum(values_BR, mask_BR) == 0.0
    assert masked_mean(values_BR, mask_BR) == 0.0
    assert masked_std(values_BR, mask_BR) == 0.0
    whitened_BR, flat = whiten(values_BR, mask_BR, keep_mean=False)
    assert flat
    assert_close(whitened_BR, torch.zeros(2, 3), **EXACT)


@pytest.mark.parametrize(("keep_mean", "expected"), [(False, 0.0), (True, 2.0)])
def test_a_constant_batch_is_centred_and_not_divided(keep_mean: bool, expected: float) -> None:
    mask_BR = right_padded([3, 2])
    whitened_BR, flat = whiten(torch.full((2, 6), 2.0), mask_BR, keep_mean=keep_mean)
    assert flat
    assert_close(whitened_BR, torch.where(mask_BR, expected, 0.0), **EXACT)


@pytest.mark.parametrize(("value", "count"), [(100.1, 512 * 24), (1000.3, 1000)])
def test_a_large_constant_batch_is_centred_and_not_divided(value: float, count: int) -> None:
    whitened_BR, flat = whiten(torch.full((1, count), value), right_padded([count], count), keep_mean=False)
    assert flat
    assert_close(whitened_BR, torch.zeros(1, count), **F32_SUM)


def test_one_real_entry_is_centred_and_not_divided() -> None:
    whitened_BR, flat = whiten(torch.full((1, 3), 7.0), right_padded([1], 3), keep_mean=False)
    assert flat
    assert_close(whitened_BR, torch.zeros(1, 3), **EXACT)


def test_the_smallest_std_that_is_divided() -> None:
    mask_BR = right_padded([2], 2)
    for factor, expected in [(2.0, False), (0.5, True)]:
        std = factor * MIN_STD
        _, flat = whiten(torch.tensor([[-std, std]], dtype=torch.float64), mask_BR, keep_mean=False)
        assert flat is expected


def test_last_real_by_hand() -> None:
    # full, partly filled and empty rows
    expected_BR = torch.tensor([[0, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    assert_close(last_real(right_padded([4, 2, 1, 0], 4)), expected_BR, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_a_loop(seed: int, dtype: torch.dtype) -> None:
    mask_BR = right_padded([6, 3, 1, 5])
    values_BR = draw(seed, mask_BR, mean=0.5, dtype=dtype)
    real = real_values(values_BR, mask_BR)
    tolerance = F64_OP if dtype == torch.float64 else F32_OP
    mean = math.fsum(real) / len(real)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in real) / len(real))
    assert_close(masked_sum(values_BR, mask_BR).item(), math.fsum(real), **tolerance)
    assert_close(masked_mean(values_BR, mask_BR).item(), mean, **tolerance)
    assert_close(masked_std(values_BR, mask_BR).item(), std, **tolerance)
    for keep_mean in (False, True):
        whitened_BR, _ = whiten(values_BR, mask_BR, keep_mean=keep_mean)
        expected = [(value - mean) / std + (mean if keep_mean else 0.0) for value in real]
        assert_close(whitened_BR[mask_BR].double(), torch.tensor(expected, dtype=torch.float64), **tolerance)


def test_golden_trl() -> None:
    case, mask_BR = TRL["masking"], torch.tensor(TRL["mask"])
    values_BR = torch.tensor(case["values"], dtype=torch.float64)
    mean, variance = masked_mean(values_BR, mask_BR).item(), masked_std(values_BR, mask_BR).item() ** 2
    assert_close(mean, case["masked_mean"], **F64_OP)
    assert_close(variance, case["masked_var_population"], **F64_OP)
    # TRL divides by sqrt(Bessel variance + 1e-8)
    to_population = math.sqrt((case["masked_var_bessel"] + 1e-8) / case["masked_var_population"])
    centred_BR = torch.tensor(case["masked_whiten"], dtype=torch.float64) * to_population
    kept_BR = torch.tensor(case["masked_whiten_keep_mean"], dtype=torch.float64) - case["masked_mean"]
    kept_BR = kept_BR * to_population + case["masked_mean"]
    assert_close(whiten(values_BR, mask_BR, keep_mean=False)[0][mask_BR], centred_BR[mask_BR], **F64_OP)
    assert_close(whiten(values_BR, mask_BR, keep_mean=True)[0][mask_BR], kept_BR[mask_BR], **F64_OP)


@EXAMPLES
@given(LENGTHS, SEEDS, GARBAGE, st.integers(0, 4))
def test_padding_is_irrelevant(lengths: list[int], seed: int, garbage: float, more: int) -> None:
    mask_BR = right_padded(lengths)
    values_BR = draw(seed, mask_BR)
    padded_mask_BR = torch.nn.functional.pad(mask_BR, (0, more))
    padded_BR = torch.nn.functional.pad(values_BR, (0, more)).masked_fill(~padded_mask_BR, garbage)
    for function in (masked_sum, masked_mean, masked_std):
        assert_close(function(padded_BR, padded_mask_BR), function(values_BR, mask_BR), **F64_OP)
    for keep_mean in (False, True):
        whitened_BR, _ = whiten(values_BR, mask_BR, keep_mean=keep_mean)
        expected_BR = torch.nn.functional.pad(whitened_BR, (0, more))
        assert_close(whiten(padded_BR, padded_mask_BR, keep_mean=keep_mean)[0], expected_BR, **F64_OP)
    assert_close(last_real(padded_mask_BR), torch.nn.functional.pad(last_real(mask_BR), (0, more)), **EXACT)


@EXAMPLES
@given(LENGTHS, SEEDS)
def test_the_order_of_responses_is_irrelevant(lengths: list[int], seed: int) -> None:
    mask_BR = right_padded(lengths)
    values_BR = draw(seed, mask_BR)
    order_B = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    assert_close(masked_std(values_BR[order_B], mask_BR[order_B]), masked_std(values_BR, mask_BR), **F64_OP)
    whitened_BR, _ = whiten(values_BR, mask_BR, keep_mean=False)
    assert_close(whiten(values_BR[order_B], mask_BR[order_B], keep_mean=False)[0], whitened_BR[order_B], **F64_OP)
    assert_close(last_real(mask_BR[order_B]), last_real(mask_BR)[order_B], **EXACT)


@EXAMPLES
@given(LENGTHS, SEEDS, st.floats(-10, 10), st.floats(0.01, 100))
def test_whitened_values_have_mean_0_and_std_1(lengths: list[int], seed: int, mean: float, std: float) -> None:
    mask_BR = right_padded(lengths)
    values_BR = draw(seed, mask_BR, mean=mean, std=std)
    whitened_BR, flat = whiten(values_BR, mask_BR, keep_mean=False)
    assert not flat
    assert_close(masked_mean(whitened_BR, mask_BR).item(), 0.0, **F64_OP)
    assert_close(masked_std(whitened_BR, mask_BR).item(), 1.0, **F64_OP)
    kept_BR, _ = whiten(values_BR, mask_BR, keep_mean=True)
    assert_close(masked_mean(kept_BR, mask_BR).item(), masked_mean(values_BR, mask_BR).item(), **F64_OP)
    assert_close(masked_std(kept_BR, mask_BR).item(), 1.0, **F64_OP)


@EXAMPLES
@given(LENGTHS, SEEDS)
def test_accumulation_is_the_full_batch(lengths: list[int], seed: int) -> None:
    mask_BR = right_padded(lengths)
    values_BR = draw(seed, mask_BR, dtype=torch.float32)
    parts = [masked_sum(values_BR[i : i + 1], mask_BR[i : i + 1]) for i in range(len(lengths))]
    assert_close(torch.stack(parts).sum() / mask_BR.sum(), masked_mean(values_BR, mask_BR), **F32_SUM)


def test_garbage_in_padding_does_not_reach_the_gradient() -> None:
    mask_BR = right_padded([2, 1], 3)
    values_BR = torch.ones(2, 3).masked_fill(~mask_BR, math.nan).requires_grad_()
    masked_mean(values_BR, mask_BR).backward()
    assert_close(values_BR.grad, torch.where(mask_BR, 1 / 3, 0.0), **F32_OP)


def test_a_bad_mask_is_refused() -> None:
    values_BR = torch.zeros(2, 3)
    for function in (masked_sum, masked_mean, masked_std):
        with pytest.raises(ValueError, match="bool"):
            function(values_BR, torch.ones(2, 3))
        with pytest.raises(ValueError, match="shape"):
            function(values_BR, torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="bool"):
        whiten(values_BR, torch.ones(2, 3), keep_mean=False)
    with pytest.raises(ValueError, match="bool"):
        last_real(torch.ones(2, 3))
