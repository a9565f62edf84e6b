"""From scores and KL to token rewards. B responses, R response tokens, C components."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import EXACT, F32_OP, F64_OP
from torch import Tensor
from torch.testing import assert_close

from rlhf_core.contracts.loop_state import ScoreMoments
from rlhf_core.ops.rewards import (
    combined_score,
    normalize_scores,
    penalize_missing_eos,
    shaped_rewards,
    update_moments,
)

GOLDEN = Path(__file__).parents[2] / "golden"
TRL = json.loads((GOLDEN / "trl.json").read_text())["cases"]
SKLEARN = json.loads((GOLDEN / "scientific.json").read_text())["cases"]["moments"]
EXAMPLES = settings(max_examples=30)
LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**32 - 1)
SCORES = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8)


def right_padded(lengths: list[int], width: int = 6) -> Tensor:
    return torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_moments(actual: ScoreMoments, expected: ScoreMoments) -> None:
    assert actual.count == expected.count
    assert_close((actual.mean, actual.m2), (expected.mean, expected.m2), **F64_OP)


# --- moments and normalisation


def test_moments_by_hand() -> None:
    # scores 1 and 3: mean 2, (1 - 2)² + (3 - 2)² = 2
    moments = update_moments(ScoreMoments(), torch.tensor([1.0, 3.0]))
    assert moments == ScoreMoments(count=2, mean=2.0, m2=2.0)
    # and then 8: mean 4, 9 + 1 + 16 = 26
    moments = update_moments(moments, torch.tensor([8.0]))
    assert_moments(moments, ScoreMoments(count=3, mean=4.0, m2=26.0))
    # std = sqrt(26 / 3) = 2.943920;  (8 - 4) / 2.943920 = 1.358732
    assert_close(normalize_scores(torch.tensor([8.0, 4.0]), moments), torch.tensor([1.358732, 0.0]), **F32_OP)


def test_moments_golden_sklearn() -> None:
    moments = ScoreMoments()
    for batch, expected in zip(SKLEARN["batches"], SKLEARN["running"], strict=True):
        moments = update_moments(moments, torch.tensor(batch, dtype=torch.float64))
        assert_moments(moments, ScoreMoments(**expected))
    normalized_B = normalize_scores(torch.tensor(SKLEARN["batches"][-1]), moments)
    assert_close(normalized_B, torch.tensor(SKLEARN["normalized_last"]), **F32_OP)


@EXAMPLES
@given(st.lists(SCORES, min_size=1, max_size=5))
def test_moments_of_batches_are_those_of_all_scores(batches: list[list[float]]) -> None:
    moments = ScoreMoments()
    for batch in batches:
        moments = update_moments(moments, torch.tensor(batch))
    scores = [score for batch in batches for score in batch]
    mean = math.fsum(scores) / len(scores)
    m2 = math.fsum((score - mean) ** 2 for score in scores)
    assert_moments(moments, ScoreMoments(len(scores), mean, m2))


def test_moments_keep_their_digits_far_from_zero() -> None:
    # 1e6 ± 1: the sum of squares, 1e12, holds no such difference in float32
    moments = ScoreMoments()
    for _ in range(50):
        moments = update_moments(moments, torch.tensor([1e6 - 1, 1e6 + 1]))
    assert_moments(moments, ScoreMoments(count=100, mean=1e6, m2=100.0))


@pytest.mark.parametrize(
    "moments",
    [ScoreMoments(count=1, mean=2.0, m2=0.0), ScoreMoments(count=9, mean=2.0, m2=1e-15)],
    ids=["one score", "no spread"],
)
def test_scores_without_a_spread_are_centred_only(moments: ScoreMoments) -> None:
    assert_close(normalize_scores(torch.tensor([2.0, 5.0]), moments), torch.tensor([0.0, 3.0]), **EXACT)


def test_no_moments_yet_leave_the_scores_alone() -> None:
    assert_close(normalize_scores(torch.tensor([2.0, 5.0]), ScoreMoments()), torch.tensor([2.0, 5.0]), **EXACT)


@EXAMPLES
@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=20), st.floats(0.1, 10))
def test_normalized_scores_have_mean_0_and_std_1(scores: list[float], spread: float) -> None:
    score_B = torch.tensor([*scores, 60.0, -60.0]) * spread
    normalized = normalize_scores(score_B, update_moments(ScoreMoments(), score_B)).tolist()
    assert_close(math.fsum(normalized) / len(normalized), 0.0, **F32_OP)
    assert_close(math.fsum(x * x for x in normalized) / len(normalized), 1.0, **F32_OP)


# --- components


TWO_BC = torch.tensor([[1.0, 4.0], [3.0, -2.0]])
ALL_BC = torch.ones(2, 2, dtype=torch.bool)
COMBINATIONS = ("weighted_sum", "min", "mean_minus_std")


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        ("weighted_sum", [0.0, 7.0]),  # 2 · 1 - 0.5 · 4 = 0;  2 · 3 - 0.5 · (-2) = 7
        ("min", [-2.0, 1.0]),  # of (2, -2) and (6, 1)
        ("mean_minus_std", [-1.0, 2.25]),  # 0 - 0.5 · 2;  3.5 - 0.5 · 2.5
    ],
)
def test_combined_by_hand(combine: str, expected: list[float]) -> None:
    found = combined_score(TWO_BC, ALL_BC, [2.0, -0.5], combine=combine, std_coef=0.5)
    assert_close(found, torch.tensor(expected), **EXACT)


@pytest.mark.parametrize(
    ("combine", "expected"),
    [("weighted_sum", [2.0, 1.0]), ("min", [2.0, 1.0]), ("mean_minus_std", [2.0, 1.0])],
)
def test_a_dropped_component_has_no_part(combine: str, expected: list[float]) -> None:
    """One is left of each: its weighted score is the sum, the least and the mean, and its std is 0."""
    mask_BC = torch.tensor([[True, False], [False, True]])
    for rubbish in (math.nan, 1e30, -1e30):
        components_BC = torch.where(mask_BC, TWO_BC, rubbish)
        found = combined_score(components_BC, mask_BC, [2.0, -0.5], combine=combine, std_coef=3.0)
        assert_close(found, torch.tensor(expected), **EXACT)


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_combined_agrees_with_a_loop(seed: int, combine: str) -> None:
    components_BC, weights = draw(seed, 7, 4, dtype=torch.float32), draw(seed + 1, 4).tolist()
    mask_BC = draw(seed + 2, 7, 4) > -0.5
    mask_BC[:, seed] = True
    assert not mask_BC.all()
    expected: list[float] = []
    for values, mask in zip(components_BC.tolist(), mask_BC.tolist(), strict=True):
        left = [w * x for w, x, is_left in zip(weights, values, mask, strict=True) if is_left]
        by_name = {
            "weighted_sum": math.fsum(left),
            "min": min(left),
            "mean_minus_std": statistics.fmean(left) - 0.7 * statistics.pstdev(left),
        }
        expected.append(by_name[combine])
    found = combined_score(components_BC, mask_BC, weights, combine=combine, std_coef=0.7)
    assert_close(found, torch.tensor(expected), **F32_OP)


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_one_component_of_weight_1_is_the_score_bit_for_bit(combine: str) -> None:
    raw_B1 = draw(3, 50, 1, dtype=torch.float32)
    found = combined_score(raw_B1, torch.ones(50, 1, dtype=torch.bool), [1.0], combine=combine, std_coef=5.0)
    assert torch.equal(found, raw_B1[:, 0])


@pytest.mark.parametrize(
    ("shape", "mask", "weights", "combine", "problem"),
    [
        ((4, 2), (4, 2), 3, "min", r"components \(4, 2\), mask \(4, 2\), 3 weights"),
        ((4, 2), (4, 1), 2, "min", r"components \(4, 2\), mask \(4, 1\), 2 weights"),
        ((4, 2), (4, 2), 2, "max", "unknown combination 'max'; known: weighted_sum, min, mean_minus_std"),
    ],
)
def test_combined_refuses(shape: Any, mask: Any, weights: int, combine: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        combined_score(
            torch.zeros(shape), torch.ones(mask, dtype=torch.bool), [1.0] * weights, combine=combine, std_coef=1.0
        )


def test_combined_refuses_a_response_without_components() -> None:
    mask_BC = torch.tensor([[True, True], [False, False]])
    with pytest.raises(ValueError, match="a response has no component left"):
        combined_score(TWO_BC, mask_BC, [1.0, 1.0], combine="min", std_coef=1.0)


# --- missing EOS


@pytest.mark.parametrize(("mode", "expected"), [("subtract", [2.0, -0.5]), ("set", [2.0, -1.5])])
def test_missing_eos_by_hand(mode: str, expected: list[float]) -> None:
    # the second did not end: 1 - 1.5 = -0.5, or -1.5 whatever the score
    score_B, ended_B = torch.tensor([2.0, 1.0]), torch.tensor([True, False])
    assert_close(penalize_missing_eos(score_B, ended_B, penalty=1.5, mode=mode), torch.tensor(expected), **EXACT)


def test_missing_eos_golden_trl() -> None:
    case = TRL["missing_eos"]
    score_B = torch.tensor(case["scores"], dtype=torch.float64)
    penalised_B = penalize_missing_eos(score_B, torch.tensor(case["ended"]), penalty=case["penalty"], mode="subtract")
    assert_close(penalised_B, torch.tensor(case["penalised"], dtype=torch.float64), **F64_OP)


@EXAMPLES
@given(SCORES, SEEDS, st.floats(0, 10), st.sampled_from(["subtract", "set"]))
def test_missing_eos_agrees_with_a_loop(scores: list[float], seed: int, penalty: float, mode: str) -> None:
    ended_B = draw(seed, len(scores)) > 0
    expected = [
        score if ended else (score - penalty if mode == "subtract" else -penalty)
        for score, ended in zip(scores, ended_B.tolist(), strict=True)
    ]
    score_B = torch.tensor(scores, dtype=torch.float64)
    penalised_B = penalize_missing_eos(score_B, ended_B, penalty=penalty, mode=mode)
    assert_close(penalised_B, torch.tensor(expected, dtype=torch.float64), **F64_OP)


def test_missing_eos_refuses_an_unknown_mode() -> None:
    with pytest.raises(ValueError, match="divide"):
        penalize_missing_eos(torch.zeros(1), torch.tensor([True]), penalty=1.0, mode="divide")


# --- token rewards


def loop_rewards(
    scores: list[float], kl: list[list[float]], mask: list[list[bool]], kl_coef: float, level: str
) -> Tensor:
    """Ziegler et al. 2019, eq. 2: R = score - β log(π / ρ), the score where the response ends."""
    rewards = torch.zeros(len(scores), len(mask[0]), dtype=torch.float64)
    for b, score in enumerate(scores):
        length = sum(mask[b])
        if length == 0:
            continue
        if level == "token":
            for t in range(length):
                rewards[b, t] = -kl_coef * kl[b][t]
            rewards[b, length - 1] += score
        else:
            rewards[b, length - 1] = score - kl_coef * math.fsum(kl[b][:length])
    return rewards


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        # β = 0.5.  First: KL 1, 2, -1, score 10;  second: KL 4, score -3
        ("token", [[-0.5, -1.0, 10.5], [-5.0, 0.0, 0.0]]),
        ("sequence", [[0.0, 0.0, 9.0], [-5.0, 0.0, 0.0]]),  # 10 - 0.5 · 2 = 9
    ],
)
def test_shaped_rewards_by_hand(level: str, expected: list[list[float]]) -> None:
    kl_BR = torch.tensor([[1.0, 2.0, -1.0], [4.0, math.nan, math.nan]])
    rewards_BR = shaped_rewards(torch.tensor([10.0, -3.0]), kl_BR, right_padded([3, 1], 3), kl_coef=0.5, level=level)
    assert_close(rewards_BR, torch.tensor(expected), **F32_OP)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("seed", range(3))
def test_shaped_rewards_agree_with_a_loop(seed: int, level: str, dtype: torch.dtype) -> None:
    mask_BR = right_padded([6, 3, 1, 0, 5])
    score_B, kl_BR = draw(seed, 5, dtype=dtype), draw(seed + 1, 5, 6, dtype=dtype)
    expected_BR = loop_rewards(score_B.tolist(), kl_BR.tolist(), mask_BR.tolist(), 0.15, level)
    rewards_BR = shaped_rewards(score_B, kl_BR, mask_BR, kl_coef=0.15, level=level)
    assert_close(rewards_BR.double(), expected_BR, **(F64_OP if dtype == torch.float64 else F32_OP))


def test_shaped_rewards_golden_trl() -> None:
    case = TRL["shaped_rewards_full_length"]
    score_B, kl_BR, expected_BR = (
        torch.tensor(case[name], dtype=torch.float64) for name in ("scores", "kl", "rewards")
    )
    everything_BR = torch.ones_like(kl_BR, dtype=torch.bool)
    rewards_BR = shaped_rewards(score_B, kl_BR, everything_BR, kl_coef=case["kl_coef"], level="token")
    assert_close(rewards_BR, expected_BR, **F64_OP)


@EXAMPLES
@given(LENGTHS, SEEDS, st.floats(0, 2), st.sampled_from([math.nan, math.inf, -math.inf, 7.0]))
def test_both_levels_pay_the_same_in_all_and_padding_is_irrelevant(
    lengths: list[int], seed: int, kl_coef: float, garbage: float
) -> None:
    mask_BR = right_padded(lengths)
    score_B, kl_BR = draw(seed, len(lengths)), draw(seed + 1, *mask_BR.shape)
    soiled_BR = kl_BR.masked_fill(~mask_BR, garbage)
    token_BR, sequence_BR = (
        shaped_rewards(score_B, soiled_BR, mask_BR, kl_coef=kl_coef, level=level) for level in ("token", "sequence")
    )
    assert_close(token_BR.sum(dim=1), sequence_BR.sum(dim=1), **F64_OP)
    assert_close(token_BR, shaped_rewards(score_B, kl_BR, mask_BR, kl_coef=kl_coef, level="token"), **EXACT)
    for rewards_BR in (token_BR, sequence_BR):
        assert (rewards_BR[~mask_BR] == 0).all()


@EXAMPLES
@given(LENGTHS, SEEDS, st.sampled_from(["token", "sequence"]))
def test_the_order_of_responses_is_irrelevant(lengths: list[int], seed: int, level: str) -> None:
    mask_BR = right_padded(lengths)
    score_B, kl_BR = draw(seed, len(lengths)), draw(seed + 1, *mask_BR.shape)
    order_B = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    rewards_BR = shaped_rewards(score_B, kl_BR, mask_BR, kl_coef=0.3, level=level)
    permuted_BR = shaped_rewards(score_B[order_B], kl_BR[order_B], mask_BR[order_B], kl_coef=0.3, level=level)
    assert_close(permuted_BR, rewards_BR[order_B], **EXACT)


def test_shaped_rewards_refuse_bad_arguments() -> None:
    score_B, kl_BR, mask_BR = torch.zeros(2), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="episode"):
        shaped_rewards(score_B, kl_BR, mask_BR, kl_coef=0.1, level="episode")
    with pytest.raises(ValueError, match="shapes"):
        shaped_rewards(score_B, kl_BR[:, :2], mask_BR, kl_coef=0.1, level="token")
    with pytest.raises(ValueError, match="shapes"):
        shaped_rewards(torch.zeros(3), kl_BR, mask_BR, kl_coef=0.1, level="token")
    with pytest.raises(ValueError, match="bool"):
        shaped_rewards(score_B, kl_BR, mask_BR.float(), kl_coef=0.1, level="token")
