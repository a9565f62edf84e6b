"""What may surprise in prompts that are read as they stand: blanks at the end, NA, repeats, control characters."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final

from rlhf_core.contracts.config_io import canonical_json
from rlhf_core.prompts.entries import PromptEntry
from rlhf_core.prompts.markings import answered
from rlhf_core.prompts.messages import shown
from rlhf_core.prompts.remarks import counted, counted_that

NOTHING: Final = frozenset({"na", "n/a", "#n/a", "nan", "null", "none", "nil", "undefined", "<na>"})
"""How programs write a missing value, in lower case."""
_LINE_ENDS: Final = "\r\n"
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def oddities(entries: Sequence[PromptEntry], place: Callable[[int], str], *, as_chat: bool = False) -> list[str]:
    """One sentence for each kind of oddity; nothing is changed.

    Args:
        entries: all prompts.
        place: from the index of a prompt to its place in the source.
        as_chat: whether texts are read as chats.
    """
    lasts = [entry if isinstance(entry, str) else entry[-1]["content"] for entry in entries]
    texts = [row for row, entry in enumerate(entries) if isinstance(entry, str)]
    found = {
        "are the word of a missing value": [row for row, text in enumerate(lasts) if text.strip().lower() in NOTHING],
        "hold control characters": [row for row, text in enumerate(lasts) if _CONTROL.search(text)],
        "end with a blank, which most tokenizers make a token of its own that models have hardly seen there": [
            row for row in texts if lasts[row][-1].isspace() and lasts[row][-1] not in _LINE_ENDS
        ],
    }
    found["hold text behind the mark that opens their last answer, which is taken as a part of the prompt"] = [
        row for row in texts if answered(lasts[row])
    ]
    found["have no message of the user"] = [
        row
        for row, entry in enumerate(entries)
        if not isinstance(entry, str) and all(message["role"] != "user" for message in entry)
    ]
    for sentence, holds in (
        ("end with a line break, and the others do not", lambda text: text[-1] in _LINE_ENDS),
        ("begin with white space, and the others do not", lambda text: text[0].isspace()),
    ):
        rows = [row for row in texts if holds(lasts[row])]
        found[sentence] = rows if len(rows) < len(texts) else []
    notes = [
        f"{counted_that(len(rows), sentence)} ({place(rows[0])}: {_end_of(lasts[rows[0]], sentence)})"
        for sentence, rows in found.items()
        if rows
    ]
    if texts and len(texts) < len(entries) and not as_chat:
        chat = next(row for row, entry in enumerate(entries) if not isinstance(entry, str))
        notes.append(
            f"{counted(len(texts), 'prompt')} are texts ({place(texts[0])}) and {len(entries) - len(texts)} chats "
            f"({place(chat)}); only chats go through the chat template"
        )
    return notes + _repeats(entries, place)


def _end_of(text: str, sentence: str) -> str:
    return shown(text[-30:] if sentence.startswith("end ") else text)


def _repeats(entries: Sequence[PromptEntry], place: Callable[[int], str]) -> list[str]:
    first: dict[PromptEntry | bytes, int] = {}
    repeated: dict[int, int] = {}
    """Row of the first -> row of the second."""
    for row, entry in enumerate(entries):
        before = first.setdefault(entry if isinstance(entry, str) else canonical_json(entry), row)
        if before != row:
            repeated.setdefault(before, row)
    if not repeated:
        return []
    row, other = next(iter(repeated.items()))
    entry = entries[row]
    text = entry if isinstance(entry, str) else entry[-1]["content"]
    return [
        f"{counted_that(len(repeated), 'stand more than once')}, {counted(len(entries) - len(first), 'row')} too many "
        f"({place(row)} and {place(other)}: {shown(text)})"
    ]
