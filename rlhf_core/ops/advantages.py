"""Advantage estimators. B responses, R response tokens; results are not whitened."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_core.ops.masking import MIN_STD


def gae(
    rewards_BR: Tensor, values_BR: Tensor, response_mask_BR: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation over response tokens.

        delta_t = r_t + gamma V_{t+1} - V_t;   A_t = delta_t + gamma gae_lambda A_{t+1}

    Args:
        rewards_BR: [B, R] float32, reward units.
        values_BR: [B, R] float32, V before each token.
        response_mask_BR: [B, R] bool, True = generated token; right-padded.
        gamma: discount per token, in (0, 1].
        gae_lambda: in [0, 1].
    Returns: (advantages_BR, returns_BR), float32, zero where masked; returns = advantages + values.
    Raises: ValueError if shapes differ or a coefficient is out of range.
    Source: arXiv 1506.02438, eq. 16. Differs: bootstraps 0 after the last real token.
    """
    _check(rewards_BR, values_BR, response_mask_BR)
    if not 0 < gamma <= 1 or not 0 <= gae_lambda <= 1:
        raise ValueError(f"gamma must be in (0, 1] and gae_lambda in [0, 1]; got {gamma} and {gae_lambda}")
    rewards_BR = torch.where(response_mask_BR, rewards_BR, 0.0)
    values_BR = torch.where(response_mask_BR, values_BR, 0.0)
    next_values_BR = torch.nn.functional.pad(values_BR[:, 1:], (0, 1))
    deltas_BR = rewards_BR + gamma * next_values_BR - values_BR
    advantages_BR = torch.zeros_like(deltas_BR)
    running_B = deltas_BR.new_zeros(len(deltas_BR))
    for t in reversed(range(deltas_BR.shape[1])):
        running_B = deltas_BR[:, t] + gamma * gae_lambda * running_B
        advantages_BR[:, t] = running_B
    return advantages_BR, advantages_BR + values_BR


def value_baseline(rewards_BR: Tensor, values_BR: Tensor, response_mask_BR: Tensor) -> tuple[Tensor, Tensor]:
    """One advantage per response: its whole reward less the value of its prompt.

        R(x, y) = Σ_t r_t;    A = R(x, y) - V(x)

    Args:
        rewards_BR: [B, R] float32.
        values_BR: [B, R] float32; V before the first token is V(x).
        response_mask_BR: [B, R] bool, right-padded.
    Returns: (advantages_BR, returns_BR), zero where masked: A and R(x, y) on every real token, so that V
        learns the expected reward from each prefix on, the prompt's among them.
    Raises: ValueError if shapes differ.
    Source: REINFORCE with a state-value baseline (Williams 1992), the response as one action.
    """
    _check(rewards_BR, values_BR, response_mask_BR)
    total_B = torch.where(response_mask_BR, rewards_BR, 0.0).sum(dim=1)
    advantages_BR = torch.where(response_mask_BR, (total_B - values_BR[:, 0])[:, None], 0.0)
    returns_BR = torch.where(response_mask_BR, total_B[:, None], 0.0)
    return advantages_BR, returns_BR


def reward_only(rewards_BR: Tensor, response_mask_BR: Tensor) -> Tensor:
    """One advantage per response, without a baseline: its whole reward.

        A = R(x, y) = Σ_t r_t

    Args:
        rewards_BR: [B, R] float32.
        response_mask_BR: [B, R] bool.
    Returns: [B, R] float32, zero where masked; whitening over the batch is the caller's.
    Raises: ValueError if shapes differ.
    Source: Williams 1992.
    """
    _check(rewards_BR, rewards_BR, response_mask_BR)
    total_B = torch.where(response_mask_BR, rewards_BR, 0.0).sum(dim=1)
    return torch.where(response_mask_BR, total_B[:, None], 0.0)


def returns_to_go(rewards_BR: Tensor, response_mask_BR: Tensor, *, gamma: float) -> Tensor:
    """What is still to come from each token on; no critic, no baseline.

        A_t = Σ_{s ≥ t} gamma^(s - t) r_s

    Args:
        rewards_BR: [B, R] float32.
        response_mask_BR: [B, R] bool, right-padded.
        gamma: discount per token, in (0, 1].
    Returns: [B, R] float32, zero where masked; whitening over the batch's tokens is the caller's.
    Raises: ValueError if shapes differ or gamma is out of range.
    Source: Hu 2025, REINFORCE++ (arXiv 2501.03262), section 3.2, with the KL inside r. Differs: gamma.
    """
    advantages_BR, _ = gae(rewards_BR, torch.zeros_like(rewards_BR), response_mask_BR, gamma=gamma, gae_lambda=1.0)
    return advantages_BR


