"""Numbers that would work where an iteration takes more prompts than there are."""

from __future__ import annotations

import math

from rlhf_core.contracts.config import RunConfig


def batch_sizes_that_work(config: RunConfig, num_prompts: int) -> str:
    """The remedy for a source with fewer prompts than an iteration takes.

    A batch is a multiple of prompts.samples_per_prompt and of ppo.num_minibatches, and takes each prompt once.

    Args:
        config: a run's.
        num_prompts: of its source.
    Returns: a clause with values of prompts.batch_size, the largest first; or other knobs, where none works.

    Example: 60 prompts and 4 minibatches: "lower prompts.batch_size to 60, 56, 52 or 32, ...".
    """
    samples, minibatches = config.prompts.samples_per_prompt, config.ppo.num_minibatches
    step, largest = math.lcm(samples, minibatches), num_prompts * samples
    multiples = range(largest - largest % step, 0, -step)
    of = f"of ppo.num_minibatches {minibatches}" + (f" and prompts.samples_per_prompt {samples}" if samples > 1 else "")
    if not multiples:
        fitting = max(n for n in range(1, minibatches + 1) if math.lcm(samples, n) <= largest)
        return (
            f"no prompts.batch_size up to {largest} is a multiple {of}: set ppo.num_minibatches {fitting} and "
            f"prompts.batch_size {largest - largest % math.lcm(samples, fitting)}, or bring more prompts"
        )
    sizes = list(multiples[:3]) + [size for size in multiples[3:] if size & (size - 1) == 0][:1]
    listed = " or ".join(filter(None, (", ".join(map(str, sizes[:-1])), str(sizes[-1]))))
    return (
        f"lower prompts.batch_size to {listed} (at most {largest}, a multiple {of}), raise prompts.samples_per_prompt, "
        "or bring more prompts"
    )
