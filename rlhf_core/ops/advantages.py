"""Advantage estimators. B responses, R response tokens; results are not whitened."""

from __future__ import annotations

import torch
from torch import Tensor


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


def _check(rewards_BR: Tensor, values_BR: Tensor, mask_BR: Tensor) -> None:
    if rewards_BR.shape != values_BR.shape or rewards_BR.shape != mask_BR.shape:
        raise ValueError(
            f"shapes differ: rewards {tuple(rewards_BR.shape)}, values {tuple(values_BR.shape)}, "
            f"mask {tuple(mask_BR.shape)}"
        )
    if mask_BR.dtype != torch.bool:
        raise ValueError(f"a mask is bool, True = real token; got {mask_BR.dtype}")
