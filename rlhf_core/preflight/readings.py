"""Prompts as the models will read them, token by token: what ``rlhf check --show-prompts`` shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rlhf_core.contracts.batches import Prompts
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.loop_state import Cursor
from rlhf_core.contracts.reward_config import ModelReward
from rlhf_core.models.reward_text import in_a_line, load_reward_tokenizer
from rlhf_core.preflight.plan import Plan
from rlhf_core.prompts.pieces import Piece, token_pieces, visible
from rlhf_core.rewards.reading import component_input
from rlhf_core.stages.sample_prompts import sample_prompts

RESPONSE: Final = "This is a response."
"""Stands for what the policy will write."""


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


def reward_readings(config: RunConfig, plan: Plan, prompts: Prompts) -> list[Reading]:
    """What each reward component reads of the first prompt and a response that ends.

    Args:
        config: of the run.
        plan: of the run.
        prompts: as :func:`first_prompts` draws them.
    Returns: tokens of a reward model; the response alone of a function or a service.
    """
    readings: list[Reading] = []
    for index, (name, component) in enumerate(zip(config.reward.names, config.reward.components, strict=True)):
        field = f"reward.components.{index}"
        title = f"{name} ({field})"
        try:
            found = component_input(
                component,
                field=field,
                tokenizer=plan.tokenizer,
                prompt_text=prompts.texts[0],
                messages=prompts.messages[0],
                prompt_ids=prompts.tokens_QP[0][prompts.mask_QP[0]].tolist(),
                response=RESPONSE,
                template_date=config.prompts.template_date,
            )
        except Exception as error:  # jinja2's, and whatever a template's own expressions raise
            readings.append(Reading(title, f"its chat template refuses this prompt: {in_a_line(error)}", []))
            continue
        if isinstance(component, ModelReward):
            pieces = token_pieces(load_reward_tokenizer(component, field=field)[0], found.token_ids)
            readings.append(Reading(title, f"reads {len(pieces)} tokens", pieces))
        else:
            piece = Piece(-1, visible(found.text), is_special=False)
            readings.append(Reading(title, "reads the prompt apart, and as the response", [piece]))
    return readings
