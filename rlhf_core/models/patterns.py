"""Regular expressions in a tokenizer.json of somebody else, and how much else stands in it.

The library searches by backtracking: a loop around a loop, as in ``(a+)+$``, takes a time that doubles with every
character of a text that its author knows, until the library gives up. No tokenizer that is in use has one.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, cast

from rlhf_core.contracts.errors import UserError

MAX_OBJECTS: Final = 1 << 18
"""Braces: an added token is an object, a whole vocabulary is one."""
MAX_COMMAS: Final = 5 << 19
"""The largest vocabularies, of a million tokens, have 1.8 million."""
MAX_PATTERN: Final = 1 << 14
MAX_REPEAT: Final = 1 << 10
_PARTS: Final = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_REPEATED: Final = re.compile(r"[*+]|\{(\d*)(,?)(\d*)\}")


def check_tokenizer(file: Path, named: str) -> None:
    """Refuse a tokenizer.json with patterns that could search for ever, or more objects than any has.

    Args:
        file: of at most 128 MiB.
        named: field and value of its folder, for errors.
    Raises: UserError.
    """
    about = file.stat()
    _check(file, named, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _check(file: Path, named: str, *_identity: int) -> None:
    data = file.read_bytes()
    if data.count(b"{") > MAX_OBJECTS:
        raise UserError(
            f"{named} has a {file.name} of {data.count(b'{')} objects; at most {MAX_OBJECTS} are read: take the "
            "tokenizer that the model was trained with"
        )
    if data.count(b",") > MAX_COMMAS:
        raise UserError(
            f"{named} has a {file.name} of {data.count(b',')} tokens and merges; at most {MAX_COMMAS} are read: take "
            "the tokenizer that the model was trained with"
        )
    if b"Regex" not in data and b"\\u" not in data:
        return
    try:
        description: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{named} has a {file.name} that is not JSON: {str(error) or 'nested too deep'}") from None
    parts = [description.get(part) for part in _PARTS] if isinstance(description, dict) else []
    for pattern in _patterns(parts):
        if len(pattern) > MAX_PATTERN or loops_in_loop(pattern):
            raise UserError(
                f"{named} has the pattern {pattern[:60]!r} in its {file.name}, which could take for ever to search; "
                "take the tokenizer that the model was trained with"
            )


def loops_in_loop(pattern: str) -> bool:
    r"""Whether a group that is repeated without end holds a repetition without end.

    >>> loops_in_loop(r"(?:a+)+$"), loops_in_loop(r" ?[^\s\p{L}]+[\r\n]*|\s+(?!\S)")
    (True, False)
    """
    open_groups: list[bool] = [False]  # whether a repetition stands in each group that is open
    was_group, at = False, 0
    while at < len(pattern):
        char = pattern[at]
        found = _REPEATED.match(pattern, at)
        if found is not None and at and _is_long(found):
            if was_group:
                return True
            open_groups[-1] = True
        if char == "\\":
            at, was_group = _escape_end(pattern, at), False
        elif char == "[":
            at, was_group = _class_end(pattern, at), False
        elif char == "(":
            open_groups.append(False)
            at, was_group = at + 1, False
        elif char == ")" and len(open_groups) > 1:
            was_group = open_groups.pop()
            open_groups[-1] |= was_group
            at += 1
        else:
            at, was_group = (found.end() if found else at + 1), False
    return False


def _is_long(found: re.Match[str]) -> bool:
    """Whether something is repeated without end, or very often."""
    if found[0] in "*+":
        return True
    low, comma, high = found.groups()
    return bool(comma and not high and low) or max((int(n[:9]) for n in (low, high) if n), default=0) > MAX_REPEAT


def _escape_end(pattern: str, at: int) -> int:
    if pattern[at + 1 : at + 2] in ("p", "P", "x") and pattern[at + 2 : at + 3] == "{":
        end = pattern.find("}", at)
        return end + 1 if end > 0 else len(pattern)
    return at + 2


def _class_end(pattern: str, at: int) -> int:
    """Behind the bracket that closes a class; classes may stand in classes."""
    depth, first = 0, True
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            at = _escape_end(pattern, at)
            first = False
            continue
        if char == "[":
            depth += 1
            at += 2 if pattern[at + 1 : at + 2] == "^" else 1
            first = True
            continue
        if char == "]" and not first:
            depth -= 1
            if depth == 0:
                return at + 1
        first = False
        at += 1
    return at


def _patterns(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, child in cast("dict[str, object]", value).items():
            if key == "Regex" and isinstance(child, str):
                yield child
            else:
                yield from _patterns(child)
    elif isinstance(value, list):
        for child in cast("list[object]", value):
            yield from _patterns(child)
