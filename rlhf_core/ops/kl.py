"""KL estimators, and the controllers that move its coefficient β.

B responses, R response tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""A log-ratio is clamped to ± this before exp: e^20 is still a float32."""
KL_COEF_BOUNDS = (1e-30, 1e30)
"""A controller keeps β within: far beyond anything of use, but never 0 for good, and never infinite."""
MIN_KL_COEF_SHARE = 1e-3
"""Of the first β: no controller goes below. That is no penalty any more, but 38 iterations of + 20 % lead back; from
1e-30 none do, and a KL that is still near 0 in the first iterations would switch the penalty off for good."""


def token_kl(logprobs_BR: Tensor, ref_logprobs_BR: Tensor, mask_BR: Tensor, *, estimator: str) -> Tensor:
    """Estimate KL(π ‖ π_ref) at each token, from the one token that π sampled.

        d = log π - log π_ref;    k1 = d;    k2 = d² / 2;    k3 = e^(-d) - 1 + d;    k3+ = k2 + stop_gradient(k3 - k2)

    A good value does not make a good gradient. Differentiated as a term of the loss, at one position and with y ~ π:

        E[∇k1] = 0      E[∇k2] = E[∇k3+] = ∇KL(π ‖ π_ref)      E[∇k3] = E[(1 - e^(-d)) ∇log π] = ∇KL(π_ref ‖ π)

    Used as a number in the reward, E[k ∇log π] is ∇KL(π ‖ π_ref) for k1 alone. For k3 it is
    ∇KL(π ‖ π_ref) - ∇KL(π_ref ‖ π), and for k2 E[d²/2 ∇log π]: both are of second order near the reference, where they
    hold the policy with next to no force.

    Args:
        logprobs_BR: [B, R] float32, of the sampling policy.
        ref_logprobs_BR: [B, R] float32.
        mask_BR: [B, R] bool.
        estimator: k1 (unbiased), k2 (low variance), k3 (unbiased, never negative), or k3+ (the value of k3 with the
            gradient of k2).
    Returns: [B, R] float32, nats, zero where masked.
    Raises: ValueError if shapes differ or the estimator is unknown.
    Source: Schulman 2020, "Approximating KL divergence". There the samples come from q and r = p/q, so
        log r = -d here. Differs: in k3, d is clamped to ± 20. k3+: verl 0.9.1
        (core_algos.py:2213).
    """
    if logprobs_BR.shape != ref_logprobs_BR.shape or logprobs_BR.shape != mask_BR.shape:
        raise ValueError(
            f"shapes differ: {tuple(logprobs_BR.shape)}, {tuple(ref_logprobs_BR.shape)}, {tuple(mask_BR.shape)}"
        )
    d_BR = torch.where(mask_BR, logprobs_BR - ref_logprobs_BR, 0.0)
    if estimator == "k1":
        return d_BR
    if estimator == "k2":
        return 0.5 * d_BR**2
    if estimator in ("k3", "k3+"):
        clamped = d_BR.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        k3_BR = torch.expm1(-clamped) + clamped
        if estimator == "k3":
            return k3_BR
        k2_BR = 0.5 * d_BR**2
        return (k2_BR - k2_BR.detach()) + k3_BR.detach()
    raise ValueError(f"unknown KL estimator {estimator!r}; known: k1, k2, k3, k3+")


def adaptive_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, num_samples: int) -> float:
    """Ziegler's proportional controller in log space.

        err = clip(KL / target - 1, -0.2, 0.2);    β <- β (1 + err · n / horizon)

    Args:
        kl_coef: β of this iteration.
        kl: mean KL of this iteration's responses, each summed over its tokens; nats.
        target: nats, positive.
        horizon: episodes, at least 0.2 · num_samples (else β could turn negative); a new run needs num_samples.
        num_samples: episodes in this iteration.
    Returns: β of the next iteration, always positive.
    Raises: ValueError if target or horizon is out of range, or the KL is not finite.
    Source: Ziegler et al. 2019 (arXiv 1909.08593), section 2.2.

    >>> round(adaptive_kl_coef(0.15, 12.0, target=6.0, horizon=10_000, num_samples=512), 9)
    0.151536
    """
    if target <= 0:
        raise ValueError(f"target must be positive, got {target}")
    if horizon < 0.2 * num_samples:
        raise ValueError(f"horizon must be at least 0.2 x num_samples = {0.2 * num_samples:g}, got {horizon:g}")
    if not math.isfinite(kl):
        raise ValueError(f"a KL of {kl} must not enter β")
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return _bounded(kl_coef * (1.0 + error * num_samples / horizon))


def kl_error(kl: float, *, target: float) -> float:
    """How far the KL is from its target, in log space.

        e = clip(log(max(KL, 0) / target), -1, 1)

    Args:
        kl: mean KL of an iteration's responses, nats; an estimate of 0 or below counts as far below the target.
        target: nats, positive.
    Returns: 0 on target, positive above; at most 1 in size.
    Raises: ValueError if the target is not positive or the KL is not finite.
    Source: ours.
    """
    if target <= 0:
        raise ValueError(f"target must be positive, got {target}")
    if not math.isfinite(kl):
        raise ValueError(f"a KL of {kl} must not enter β")
    return min(max(math.log(kl / target), -1.0), 1.0) if kl > 0 else -1.0


def log_pi_kl_coef(
    kl_coef: float, error: float, last_error: float, *, proportional_gain: float, integral_gain: float
) -> float:
    """A proportional-integral controller of log β, in velocity form.

        log β <- log β + K_p (e - e_last) + K_i clip(e, -0.2, 0.2)

    β rises while the KL is still climbing towards its target, in proportion to the climb, so that it arrives
    instead of overshooting; the integral term removes what is left, at Ziegler's bounded pace.

    Args:
        kl_coef: β of this iteration.
        error: :func:`kl_error` of this iteration.
        last_error: of the iteration before; the same value where there is none.
        proportional_gain: K_p, not negative.
        integral_gain: K_i, not negative; a change of log β an iteration.
    Returns: β of the next iteration, always positive.
    Raises: ValueError for a negative gain.
    Source: the velocity form of Åström and Hägglund 1995, PID Controllers, section 3.5; the bound on the integral
        term is Ziegler's (arXiv 1909.08593).
    """
    if proportional_gain < 0 or integral_gain < 0:
        raise ValueError(f"gains must not be negative, got {proportional_gain} and {integral_gain}")
    bounded = min(max(error, -0.2), 0.2)
    change = proportional_gain * (error - last_error) + integral_gain * bounded
    return _bounded(kl_coef * math.exp(min(change, math.log(KL_COEF_BOUNDS[1]))))


def _bounded(kl_coef: float) -> float:
    least, most = KL_COEF_BOUNDS
    return min(max(kl_coef, least), most)
