"""Chats that a column of texts holds as JSON, which is the only way to have them in CSV.

The column decides as a whole: all of its texts are chats, or none is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

from rlhf_core.contracts.errors import UserError
from rlhf_core.prompts.messages import is_chat, shown
from rlhf_core.prompts.remarks import counted

_KEYS: Final = r"(?:role|content|from|value|messages|conversations?)"
_PYTHON: Final = re.compile(rf"\s*\[?\s*\{{\s*'{_KEYS}'\s*:.*[\]}}]\s*\Z", re.DOTALL)
_BROKEN: Final = re.compile(rf'\s*\[\s*\{{\s*"{_KEYS}"\s*:')

Kind = Literal["text", "chat", "python", "broken"]


def read_text_chats(
    named: str, column: str, cells: Sequence[Any], place: Callable[[int], str]
) -> tuple[Sequence[Any], list[str]]:
    """Read the texts of a column as chats if they are chats written as JSON.

    Args:
        named: field and value of the source, for messages.
        column: name of the column.
        cells: texts, and whatever else the column holds.
        place: from the index of a row to its place in the source.
    Returns: (the cells, with lists of messages in place of their JSON; notes).
    Raises:
        UserError: some texts are such chats and others are not; or they are chats in Python's notation, or JSON
            that ends too early.
    """
    found: dict[Kind, list[int]] = {"text": [], "chat": [], "python": [], "broken": []}
    read = list(cells)
    for row, cell in enumerate(cells):
        if isinstance(cell, str):
            kind, read[row] = _read(cell)
            found[kind].append(row)
    texts, chats, python, broken = found.values()
    total = sum(map(len, found.values()))
    if python:
        raise UserError(
            f"{named} holds in {column} {len(python)} of {counted(total, 'text')} that are chats in Python's notation "
            f"({place(python[0])}: {shown(cells[python[0]])}); write them as JSON: json.dumps(messages)"
        )
    if broken:
        raise UserError(
            f"{named} holds in {column} {len(broken)} of {counted(total, 'text')} that begin as a chat in JSON does, "
            f"but are not JSON ({place(broken[0])}: {shown(cells[broken[0]])}); write them with json.dumps(messages)"
        )
    if not chats:
        return cells, []
    if texts:
        shorter, longer = sorted((chats, texts), key=len)
        raise UserError(
            f"{named} holds in {column} {counted(len(chats), 'chat')} written as JSON "
            f"({place(chats[0])}: {shown(cells[chats[0]])}) among {counted(len(texts), 'text')} "
            f"({place(texts[0])}: {shown(cells[texts[0]])}); make all of them chats or none. The smaller part: "
            f"{', '.join(place(row) for row in shorter[:10])}{', …' * (len(shorter) > 10 or not longer)}"
        )
    return read, [
        f"{counted(len(chats), 'text')} of {column} are chats written as JSON, and read as chats ({place(chats[0])}: "
        f"{shown(cells[chats[0]])})"
    ]


def _read(text: str) -> tuple[Kind, Any]:
    """What a text is, and the chat that it holds if it is one."""
    if text.lstrip()[:1] not in ("[", "{"):
        return "text", text
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if _PYTHON.match(text):
            return "python", text
        return "broken" if _BROKEN.match(text) and error.msg != "Extra data" else "text", text
    except RecursionError:
        return "text", text
    return ("chat", value) if is_chat(value) else ("text", text)
