"""The terms of the PPO loss, element by element; reduction and masking are the caller's.

Shapes: [B, R] at token level, [B] at sequence level. Give every op inputs that are finite where masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_core.ops.kl import MAX_LOG_RATIO
from rlhf_core.ops.masking import masked_sum


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
    log_ratios: Tensor,
    advantages: Tensor,
    *,
    clip_range: float,
    clip_range_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate, as a loss.

        L = -min(ρ A, clip(ρ, 1 - clip_range, 1 + clip_range_high) A);    dual clip, A < 0:  min(L, -c A)

    Args:
        log_ratios: any shape, float32, with gradient.
        advantages: same shape.
        clip_range: ε below 1, in (0, 1).
        clip_range_high: ε above 1, positive; larger than clip_range is "clip-higher".
        dual_clip: c above 1: bounds the loss of a bad response that became much likelier; None: unbounded.
    Returns: (loss, is_clipped), same shape: is_clipped is True where a clipped term decides, so that the gradient
        is zero.
    Raises: ValueError if shapes differ or a range is out of bounds.
    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7; asymmetric form: DAPO (arXiv 2503.14476), eq. 10;
        dual clip: Ye et al. 2020 (arXiv 1912.09729), eq. 5.
    """
    if log_ratios.shape != advantages.shape:
        raise ValueError(f"shapes differ: {tuple(log_ratios.shape)}, {tuple(advantages.shape)}")
    if not 0 < clip_range < 1 or clip_range_high <= 0:
        raise ValueError(f"clip_range must be in (0, 1) and clip_range_high > 0; got {clip_range}, {clip_range_high}")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
    ratios = log_ratios.exp()
    unclipped = -ratios * advantages
    clipped = -ratios.clamp(1.0 - clip_range, 1.0 + clip_range_high) * advantages
    loss, is_clipped = torch.maximum(unclipped, clipped), clipped > unclipped
    if dual_clip is None:
        return loss, is_clipped
    bound = -dual_clip * advantages
    is_bounded = (advantages < 0) & (bound < loss)
    return torch.where(is_bounded, bound, loss), is_clipped | is_bounded


def importance_weights(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, *, level: str, cap: float) -> Tensor:
    """Truncated importance weights: how much likelier the policy of an update finds what another policy has drawn.

        w = min(exp(logπ - logπ_sampler), cap)

    A surrogate whose ratio is taken to π, times w, is the one of samples from π, but for what is cut off.

    Args:
        logprobs: [B, R] float32, of the policy that an update begins with.
        sampler_logprobs: [B, R] float32, of the policy that has drawn the tokens.
        mask: [B, R] bool, True = generated token.
        level: token gives one weight a token, sequence one a response.
        cap: of a weight, at least 1: bounds the variance at the price of a bias.
    Returns: [B, R] or [B] float32, 1 where masked; without gradient.
    Raises: ValueError if shapes differ or the cap is below 1.
    Source: Hilton et al. 2021 (arXiv 2110.00641), eq. 3, for the decoupled objective; truncation: Espeholt et al. 2018
        (arXiv 1802.01561).
    """
    if cap < 1:
        raise ValueError(f"cap must be at least 1, got {cap}")
    log_weights = log_ratio(logprobs.detach(), sampler_logprobs, mask, level=level)
    return log_weights.exp().clamp(max=cap)


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


def aggregate(
    values_BR: Tensor,
    mask_BR: Tensor,
    *,
    aggregation: str,
    num_tokens: int,
    num_samples: int,
    max_response_len: int,
) -> Tensor:
    """This micro-batch's share of a mean over an optimiser step.

        token_mean:     Σ_b Σ_t x_bt / num_tokens                    every token weighs the same
        sequence_mean:  Σ_b (Σ_t x_bt / len_b) / num_samples         every response weighs the same
        fixed_length:   Σ_b Σ_t x_bt / (num_samples max_response_len)   no division by a sampled length

    Args:
        values_BR: [B, R] float32, finite where real.
        mask_BR: [B, R] bool.
        aggregation: token_mean, sequence_mean or fixed_length.
        num_tokens: real tokens of the whole optimiser step.
        num_samples: responses of the whole optimiser step.
        max_response_len: the length limit of generation, in tokens.
    Returns: a scalar; the shares of all micro-batches of a step add up to its mean.
    Raises: ValueError if shapes differ or the aggregation is unknown.
    Source: token_mean: DAPO (arXiv 2503.14476), eq. 12; sequence_mean: GRPO (arXiv 2402.03300), eq. 3;
        fixed_length: Dr. GRPO (arXiv 2503.20783), section 3.2.
    """
    if aggregation == "token_mean":
        return masked_sum(values_BR, mask_BR) / num_tokens
    if aggregation == "sequence_mean":
        lens_B1 = mask_BR.sum(dim=1, keepdim=True).clamp(min=1)
        return masked_sum(values_BR / lens_B1, mask_BR) / num_samples
    if aggregation == "fixed_length":
        return masked_sum(values_BR, mask_BR) / (num_samples * max_response_len)
    raise ValueError(f"unknown loss aggregation {aggregation!r}; known: token_mean, sequence_mean, fixed_length")


def approx_kl(log_ratios: Tensor) -> Tensor:
    """KL(π_old ‖ π) estimated from samples of π_old: ρ - 1 - log ρ, never negative.

    Args:
        log_ratios: any shape, float32, of single tokens: the mean is then nats a token. (Of whole responses, whose
            log-ratios are sums, ρ - 1 - log ρ grows exponentially with the length, and is no use.)
    Returns: same shape, nats.
    Raises: nothing.
    Source: Schulman 2020, "Approximating KL divergence" (k3). TRL 1.12 (ppo_trainer.py:857) logs ½ (log ρ)²,
        equal to second order, as a mean over padding as well.
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
