"""Settings that are valid one by one, and do something else than whoever sets them expects."""

from __future__ import annotations

from rlhf_core.contracts.config import KLConfig, RunConfig
from rlhf_core.contracts.errors import UserError

MAX_INTEGRAL_GAIN = 1.0
"""log_pi: log β then moves by 0.2 an iteration at most, as with the adaptive controller at horizon = batch_size."""


def check_mathematics(config: RunConfig, *, begun: bool, notes: list[str]) -> None:
    """Refuse a controller that lets β vanish before the KL has begun to rise; note what may surprise.

    Args:
        config: of the run.
        begun: the run exists: what a new one is refused is a note then.
        notes: of the plan.
    Raises: UserError if the controller of a new run moves β by more than a fifth an iteration.
    """
    if fast := _too_fast(config.kl, config.prompts.batch_size):
        if not begun:
            raise UserError(fast)
        notes.append(fast)
    if config.kl.estimator != "k1" and config.kl.coef > 0:
        notes.append(
            f"kl.estimator is {config.kl.estimator}: as a penalty in the reward it has not the gradient of the KL, and "
            "holds the policy with next to no force near the reference; k1 has it"
        )
    if config.shaping.whiten_rewards:
        notes.append(
            "shaping.whiten_rewards adds mean x (1 - 1 / std) of the batch's rewards to each "
            + ("of them, so that a response's sum depends on its length" if config.shaping.level == "token" else "one")
        )


def _too_fast(kl: KLConfig, batch_size: int) -> str | None:
    if kl.controller == "adaptive" and kl.horizon < batch_size:
        share = 0.2 * batch_size / kl.horizon
        return (
            f"kl.horizon {kl.horizon:g} is below prompts.batch_size {batch_size}: β moves by up to {share:.0%} an "
            f"iteration, and vanishes while the KL is still near 0; use kl.horizon {batch_size} or more (20 %)"
        )
    if kl.controller == "log_pi" and kl.integral_gain > MAX_INTEGRAL_GAIN:
        return (
            f"kl.integral_gain {kl.integral_gain:g} is above {MAX_INTEGRAL_GAIN:g}: log β moves by up to "
            f"{0.2 * kl.integral_gain:g} an iteration, and β vanishes while the KL is still near 0; use at most "
            f"{MAX_INTEGRAL_GAIN:g}"
        )
    return None
