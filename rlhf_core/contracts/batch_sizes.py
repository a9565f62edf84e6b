"""Whether a batch is a whole number of minibatches and of groups, and which numbers would do."""

from __future__ import annotations

import math
from collections.abc import Sequence


def batch_problems(batch_size: int, samples_per_prompt: int, num_minibatches: int) -> list[str]:
    """One sentence if a batch is no whole number of its parts, with the nearest numbers that work.

    Args:
        batch_size: responses of an iteration.
        samples_per_prompt: responses of a group.
        num_minibatches: optimiser steps of a pass.
    """
    parts = {"prompts.samples_per_prompt": samples_per_prompt, "ppo.num_minibatches": num_minibatches}
    wrong = {name: count for name, count in parts.items() if batch_size % count}
    if not wrong:
        return []
    step = math.lcm(samples_per_prompt, num_minibatches)
    below = batch_size // step * step
    sizes = [size for size in (below, below + step) if size]
    others = [f"{name} {_or(_nearest_divisors(batch_size, count))}" for name, count in wrong.items()]
    return [
        f"prompts.batch_size {batch_size} is not a multiple of "
        + " nor of ".join(f"{name} {count}" for name, count in wrong.items())
        + f"; use prompts.batch_size {_or(sizes)}, or {' and '.join(others)}"
    ]


def _nearest_divisors(number: int, wanted: int) -> list[int]:
    """The largest divisor below what is wanted and the smallest one above."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    below, above = [n for n in divisors if n < wanted], [n for n in divisors if n > wanted]
    return [*below[-1:], *above[:1]]


def _or(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))
