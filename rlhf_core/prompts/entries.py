"""One prompt: what it may be, and what is refused."""

from __future__ import annotations

import json
import unicodedata
from typing import cast

from rlhf_core.contracts.batches import Message
from rlhf_core.contracts.config_io import canonical_json
from rlhf_core.prompts.messages import as_message, shown, unicode_text, unwrapped
from rlhf_core.prompts.remarks import Remarks

PromptEntry = str | list[Message]
"""Plain text, or chat messages."""

_KINDS = "a text or a list of {role, content} messages"
_INVISIBLE = frozenset({"Cc", "Cf", "Zl", "Zp", "Zs"})
"""Unicode categories of what leaves no mark: control and format characters, and blanks."""


def as_entry(column: str, value: object, remarks: Remarks | None = None) -> PromptEntry:
    """A cell as text or chat; of each message only role and content are kept.

    Args:
        column: for the message.
        value: what the source holds, in plain Python types.
        remarks: counts what is read in another way than it stands.
    Returns: the entry; it may still be empty.
    Raises:
        ValueError: neither a text nor a chat.
    """
    if value is None:
        raise ValueError(f"{column} is null or missing; {_KINDS} is needed")
    value = unwrapped(value)
    if not isinstance(value, str | list):
        raise ValueError(f"{column} is {shown(value)}, a {type(value).__name__}; {_KINDS} is needed{_remedy(value)}")
    if isinstance(value, str):
        return unicode_text(column, value)
    cells = cast("list[object]", value)
    if cells and all(type(cell) is int for cell in cells):
        raise ValueError(
            f"{column} is {shown(value)}, a list of token ids; {_KINDS} is needed: decode the tokens first"
        )
    remarks = Remarks() if remarks is None else remarks
    chat = [as_message(f"{column}[{i}]", message, remarks) for i, message in enumerate(cells)]
    for key, example in remarks.unused.items():
        if not example and any(key in cast("dict[str, object]", cell) for cell in cells):
            example.extend(cast("list[dict[str, object]]", cells))
    return chat


def check_prompt(column: str, entry: PromptEntry) -> None:
    """Refuse what a policy cannot answer.

    Args:
        column: for the message.
        entry: what :func:`as_entry` returned.
    Raises:
        ValueError: nothing that can be seen, no message, or a chat that ends with the assistant or without text.
    """
    if not entry:
        raise ValueError(f"{column} is {entry!r}; a prompt must not be empty")
    if isinstance(entry, str):
        if entry.isspace():
            raise ValueError(f"{column} is {shown(entry)}; a prompt must not be white space only")
        if _is_invisible(entry):
            raise ValueError(f"{column} is {shown(entry)}; a prompt must have a character that can be seen")
    elif entry[-1]["role"] == "assistant":
        raise ValueError(
            f"{column} ends with the assistant message {shown(entry[-1]['content'])}; the policy writes the "
            "answer, so leave it out, or set prompts.last_answer: cut"
        )
    elif _is_invisible(entry[-1]["content"]):
        raise ValueError(f"{column} ends with a message whose content is {shown(entry[-1]['content'])}; it needs text")


def without_last_answer(entry: PromptEntry) -> PromptEntry:
    """A chat without the assistant messages at its end; a text as it is."""
    if isinstance(entry, str):
        return entry
    length = len(entry)
    while length and entry[length - 1]["role"] == "assistant":
        length -= 1
    return entry[:length]


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


def _is_invisible(text: str) -> bool:
    return not text[:1].isalnum() and all(unicodedata.category(character) in _INVISIBLE for character in text)


def _remedy(value: object) -> str:
    if isinstance(value, bytes):
        return "; decode the column to text first (Arrow: cast it to string)"
    return "; put the message into a list" if isinstance(value, dict) and "content" in value else ""
