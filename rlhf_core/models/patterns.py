"""Regular expressions in a tokenizer.json of somebody else, and how much else stands in it.

The library searches by backtracking: a loop around a loop, as in ``(a+)+$``, takes a time that doubles with every
character of a text that its author knows, until the library gives up (:mod:`rlhf_core.models.pattern_cost`). And it
replaces as often as it is told: forty times two characters for one fill any memory.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, cast

from rlhf_core.contracts.errors import UserError
from rlhf_core.models.pattern_cost import searches_long

MAX_OBJECTS: Final = 1 << 18
"""Braces: an added token is an object, a whole vocabulary is one."""
MAX_COMMAS: Final = 5 << 19
"""The largest vocabularies, of a million tokens, have 1.8 million."""
MAX_PATTERN: Final = 1 << 14
MAX_GROWTH: Final = 1 << 10
"""Characters that a normalizer may make of one: NFKC makes up to 18."""
_PARTS: Final = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


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
    if not any(mark in data for mark in (b"Regex", b"Replace", b"\\u")):
        return
    try:
        description: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{named} has a {file.name} that is not JSON: {str(error) or 'nested too deep'}") from None
    parts = [description.get(part) for part in _PARTS] if isinstance(description, dict) else []
    if max(map(_growth, parts), default=1) > MAX_GROWTH:
        raise UserError(
            f"{named} has a normalizer or decoder in its {file.name} that may make more than {MAX_GROWTH} characters "
            "of one; take the tokenizer that the model was trained with"
        )
    for pattern in _patterns(parts):
        if len(pattern) > MAX_PATTERN or searches_long(pattern):
            raise UserError(
                f"{named} has the pattern {pattern[:60]!r} in its {file.name}, which could take for ever to search; "
                "take the tokenizer that the model was trained with"
            )


def _growth(part: object) -> int:
    """Return how many characters a normalizer or decoder may make of one, by the replacements in it."""
    if not isinstance(part, dict):
        return 1
    values = cast("dict[str, Any]", part)
    if values.get("type") == "Replace":
        content = values.get("content")
        return max(1, len(content)) if isinstance(content, str) else 1
    parts = values.get("normalizers", values.get("decoders"))
    return math.prod(map(_growth, cast("list[object]", parts))) if isinstance(parts, list) else 1


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
