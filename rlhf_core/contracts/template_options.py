"""Options of chat templates: further variables, such as ``{"enable_thinking": False}``."""

from __future__ import annotations

import json
from typing import Any, Final

TAKEN: Final = frozenset(
    {
        "messages",
        "conversation",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "clock_of_run",
        "strftime_now",
        "raise_exception",
    }
)
"""Names that transformers or this project gives a meaning of its own."""


def plain_template_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options unchanged if a template can be given them.

    Args:
        options: variable -> value.
    Raises: ValueError: a value that is not plain JSON, or a name that is no variable or is taken.
    """
    try:
        json.dumps(options, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("a value is not plain JSON, or a number in it is not finite") from None
    for name in options:
        if not name.isidentifier():
            raise ValueError(f"{name!r} is no name of a variable, such as enable_thinking")
        if name in TAKEN:
            raise ValueError(f"{name!r} is set by the pipeline itself; leave it out")
    return options
