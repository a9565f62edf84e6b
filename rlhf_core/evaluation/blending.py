"""Which share of the way from the reference to a policy has a given KL: its KL measured, and the share found.

The same prompts and the same dice at every share, so that what changes from one measurement to the next is the policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from rlhf_core.contracts.batches import Prompts
from rlhf_core.contracts.config import RunConfig
from rlhf_core.evaluation.samples import draw_responses
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.tokenizers import PolicyTokenizer
from rlhf_core.ops.comparison import Interval, interval

NUM_PROMPTS: Final = 64
NUM_SAMPLES: Final = 16
"""Responses to each prompt that a KL is measured on."""
TOLERANCE: Final = 0.01
"""A KL is found when it is this close to the one that was asked for, relatively: less than its sampling error."""
MAX_STEPS: Final = 20
LOWEST_SHARE: Final = 1e-3
"""Where the search begins: at a millionth of the policy's KL."""


def kl_to_reference(
    policy: LanguageModel, reference: LanguageModel, tokenizer: PolicyTokenizer, prompts: Prompts, config: RunConfig
) -> Interval:
    """The KL of a policy on NUM_SAMPLES responses to each prompt.

    Args:
        policy: that answers.
        reference: π_ref, frozen.
        tokenizer: the policy's.
        prompts: at least two.
        config: generation, reference, seed.
    Returns: k1 summed over a response, mean over responses, with its interval over prompts; nats.
    Raises: NumericalError if a log-prob is not finite.
    Source: definition.
    """
    _, kl_B, _ = draw_responses(policy, reference, tokenizer, prompts, config, part=0, num_samples=NUM_SAMPLES)
    return interval(kl_B.double().view(len(prompts.prompt_ids), NUM_SAMPLES).mean(dim=1))


def share_at_kl(target: float, kl_of: Callable[[float], Interval], own: Interval) -> tuple[float, Interval]:
    """The share of the way at which the KL is the target, which grows with the share.

    Bisection on log a. A step goes to where a power law through both ends of what is left has the target (the KL
    grows about as a², so few are needed), and to the middle after two on the same side.

    Args:
        target: nats; positive, and at most the policy's own KL.
        kl_of: the KL at a share.
        own: the KL at share 1.
    Returns: the share and its KL: the closest one that was measured.
    Raises: ValueError for a target outside.
    Source: definition.
    """
    if not 0 < target <= own.mean:
        raise ValueError(f"target must be in (0, {own.mean}], got {target}")
    best = (1.0, own)
    low, high = (math.log(LOWEST_SHARE), math.log(own.mean * LOWEST_SHARE**2)), (0.0, math.log(own.mean))
    sides: list[bool] = []
    for _ in range(MAX_STEPS):
        if abs(best[1].mean - target) <= TOLERANCE * target:
            break
        one_sided = len(sides) > 1 and sides[-1] == sides[-2]
        fraction = 0.5 if one_sided else (math.log(target) - low[1]) / (high[1] - low[1])
        log_share = low[0] + fraction * (high[0] - low[0])
        share = math.exp(log_share)
        found = kl_of(share)
        if abs(found.mean - target) < abs(best[1].mean - target):
            best = (share, found)
        sides.append(found.mean < target)
        if sides[-1]:
            low = (log_share, max(math.log(found.mean) if found.mean > 0 else low[1], low[1]))
        else:
            high = (log_share, min(math.log(found.mean), high[1]))
    return best
