"""The terms of the PPO loss, element by element; reduction and masking are the caller's.

Shapes: [B, R] at token level, [B] at sequence level. Give every op inputs that are finite where masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_core.ops.kl import MAX_LOG_RATIO


def log_ratio(logprobs_BR: Tensor, old_logprobs_BR: Tensor, mask_BR: Tensor, *, level: str) -> Tensor:
    """Log-ratio log ρ of the updated policy to the behaviour policy.

        token:  log ρ_t = log π(y_t) - log π_old(y_t);    sequence:  log ρ = Σ_t log ρ_t

    Args:
        logprobs_BR: [B, R] float32, with gradient.
        old_logprobs_BR: [B, R] float32.
        mask_BR: [B, R] bool.
        level: token or sequence.
    Returns: [B, R] (zero where masked) or [B]; clamped to ± 20 so that exp stays finite.
    Raises: ValueError if shapes differ or the level is unknown.
    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 6. Differs: the clamp.
    """
    if logprobs_BR.shape != old_logprobs_BR.shape or logprobs_BR.shape != mask_BR.shape:
        raise ValueError(
            f"shapes differ: {tuple(logprobs_BR.shape)}, {tuple(old_logprobs_BR.shape)}, {tuple(mask_BR.shape)}"
        )
    per_token = torch.where(mask_BR, logprobs_BR - old_logprobs_BR, 0.0)
    if level == "token":
        return per_token.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if level == "sequence":
        return per_token.sum(dim=1).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    raise ValueError(f"unknown ratio level {level!r}; known: token, sequence")


def clipped_surrogate(
    log_ratios: Tensor, advantages: Tensor, *, clip_range: float, clip_range_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate, as a loss.

        -min(ρ A, clip(ρ, 1 - clip_range, 1 + clip_range_high) A)

    Args:
        log_ratios: any shape, float32, with gradient.
        advantages: same shape.
        clip_range: ε below 1, in (0, 1).
        clip_range_high: ε above 1, positive; larger than clip_range is "clip-higher".
    Returns: (loss, is_clipped), same shape: is_clipped is True where the clipped term is the smaller one,
        so that the gradient is zero.
    Raises: ValueError if shapes differ or a range is out of bounds.
    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7; asymmetric form: DAPO (arXiv 2503.14476), eq. 10.
    """
    if log_ratios.shape != advantages.shape:
        raise ValueError(f"shapes differ: {tuple(log_ratios.shape)}, {tuple(advantages.shape)}")
    if not 0 < clip_range < 1 or clip_range_high <= 0:
        raise ValueError(f"clip_range must be in (0, 1) and clip_range_high > 0; got {clip_range}, {clip_range_high}")
    ratios = log_ratios.exp()
    unclipped = -ratios * advantages
    clipped = -ratios.clamp(1.0 - clip_range, 1.0 + clip_range_high) * advantages
    return torch.maximum(unclipped, clipped), clipped > unclipped


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, value_clip_range: float | None
) -> tuple[Tensor, Tensor]:
    """Squared error of the values, pessimistic about moves larger than the clip range.

        ½ max((V - G)², (clip(V, V_old ± ε) - G)²)

    Args:
        values: any shape, float32, with gradient.
        old_values: same shape, from the behaviour iteration.
        returns: same shape, the targets G.
        value_clip_range: ε; None for the plain squared error.
    Returns: (loss, is_clipped), same shape.
    Raises: ValueError if shapes differ or the range is not positive.
    Source: Ziegler et al. 2019, code; Schulman's baselines ``ppo2``.
    """
    if values.shape != old_values.shape or values.shape != returns.shape:
        raise ValueError(f"shapes differ: {tuple(values.shape)}, {tuple(old_values.shape)}, {tuple(returns.shape)}")
    plain = (values - returns) ** 2
    if value_clip_range is None:
        return 0.5 * plain, torch.zeros_like(values, dtype=torch.bool)
    if value_clip_range <= 0:
        raise ValueError(f"value_clip_range must be positive, got {value_clip_range}")
    near = values.clamp(old_values - value_clip_range, old_values + value_clip_range)
    clipped = (near - returns) ** 2
    return 0.5 * torch.maximum(plain, clipped), clipped > plain


def approx_kl(log_ratios: Tensor) -> Tensor:
    """KL(π_old ‖ π) estimated from samples of π_old: ρ - 1 - log ρ, never negative.

    Args:
        log_ratios: any shape, float32.
    Returns: same shape, nats.
    Raises: nothing.
    Source: Schulman 2020, "Approximating KL divergence" (k3). TRL logs ½ (log ρ)², equal to second order.
    """
    return torch.expm1(log_ratios) - log_ratios


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """Share of the returns' variance that the values explain: 1 - Var(G - V) / Var(G).

    Args:
        values: [N] float32, real tokens only.
        returns: [N] float32.
    Returns: a scalar; 0 where the returns do not vary. 1 is perfect, below 0 worse than a constant.
    Raises: ValueError if shapes differ.
    Source: OpenAI baselines ``explained_variance``.
    """
    if values.shape != returns.shape:
        raise ValueError(f"shapes differ: {tuple(values.shape)}, {tuple(returns.shape)}")
    exact_returns, exact_values = returns.double(), values.double()
    variance = exact_returns.var(correction=0)
    share = 1.0 - (exact_returns - exact_values).var(correction=0) / variance
    return torch.where(variance > 0, share, 0.0).to(values.dtype)
