"""Chat templates of somebody else: tried before a run on its first conversation, in a process apart."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_core.contracts.errors import UserError
from rlhf_core.models.untrusted import MAX_TEXT_BYTES
from rlhf_core.prompts.render_process import WITHIN, TemplateLimitError, renderer


def check_template(template: object, messages: Sequence[Mapping[str, Any]], named: str) -> None:
    """Refuse a chat template that takes too long or too much memory for a conversation.

    Args:
        template: Jinja, or what a tokenizer has in its place: none, or several by name.
        messages: of {role, content}.
        named: field and value, for errors.
    Raises: UserError. A template that merely refuses this conversation is left to whoever renders it.
    """
    for text in template.values() if isinstance(template, Mapping) else [template]:
        if isinstance(text, str):
            _check(text, json.dumps(list(messages)), named)


@functools.lru_cache(maxsize=64)
def _check(template: str, messages: str, named: str) -> None:
    if len(template) > MAX_TEXT_BYTES:
        raise UserError(f"{named} has a chat template of {len(template)} characters; at most {MAX_TEXT_BYTES} are read")
    conversation = json.loads(messages)
    try:
        renderer.render(template, [conversation], add_generation_prompt=True)
    except TemplateLimitError:
        raise UserError(
            f"{named} has a chat template that does not render a conversation of {len(conversation)} messages "
            f"{WITHIN}; take the template of a model you trust"
        ) from None
