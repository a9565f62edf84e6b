"""Prompts as the policy will read them, token by token: what ``rlhf check --show-prompts`` shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_core.contracts.batches import Prompts
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.loop_state import Cursor
from rlhf_core.preflight.plan import Plan
from rlhf_core.prompts.pieces import Piece, token_pieces
from rlhf_core.stages.sample_prompts import sample_prompts


@dataclass(frozen=True)
class Reading:
    """One text as a model reads it."""

    title: str
    about: str
    pieces: Sequence[Piece]


def first_prompts(config: RunConfig, plan: Plan, count: int) -> Prompts:
    """The prompts that a run draws first: at most ``count``, and no more than one epoch has."""
    count = min(count, len(plan.prompt_set.entries))
    some = config.prompts.model_copy(update={"batch_size": count, "samples_per_prompt": 1})
    return sample_prompts(
        plan.prompt_set,
        plan.tokenizer,
        some,
        cursor=Cursor(),
        seed=config.seed,
        max_prompt_len=plan.max_prompt_len,
    ).batch


def prompt_readings(plan: Plan, prompts: Prompts) -> list[Reading]:
    """What the policy reads of each prompt.

    Args:
        plan: of the run.
        prompts: as :func:`first_prompts` draws them.
    """
    readings: list[Reading] = []
    for index, row in enumerate(prompts.prompt_ids):
        tokens = prompts.tokens_QP[index][prompts.mask_QP[index]].tolist()
        cut = prompts.num_truncated[index]
        about = f"row {row} (from 0) of the source, {len(tokens)} tokens" + (f", {cut} cut off" if cut else "")
        title = f"prompt {index + 1} of {len(prompts.prompt_ids)}"
        readings.append(Reading(title, about, token_pieces(plan.tokenizer.tokenizer, tokens)))
    return readings
