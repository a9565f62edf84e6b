"""Which iterations a person means: ``0,10,last``, ``3-7``, ``all``."""

from __future__ import annotations

from rlhf_core.contracts.errors import UserError

LAST, ALL = "last", "all"
_REMEDY = "write numbers, ranges and last, as in 0,10,last or 3-7, or all"


def first_middle_last(finished: int) -> list[int]:
    """The first, the middle and the last of the finished iterations, ascending; fewer where they are the same."""
    return sorted({0, (finished - 1) // 2, finished - 1}) if finished else []


def chosen_iterations(text: str, finished: int) -> list[int]:
    """The iterations that a text names, ascending.

    Args:
        text: what follows ``--iterations``.
        finished: how many iterations are finished.
    Raises: UserError for anything else than that, or an iteration that is not finished.
    """
    if text.strip() == ALL:
        return list(range(finished))
    found: set[int] = set()
    for part in text.split(","):
        first, dash, after = (piece.strip() for piece in part.partition("-"))
        low = _number(first, text, finished)
        high = _number(after, text, finished) if dash else low
        if high < low:
            raise UserError(f"--iterations {text!r} has the range {part.strip()}, which runs backwards; {_REMEDY}")
        if high >= finished:
            raise UserError(
                f"--iterations {text!r} names iteration {high}, which is not finished; the newest is {finished - 1}"
            )
        found.update(range(low, high + 1))
    return sorted(found)


def _number(word: str, text: str, finished: int) -> int:
    if word == LAST:
        return finished - 1
    if not (word.isascii() and word.isdecimal() and len(word) < 12):
        raise UserError(f"--iterations {text!r} has {word!r}, which is no iteration; {_REMEDY}")
    return int(word)
