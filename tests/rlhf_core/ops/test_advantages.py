"""Advantage estimators. B responses, R response tokens."""

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

from rlhf_core.ops.advantages import (
    gae,
    group_relative,
    leave_one_out,
    returns_to_go,
    reward_only,
    value_baseline,
)

GOLDEN = Path(__file__).parents[2] / "golden"
TRL = json.loads((GOLDEN / "trl.json").read_text())["cases"]
RLAX = json.loads((GOLDEN / "jax.json").read_text())["cases"]
EXAMPLES = settings(max_examples=30)
LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**32 - 1)
GAMMAS, LAMBDAS = st.floats(0.1, 1.0), st.floats(0.0, 1.0)
GARBAGE = st.sampled_from([math.nan, math.inf, -math.inf, 7.0])


def right_padded(lengths: list[int], width: int = 6) -> Tensor:
    return torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]


def draw(seed: int, shape: torch.Size, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loop_gae(rewards: list[float], values: list[float], gamma: float, gae_lambda: float) -> list[float]:
    """Schulman et al. 2016, eq. 16, forwards as the paper writes it: A_t = Σ_l (γλ)^l δ_{t+l}, V = 0 at the end."""
    ahead = [*values, 0.0][1:]
    deltas = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, ahead, strict=True)]
    return [
        math.fsum((gamma * gae_lambda) ** i * delta for i, delta in enumerate(deltas[t:])) for t in range(len(deltas))
    ]


def test_gae_by_hand() -> None:
    # γ = λ = 0.5, γλ = 0.25;  r = 1, 0, 2;  V = 0.5, 1, -1, and 0 after the end
    # δ_2 = 2 + 0.5 · 0 - (-1) = 3;      A_2 = 3
    # δ_1 = 0 + 0.5 · (-1) - 1 = -1.5;   A_1 = -1.5 + 0.25 · 3 = -0.75
    # δ_0 = 1 + 0.5 · 1 - 0.5 = 1;       A_0 = 1 + 0.25 · (-0.75) = 0.8125
    # the second response is one token: δ = 2 - 0.5 = 1.5
    rewards_BR = torch.tensor([[1.0, 0.0, 2.0, math.nan], [2.0, math.nan, math.inf, 1.0]])
    values_BR = torch.tensor([[0.5, 1.0, -1.0, math.inf], [0.5, 9.0, math.nan, 1.0]])
    advantages_BR, returns_BR = gae(rewards_BR, values_BR, right_padded([3, 1], 4), gamma=0.5, gae_lambda=0.5)
    assert_close(advantages_BR, torch.tensor([[0.8125, -0.75, 3.0, 0.0], [1.5, 0.0, 0.0, 0.0]]), **EXACT)
    assert_close(returns_BR, torch.tensor([[1.3125, 0.25, 2.0, 0.0], [2.0, 0.0, 0.0, 0.0]]), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0)])
def test_gae_agrees_with_a_loop(gamma: float, gae_lambda: float, dtype: torch.dtype) -> None:
    lengths = [6, 2, 0, 1, 5]
    mask_BR = right_padded(lengths)
    rewards_BR, values_BR = draw(1, mask_BR.shape, dtype), draw(2, mask_BR.shape, dtype)
    expected_BR = torch.zeros(mask_BR.shape, dtype=torch.float64)
    for b, n in enumerate(lengths):
        row = loop_gae(rewards_BR[b, :n].tolist(), values_BR[b, :n].tolist(), gamma, gae_lambda)
        expected_BR[b, :n] = torch.tensor(row, dtype=torch.float64)
    advantages_BR, returns_BR = gae(rewards_BR, values_BR, mask_BR, gamma=gamma, gae_lambda=gae_lambda)
    tolerance = F64_OP if dtype == torch.float64 else F32_OP
    assert advantages_BR.dtype == returns_BR.dtype == dtype
    assert_close(advantages_BR.double(), expected_BR, **tolerance)
    expected_BR += torch.where(mask_BR, values_BR.double(), 0.0)
    assert_close(returns_BR.double(), expected_BR, **tolerance)


def test_gae_of_a_long_response_in_float32() -> None:
    mask_BR = right_padded([512], 512)
    rewards_BR, values_BR = draw(3, mask_BR.shape, torch.float32), draw(4, mask_BR.shape, torch.float32)
    expected = loop_gae(rewards_BR[0].tolist(), values_BR[0].tolist(), 1.0, 0.95)
    advantages_BR, _ = gae(rewards_BR, values_BR, mask_BR, gamma=1.0, gae_lambda=0.95)
    assert_close(advantages_BR[0], torch.tensor(expected), **F32_SUM)


