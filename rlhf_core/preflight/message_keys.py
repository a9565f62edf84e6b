"""Keys of messages beside role and content, which the policy's chat template may read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.tokenizers import PolicyTokenizer
from rlhf_core.prompts.messages import as_message
from rlhf_core.prompts.rendering import render_chat
from rlhf_core.prompts.sources import PromptSet

_ANY_DATE: Final = "2026-01-01"


def check_message_keys(config: RunConfig, prompt_set: PromptSet, tokenizer: PolicyTokenizer) -> None:
    """Refuse chats whose further keys would change the rendered prompt, because only role and content reach it.

    Args:
        config: names the source and the policy.
        prompt_set: its prompts, with one chat for each unused key.
        tokenizer: the policy's.
    Raises: UserError naming the keys.
    """
    if not tokenizer.tokenizer.chat_template:
        return
    read = [key for key, chat in prompt_set.unused_keys.items() if _changes(tokenizer, chat, key)]
    if read:
        raise UserError(
            f"prompts.source {config.prompts.source!r} has messages with the key {', '.join(map(repr, read))}, which "
            f"the chat template of policy.model {config.policy.model!r} writes into the prompt; only role and content "
            "are passed to it, so write this into the content, or remove the key"
        )


def _changes(tokenizer: PolicyTokenizer, chat: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Whether the template renders a chat with and without a key to different texts."""
    plain = [as_message("", message) for message in chat]
    whole = [ours | ({key: message[key]} if key in message else {}) for ours, message in zip(plain, chat, strict=True)]

    def render(messages: Sequence[Mapping[str, Any]]) -> str | None:
        try:
            return render_chat(tokenizer.tokenizer, cast("Any", messages), add_generation_prompt=False, date=_ANY_DATE)
        except Exception:  # jinja2's, and whatever a template's own expressions raise
            return None

    without = render(plain)
    return without is not None and render(whole) != without
