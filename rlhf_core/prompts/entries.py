"""One prompt: what it may be, and what is refused."""

from __future__ import annotations

import json
from typing import cast

from rlhf_core.contracts.batches import Message
from rlhf_core.contracts.config_io import canonical_json

PromptEntry = str | list[Message]
"""Plain text, or chat messages."""

MAX_SHOWN = 60
_KINDS = "a text or a list of {role, content} messages"


def as_entry(column: str, value: object) -> PromptEntry:
    """A cell as text or chat; of each message only role and content are kept.

    Args:
        column: for the message.
        value: what the source holds, in plain Python types.
    Returns: the entry; it may still be empty.
    Raises:
        ValueError: neither a text nor a chat.
    """
    if value is None:
        raise ValueError(f"{column} is null or missing; {_KINDS} is needed")
    if not isinstance(value, str | list):
        raise ValueError(f"{column} is {shown(value)}, a {type(value).__name__}; {_KINDS} is needed")
    if isinstance(value, list):
        return [_as_message(f"{column}[{i}]", message) for i, message in enumerate(cast("list[object]", value))]
    return _unicode(column, value)


def check_prompt(column: str, entry: PromptEntry) -> None:
    """Refuse what a policy cannot answer.

    Args:
        column: for the message.
        entry: what :func:`as_entry` returned.
    Raises:
        ValueError: white space only, no message, or a chat that ends with the assistant or without text.
    """
    if not entry:
        raise ValueError(f"{column} is {entry!r}; a prompt must not be empty")
    if isinstance(entry, str):
        if entry.isspace():
            raise ValueError(f"{column} is {shown(entry)}; a prompt must not be white space only")
    elif entry[-1]["role"] == "assistant":
        raise ValueError(
            f"{column} ends with the assistant message {shown(entry[-1]['content'])}; the policy writes the "
            "answer, so leave it out"
        )
    elif not entry[-1]["content"].strip():
        raise ValueError(f"{column} ends with a message whose content is {shown(entry[-1]['content'])}; it needs text")


def as_json(column: str, value: object) -> object:
    """A cell of a further column, which must be what JSON has, so that an artifact can hold it.

    Args:
        column: for the message.
        value: what the source holds, in plain Python types.
    Returns: the value; null is None.
    Raises:
        ValueError: a date, bytes, a number that is not finite, a key that is no text, ...
    """
    try:
        is_json = json.loads(canonical_json(value)) == value
    except (TypeError, ValueError, RecursionError):
        is_json = False
    if not is_json:
        raise ValueError(
            f"{column} is {shown(value)}, which JSON does not have; prompts.columns takes texts, finite numbers, "
            "booleans, null, and lists and objects of them"
        )
    return value


def shown(value: object) -> str:
    """The value as a message shows it: its repr, cut to MAX_SHOWN characters."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"


def _as_message(place: str, value: object) -> Message:
    fields = cast("dict[object, object]", value) if isinstance(value, dict) else {}
    role, content = fields.get("role"), fields.get("content")
    if not (isinstance(role, str) and role and isinstance(content, str)):
        raise ValueError(f"{place} is {shown(value)}; a message is {{role, content}}, both of them texts")
    return {"role": _unicode(place, role), "content": _unicode(place, content)}


def _unicode(place: str, text: str) -> str:
    r"""The text itself, unless it holds half a surrogate pair, which JSON can write as ``\ud83d``."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} is no Unicode text: half a surrogate pair at character {error.start}") from None
    return text