@pytest.mark.parametrize("name", [name for name in TRL if name.startswith("gae_")])
def test_gae_golden_trl(name: str) -> None:
    case, mask_BR = TRL[name], torch.tensor(TRL["mask"])
    rewards_BR, values_BR, expected_BR, expected_returns_BR = (
        torch.tensor(case[key], dtype=torch.float64) for key in ("rewards", "values", "advantages", "returns")
    )
    advantages_BR, returns_BR = gae(rewards_BR, values_BR, mask_BR, gamma=case["gamma"], gae_lambda=case["gae_lambda"])
    assert_close(advantages_BR, expected_BR, **F64_OP)
    assert_close(returns_BR, expected_returns_BR, **F64_OP)


@pytest.mark.parametrize("name", [name for name in RLAX if name.startswith("gae_")])
def test_gae_golden_rlax(name: str) -> None:
    case = RLAX[name]
    lengths = [len(row["rewards"]) for row in case["rows"]]

    def padded(key: str, filler: float) -> Tensor:
        rows = [row[key] + [filler] * (6 - len(row[key])) for row in case["rows"]]
        return torch.tensor(rows, dtype=torch.float64)

    advantages_BR, _ = gae(
        padded("rewards", math.nan),
        padded("values", math.nan),
        right_padded(lengths),
        gamma=case["gamma"],
        gae_lambda=case["gae_lambda"],
    )
    assert_close(advantages_BR, padded("advantages", 0.0), **F64_OP)


@EXAMPLES
@given(LENGTHS, SEEDS, GAMMAS, LAMBDAS, GARBAGE, st.integers(0, 3))
def test_padding_is_irrelevant(
    lengths: list[int], seed: int, gamma: float, gae_lambda: float, garbage: float, more: int
) -> None:
    mask_BR = right_padded(lengths)
    rewards_BR, values_BR = draw(seed, mask_BR.shape), draw(seed + 1, mask_BR.shape)
    wide_mask_BR = torch.nn.functional.pad(mask_BR, (0, more))

    def soiled(x_BR: Tensor) -> Tensor:
        return torch.nn.functional.pad(x_BR, (0, more)).masked_fill(~wide_mask_BR, garbage)

    clean = (
        *gae(rewards_BR, values_BR, mask_BR, gamma=gamma, gae_lambda=gae_lambda),
        *value_baseline(rewards_BR.masked_fill(~mask_BR, 0.0), values_BR, mask_BR),
        reward_only(rewards_BR, mask_BR),
    )
    wide = (
        *gae(soiled(rewards_BR), soiled(values_BR), wide_mask_BR, gamma=gamma, gae_lambda=gae_lambda),
        *value_baseline(soiled(rewards_BR), soiled(values_BR), wide_mask_BR),
        reward_only(soiled(rewards_BR), wide_mask_BR),
    )
    for clean_BR, wide_BR in zip(clean, wide, strict=True):
        assert (clean_BR[~mask_BR] == 0).all()
        assert_close(wide_BR, torch.nn.functional.pad(clean_BR, (0, more)), **F64_OP)


@EXAMPLES
@given(LENGTHS, SEEDS, GAMMAS, LAMBDAS)
def test_the_order_of_responses_is_irrelevant(lengths: list[int], seed: int, gamma: float, gae_lambda: float) -> None:
    mask_BR = right_padded(lengths)
    rewards_BR, values_BR = draw(seed, mask_BR.shape), draw(seed + 1, mask_BR.shape)
    order_B = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    straight_BR, _ = gae(rewards_BR, values_BR, mask_BR, gamma=gamma, gae_lambda=gae_lambda)
    permuted_BR, _ = gae(rewards_BR[order_B], values_BR[order_B], mask_BR[order_B], gamma=gamma, gae_lambda=gae_lambda)
    assert_close(permuted_BR, straight_BR[order_B], **EXACT)


@EXAMPLES
@given(LENGTHS, SEEDS, GAMMAS)
def test_the_ends_of_lambda(lengths: list[int], seed: int, gamma: float) -> None:
    mask_BR = right_padded(lengths)
    rewards_BR, values_BR = draw(seed, mask_BR.shape), draw(seed + 1, mask_BR.shape)
    # λ = 1: the return is the discounted sum of the rewards to come, whatever the values
    _, returns_BR = gae(rewards_BR, values_BR, mask_BR, gamma=gamma, gae_lambda=1.0)
    for b, n in enumerate(lengths):
        for t in range(n):
            to_come = math.fsum(gamma**i * r for i, r in enumerate(rewards_BR[b, t:n].tolist()))
            assert_close(returns_BR[b, t].item(), to_come, **F64_OP)
    # λ = 0: the return is one reward and the next value
    _, returns_BR = gae(rewards_BR, values_BR, mask_BR, gamma=gamma, gae_lambda=0.0)
    for b, n in enumerate(lengths):
        for t in range(n):
            following = values_BR[b, t + 1].item() if t + 1 < n else 0.0
            assert_close(returns_BR[b, t].item(), rewards_BR[b, t].item() + gamma * following, **F64_OP)