def leave_one_out(rewards_BR: Tensor, response_mask_BR: Tensor, group_B: Tensor) -> Tensor:
    """One advantage per response: its reward less the mean of the other responses to the same prompt.

        R_i = Σ_t r_t;    A_i = R_i - 1/(k-1) Σ_{j ≠ i} R_j

    Args:
        rewards_BR: [B, R] float32.
        response_mask_BR: [B, R] bool.
        group_B: [B] int64, the prompt of each response.
    Returns: [B, R] float32, zero where masked. The baseline does not depend on the response: no bias.
    Raises: ValueError if shapes differ, or a prompt has a single response.
    Source: Kool et al. 2019; Ahmadian et al. 2024, RLOO (arXiv 2402.14740), eq. 5.
    """
    total_B, dense_B, size_B = _groups(rewards_BR, response_mask_BR, group_B)
    sum_B = _group_sum(total_B, dense_B)
    advantage_B = (total_B - (sum_B - total_B) / (size_B - 1)).float()
    return torch.where(response_mask_BR, advantage_B[:, None], 0.0)


def group_relative(rewards_BR: Tensor, response_mask_BR: Tensor, group_B: Tensor, *, divide_by_std: bool) -> Tensor:
    """One advantage per response: where its reward stands among the responses to the same prompt.

        R_i = Σ_t r_t;    A_i = (R_i - mean_k) / std_k,    or R_i - mean_k alone

    Args:
        rewards_BR: [B, R] float32.
        response_mask_BR: [B, R] bool.
        group_B: [B] int64, the prompt of each response.
        divide_by_std: by the sample std (k - 1) of the group; a group whose std is below MIN_STD is centred only.
    Returns: [B, R] float32, zero where masked.
    Raises: ValueError if shapes differ, or a prompt has a single response.
    Source: Shao et al. 2024, GRPO (arXiv 2402.03300), section 4.1.2; without the std: Liu et al. 2025, Dr. GRPO
        (arXiv 2503.20783). Differs: TRL 1.12 (grpo_trainer.py:2809) adds 1e-4 to the std instead, verl 0.9.1
        (core_algos.py:326) 1e-6, OpenRLHF 0.11.2 (experience_maker.py:274) 1e-9.
    """
    total_B, dense_B, size_B = _groups(rewards_BR, response_mask_BR, group_B)
    advantage_B = total_B - _group_sum(total_B, dense_B) / size_B
    if divide_by_std:
        std_B = (_group_sum(advantage_B**2, dense_B) / (size_B - 1)).sqrt()
        advantage_B = advantage_B / torch.where(std_B >= MIN_STD, std_B, 1.0)
    return torch.where(response_mask_BR, advantage_B.float()[:, None], 0.0)


def _groups(rewards_BR: Tensor, mask_BR: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(R of each response in float64, its group counted from 0, the size of its group), each [B]."""
    _check(rewards_BR, rewards_BR, mask_BR)
    if group_B.shape != rewards_BR.shape[:1]:
        raise ValueError(f"shapes differ: rewards {tuple(rewards_BR.shape)}, groups {tuple(group_B.shape)}")
    total_B = torch.where(mask_BR, rewards_BR, 0.0).double().sum(dim=1)
    dense_B = torch.unique(group_B, return_inverse=True)[1]
    size_B = _group_sum(torch.ones_like(total_B), dense_B)
    if bool((size_B < 2).any()):
        raise ValueError("a prompt with a single response has no others to be compared with")
    return total_B, dense_B, size_B


def _group_sum(values_B: Tensor, dense_B: Tensor) -> Tensor:
    """[B]: the sum over each response's group."""
    return torch.zeros_like(values_B).index_add(0, dense_B, values_B)[dense_B]


def _check(rewards_BR: Tensor, values_BR: Tensor, mask_BR: Tensor) -> None:
    if rewards_BR.shape != values_BR.shape or rewards_BR.shape != mask_BR.shape:
        raise ValueError(
            f"shapes differ: rewards {tuple(rewards_BR.shape)}, values {tuple(values_BR.shape)}, "
            f"mask {tuple(mask_BR.shape)}"
        )
    if mask_BR.dtype != torch.bool:
        raise ValueError(f"a mask is bool, True = real token; got {mask_BR.dtype}")
