"""From a prompt to the text the policy reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from rlhf_core.contracts.errors import UserError
from rlhf_core.prompts.entries import PromptEntry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_prompt(entry: PromptEntry, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a prompt: a text as it is, a chat by the tokenizer's chat template.

    Args:
        entry: text, or messages of {role, content}.
        tokenizer: the policy's; it is asked only for chats.
    Returns: the text, opened for the assistant's answer. A template writes its special tokens itself (BOS,
        role marks), so tokenize a rendered chat with ``add_special_tokens=False``.
    Raises:
        UserError: a chat, and the tokenizer has no chat template or its template refuses the chat.
    """
    if isinstance(entry, str):
        return entry
    named = f"the tokenizer of policy.model ({tokenizer.name_or_path!r})"
    if not tokenizer.chat_template:
        raise UserError(
            f"prompts.column holds chats, but {named} has no chat template; take a policy.model that has "
            "one, or a prompts.column of plain texts"
        )
    try:
        text = tokenizer.apply_chat_template(entry, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # jinja2's, and whatever a template's own expressions raise
        roles = ", ".join(message["role"] for message in entry)
        raise UserError(
            f"prompts.column holds a chat of the roles {roles}, which the chat template of {named} refuses: {error}"
        ) from error
    return cast("str", text)