def test_gae_leaves_its_inputs_alone() -> None:
    mask_BR = right_padded([6, 2])
    rewards_BR, values_BR = draw(1, mask_BR.shape), draw(2, mask_BR.shape)
    before = rewards_BR.clone(), values_BR.clone()
    gae(rewards_BR, values_BR, mask_BR, gamma=1.0, gae_lambda=0.95)
    assert_close((rewards_BR, values_BR), before, **EXACT)


def test_responses_without_tokens_have_no_advantages() -> None:
    none_BR, mask_BR = torch.zeros(2, 0), right_padded([0, 0], 0)
    advantages_BR, returns_BR = gae(none_BR, none_BR, mask_BR, gamma=1.0, gae_lambda=0.95)
    assert advantages_BR.shape == returns_BR.shape == (2, 0)


def test_one_advantage_a_response_by_hand() -> None:
    # R = 1 + 2 + 4 = 7 less V(x) = 2, the first value: 5;  R = -3 less 0.5: -3.5
    rewards_BR = torch.tensor([[1.0, 2.0, 4.0], [-3.0, math.nan, math.nan]])
    values_BR = torch.tensor([[2.0, 50.0, 60.0], [0.5, math.nan, math.nan]])
    mask_BR = right_padded([3, 1], 3)
    advantages_BR, returns_BR = value_baseline(rewards_BR, values_BR, mask_BR)
    totals_BR = torch.tensor([[7.0, 7.0, 7.0], [-3.0, 0.0, 0.0]])
    assert_close(advantages_BR, torch.tensor([[5.0, 5.0, 5.0], [-3.5, 0.0, 0.0]]), **EXACT)
    assert_close(returns_BR, totals_BR, **EXACT)
    assert_close(reward_only(rewards_BR, mask_BR), totals_BR, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(3))
def test_one_advantage_a_response_agrees_with_a_loop(seed: int, dtype: torch.dtype) -> None:
    lengths = [6, 2, 1, 5]
    mask_BR = right_padded(lengths)
    rewards_BR, values_BR = draw(seed, mask_BR.shape, dtype), draw(seed + 1, mask_BR.shape, dtype)
    totals_BR, less_value_BR = (torch.zeros(mask_BR.shape, dtype=torch.float64) for _ in range(2))
    for b, n in enumerate(lengths):
        total = math.fsum(rewards_BR[b, :n].tolist())
        totals_BR[b, :n], less_value_BR[b, :n] = total, total - values_BR[b, 0].item()
    tolerance = F64_OP if dtype == torch.float64 else F32_OP
    advantages_BR, returns_BR = value_baseline(rewards_BR, values_BR, mask_BR)
    assert_close(advantages_BR.double(), less_value_BR, **tolerance)
    assert_close(returns_BR.double(), totals_BR, **tolerance)
    assert_close(reward_only(rewards_BR, mask_BR).double(), totals_BR, **tolerance)


@EXAMPLES
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), SEEDS)
def test_undiscounted_gae_of_the_first_token_is_the_value_baseline(lengths: list[int], seed: int) -> None:
    mask_BR = right_padded(lengths)
    rewards_BR, values_BR = draw(seed, mask_BR.shape), draw(seed + 1, mask_BR.shape)
    token_BR, _ = gae(rewards_BR, values_BR, mask_BR, gamma=1.0, gae_lambda=1.0)
    response_BR, _ = value_baseline(rewards_BR, values_BR, mask_BR)
    assert_close(token_BR[:, 0], response_BR[:, 0], **F64_OP)


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.0, 0.9), (1.1, 0.9), (-1.0, 0.9), (1.0, -0.1), (1.0, 1.1)])
def test_gae_refuses_coefficients_out_of_range(gamma: float, gae_lambda: float) -> None:
    zeros = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="gamma"):
        gae(zeros, zeros, right_padded([2], 2), gamma=gamma, gae_lambda=gae_lambda)


def test_bad_shapes_and_masks_are_refused() -> None:
    zeros, mask_BR = torch.zeros(2, 3), right_padded([3, 1], 3)
    for bad_values, bad_mask, message in [
        (zeros[:, :2], mask_BR, "shapes"),
        (zeros, mask_BR[:1], "shapes"),
        (zeros, mask_BR.float(), "bool"),
    ]:
        with pytest.raises(ValueError, match=message):
            gae(zeros, bad_values, bad_mask, gamma=1.0, gae_lambda=0.95)
        with pytest.raises(ValueError, match=message):
            value_baseline(zeros, bad_values, bad_mask)
    with pytest.raises(ValueError, match="shapes"):
        reward_only(zeros, mask_BR[:1])
    with pytest.raises(ValueError, match="bool"):
        reward_only(zeros, mask_BR.float())


