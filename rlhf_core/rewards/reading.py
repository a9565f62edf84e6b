"""What a reward component reads of one response, found with tokenizers alone: for a person to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from rlhf_core.contracts.batches import Message
from rlhf_core.contracts.reward_config import ComponentReward, ModelReward
from rlhf_core.models.reward_text import Conversation, RewardReader, text_with_special_tokens
from rlhf_core.models.texts import prompt_ends, response_text, token_texts
from rlhf_core.models.tokenizers import PolicyTokenizer, vocabulary_digest


@dataclass(frozen=True)
class ComponentInput:
    """What a component reads of a response.

    Example: ``ComponentInput("<user>well?<assistant>good", [5, 9, 6, 7], ["<user>", "well?", …])``
    """

    text: str
    """Of a reward model: prompt and response; of a function or a service: the response."""
    token_ids: Sequence[int]
    """Empty for functions and services."""
    tokens: Sequence[str]
    """Text of each of them, special tokens by their names."""


def component_input(
    config: ComponentReward,
    *,
    field: str,
    tokenizer: PolicyTokenizer,
    prompt_text: str,
    messages: Sequence[Message],
    prompt_ids: Sequence[int],
    response: str,
    template_date: str | None = None,
) -> ComponentInput:
    """What a component would read if the policy answered a prompt with some text and EOS.

    Args:
        config: of the component.
        field: its place in the config, for messages.
        tokenizer: the policy's.
        prompt_text: as the policy reads it.
        messages: of the prompt; empty for plain text.
        prompt_ids: its tokens.
        response: a sample answer.
        template_date: of the run, for templates that show a date.
    Returns: the text, cut by nothing, and the tokens, cut to ``max_len`` of the config.
    Raises: UserError naming ``field``; and whatever a reward model's template raises.
    """
    own = tokenizer.tokenizer
    written = cast("list[int]", own(response, add_special_tokens=False)["input_ids"])
    ended = [] if own.eos_token_id is None else [cast("int", own.eos_token_id)]
    (end,) = prompt_ends(own, [prompt_ids])
    conversation = Conversation(
        prompt_text=prompt_text,
        response_text=response_text(own, end, written),
        messages=messages,
        policy_tokens=[*prompt_ids, *written, *ended],
        num_prompt_tokens=len(prompt_ids),
        finish_reason="eos" if ended else "length",
    )
    if not isinstance(config, ModelReward):
        keeps = config.keep_special_tokens
        text = text_with_special_tokens(own, conversation) if keeps else conversation.response_text
        return ComponentInput(text, [], [])
    reader = RewardReader.load(
        config, field=field, policy_vocabulary=vocabulary_digest(own), template_date=template_date
    )
    token_ids = reader.token_ids(conversation)
    return ComponentInput(reader.text(conversation), token_ids, token_texts(reader.tokenizer, token_ids))
