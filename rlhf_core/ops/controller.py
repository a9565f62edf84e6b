"""The step from one iteration's loop state to the next one's."""

from __future__ import annotations

from rlhf_core.contracts.config import KLConfig
from rlhf_core.contracts.loop_state import Cursor, LoopState, ScoreMoments
from rlhf_core.ops.kl import MIN_KL_COEF_SHARE, adaptive_kl_coef, kl_error, log_pi_kl_coef


def next_state(
    state: LoopState, config: KLConfig, *, kl: float, num_samples: int, cursor: Cursor, moments: ScoreMoments
) -> LoopState:
    """The loop state after an iteration: β moved by its controller, everything else carried on.

    A controller never takes β below MIN_KL_COEF_SHARE of ``config.coef``, the first one.

    Args:
        state: before the iteration.
        config: which controller, its first β, its target, and its horizon or gains.
        kl: mean KL of the iteration's responses, nats.
        num_samples: responses of the iteration.
        cursor: where the prompts stand now.
        moments: of all scores so far.
    Returns: the state before the next iteration.
    Raises: ValueError for a KL that is not finite.
    Source: SEMANTICS of this project; the controllers are :func:`adaptive_kl_coef` and :func:`log_pi_kl_coef`.
    """
    kl_coef = state.kl_coef
    if config.controller == "adaptive":
        kl_coef = adaptive_kl_coef(kl_coef, kl, target=config.target, horizon=config.horizon, num_samples=num_samples)
    error = None
    if config.controller == "log_pi":
        error = kl_error(kl, target=config.target)
        kl_coef = log_pi_kl_coef(
            kl_coef,
            error,
            error if state.kl_error is None else state.kl_error,
            proportional_gain=config.proportional_gain,
            integral_gain=config.integral_gain,
        )
    if config.controller != "fixed":
        kl_coef = max(kl_coef, MIN_KL_COEF_SHARE * config.coef)
    return LoopState(
        iteration=state.iteration + 1,
        kl_coef=kl_coef,
        kl_error=error,
        episodes=state.episodes + num_samples,
        cursor=cursor,
        moments=moments,
    )