# --- critic-free estimators

ROWS = torch.tensor([[True, True, True], [True, False, False], [True, True, False], [True, True, True]])
REWARDS = torch.tensor([[1.0, 0.0, 2.0], [1.0, math.nan, math.inf], [0.5, -0.5, math.nan], [2.0, 2.0, 2.0]])
PROMPT = torch.tensor([7, 3, 7, 3])  # totals 3, 1, 0, 6: prompt 7 has 3 and 0, prompt 3 has 1 and 6


def everywhere(per_response: list[float]) -> Tensor:
    return torch.where(ROWS, torch.tensor(per_response)[:, None], 0.0)


def test_leave_one_out_by_hand() -> None:
    # with two responses, each is compared with the other: 3 - 0, 1 - 6, 0 - 3, 6 - 1
    assert_close(leave_one_out(REWARDS, ROWS, PROMPT), everywhere([3.0, -5.0, -3.0, 5.0]), **EXACT)


def test_group_relative_by_hand() -> None:
    # means 1.5 and 3.5; sample std of {3, 0} is 3 / sqrt 2, of {1, 6} it is 5 / sqrt 2
    plain = everywhere([1.5, -2.5, -1.5, 2.5])
    assert_close(group_relative(REWARDS, ROWS, PROMPT, divide_by_std=False), plain, **EXACT)
    half = math.sqrt(0.5)
    scaled = everywhere([half, -half, -half, half])
    assert_close(group_relative(REWARDS, ROWS, PROMPT, divide_by_std=True), scaled, **F32_OP)


def test_a_group_of_equal_rewards_is_not_divided_by_nothing() -> None:
    same = torch.full((4, 3), 0.1)
    full = torch.ones(4, 3, dtype=torch.bool)
    assert group_relative(same, full, torch.tensor([0, 0, 1, 1]), divide_by_std=True).abs().max() == 0.0
    assert leave_one_out(same, full, torch.tensor([0, 0, 1, 1])).abs().max() == 0.0


def test_returns_to_go_by_hand() -> None:
    expected = torch.tensor([[1.5, 1.0, 2.0], [1.0, 0.0, 0.0], [0.25, -0.5, 0.0], [3.5, 3.0, 2.0]])
    assert_close(returns_to_go(REWARDS, ROWS, gamma=0.5), expected, **EXACT)


@EXAMPLES
@given(seed=SEEDS, prompts=st.integers(1, 4), k=st.integers(2, 5), garbage=GARBAGE)
def test_group_estimators_agree_with_a_loop(seed: int, prompts: int, k: int, garbage: float) -> None:
    """In any order of the rows, whatever stands in the padding."""
    generator = torch.Generator().manual_seed(seed)
    mask_BR = right_padded(torch.randint(1, 7, (prompts * k,), generator=generator).tolist())
    rewards_BR = torch.where(mask_BR, draw(seed, mask_BR.shape), garbage)
    order = torch.randperm(prompts * k, generator=generator)
    group_B = torch.arange(prompts).repeat_interleave(k)[order]
    totals = [math.fsum(r[m].tolist()) for r, m in zip(rewards_BR, mask_BR, strict=True)]
    for row, total in enumerate(totals):
        others = [t for i, t in enumerate(totals) if group_B[i] == group_B[row] and i != row]
        group = [*others, total]
        mean = math.fsum(group) / k
        std = math.sqrt(math.fsum((x - mean) ** 2 for x in group) / (k - 1))
        expected = {
            "rloo": total - math.fsum(others) / (k - 1),
            "mean": total - mean,
            "std": (total - mean) / std,
        }
        found = {
            "rloo": leave_one_out(rewards_BR, mask_BR, group_B),
            "mean": group_relative(rewards_BR, mask_BR, group_B, divide_by_std=False),
            "std": group_relative(rewards_BR, mask_BR, group_B, divide_by_std=True),
        }
        for name, value in expected.items():
            real = found[name][row][mask_BR[row]].double()
            assert_close(real, torch.full_like(real, value), **F32_OP)
            assert not found[name][row][~mask_BR[row]].any()


def test_a_single_response_and_wrong_shapes_are_refused() -> None:
    for estimate in (leave_one_out, lambda *a: group_relative(*a, divide_by_std=True)):
        with pytest.raises(ValueError, match="single response"):
            estimate(REWARDS, ROWS, torch.tensor([0, 0, 1, 2]))
        with pytest.raises(ValueError, match="shapes differ"):
            estimate(REWARDS, ROWS, torch.tensor([0, 0]))
