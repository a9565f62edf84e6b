"""Learning rate of an iteration: a closed form, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math


def learning_rate_at(
    iteration: int, *, peak: float, schedule: str, num_iterations: int, warmup_iterations: int
) -> float:
    """Learning rate of every optimiser step of an iteration.

    Args:
        iteration: from 0.
        peak: highest learning rate.
        schedule: constant, linear (to 0 after the last iteration) or cosine (likewise).
        num_iterations: of the run.
        warmup_iterations: linear rise over the first ones.
    Returns: a positive number.
    Raises: ValueError if the schedule is unknown.
    Source: N+ details of RLHF (arXiv 2403.17031): lr annealed linearly over updates.

    >>> [learning_rate_at(i, peak=1.0, schedule="linear", num_iterations=4, warmup_iterations=0) for i in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    if schedule not in ("constant", "linear", "cosine"):
        raise ValueError(f"unknown schedule {schedule!r}; known: constant, linear, cosine")
    if iteration < warmup_iterations:
        return peak * (iteration + 1) / (warmup_iterations + 1)
    progress = (iteration - warmup_iterations) / max(num_iterations - warmup_iterations, 1)
    if schedule == "linear":
        return peak * (1.0 - progress)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak
