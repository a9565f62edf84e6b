"""Checks of the prompts as the policy will read them."""

from __future__ import annotations

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.templates import check_template
from rlhf_core.models.tokenizers import PolicyTokenizer
from rlhf_core.preflight.batch_sizes import batch_sizes_that_work
from rlhf_core.prompts.rendering import render_prompt
from rlhf_core.prompts.sources import PromptSet


def check_prompts(
    config: RunConfig,
    prompt_set: PromptSet,
    tokenizer: PolicyTokenizer,
    longest: int,
    notes: list[str],  # noqa: ARG001
) -> None:
    """Enough prompts for an iteration; and, where over-long ones are refused, none of them."""
    entries, wanted = prompt_set.entries, config.prompts.num_prompts
    if len(entries) < wanted:
        raise UserError(
            f"prompts.source {config.prompts.source!r} has {len(entries)} prompts, but an iteration takes {wanted} "
            f"different ones; {batch_sizes_that_work(config, len(entries))}"
        )
    if not isinstance(entries[0], str):
        check_template(tokenizer.tokenizer.chat_template, entries[0], f"policy.model {config.policy.model!r}")
    render_prompt(entries[0], tokenizer.tokenizer, date=config.prompts.template_date)
    if config.prompts.over_long != "refuse":
        return
    too_long = 0
    first = ""
    for row, entry in enumerate(entries):
        text = render_prompt(entry, tokenizer.tokenizer, date=config.prompts.template_date)
        if len(text.encode()) + 8 <= longest:  # a token is at least a byte; 8 for special tokens
            continue
        length = len(tokenizer.encode(text, is_chat=not isinstance(entry, str)))
        if length > longest:
            too_long += 1
            first = first or f"prompt {row} (from 0) has {length} tokens"
    if too_long:
        raise UserError(
            f"prompts.source {config.prompts.source!r} has {too_long} prompts longer than the {longest} tokens that "
            f"fit ({first}); set prompts.over_long to truncate_left or drop"
        )
