r"""How long a regular expression may search, estimated without searching.

Oniguruma, which tokenizers search with, backtracks, and gives up after ten million steps from one character of the
text; from the next one it begins again. The steps from one character are at most ``length**loops * 2**choices``:

    loops      repetitions without end that follow each other: two in ``\s*[\r\n]+``, which is the most in use
    choices    bits of whatever else may match in several ways: ``a?`` is one, ``(?:a|b|c|d)`` two, ``a{1,8}`` three

A repetition without end of something that has loops or choices, as ``(a+)+`` or ``(a|a)*``, takes a time that doubles
with every character of a text that its author knows. So do references to a group and to the pattern itself.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

MAX_LOOPS: Final = 2
MAX_CHOICES: Final = 16.0
MAX_REPEAT: Final = 1 << 10
"""A higher number of repetitions counts as one without end."""
KNOWN: Final = frozenset({r"(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+"})
"""Loops in loops that match in one way alone: of K-EXAONE."""
_REPEATED: Final = re.compile(r"[*+?]|\{(\d*)(,?)(\d*)\}")
_HEAD: Final = re.compile(r"\(\?(?:<[=!]|<\w+>|'\w+'|[imx-]*:|[imx-]*\)|[:=!>])")
_REFUSED: Final = re.compile(r"\\[1-9gkcCMX]|\(\?[(~&PR#]|\(\?\^|\(\*")
"""References to groups, calls of them, conditions, absence, and what would hide a bracket from a reader."""


@dataclass(frozen=True)
class _Cost:
    loops: int = 0
    choices: float = 0.0
    is_endless: bool = False

    def then(self, other: _Cost) -> _Cost:
        return _Cost(self.loops + other.loops, self.choices + other.choices, self.is_endless or other.is_endless)

    def repeated(self, low: int, high: float) -> _Cost:
        """The cost of so many of it in a row."""
        if high > MAX_REPEAT:
            return _Cost(1, 0.0, self.is_endless or self.loops > 0 or self.choices > 0)
        ways = math.log2(high - low + 1) if high > low else 0.0
        return _Cost(int(self.loops * high), self.choices * high + ways, self.is_endless)


class _Group:
    """Alternatives of a group that is open."""

    def __init__(self) -> None:
        self.done: list[_Cost] = []
        self.before = self.last = _Cost()
        self.can_repeat = False

    def add(self, item: _Cost, *, can_repeat: bool = True) -> None:
        self.before, self.last, self.can_repeat = self.before.then(self.last), item, can_repeat

    def alternative(self) -> None:
        self.done.append(self.before.then(self.last))
        self.before = self.last = _Cost()
        self.can_repeat = False

    def cost(self) -> _Cost:
        self.alternative()
        return _Cost(
            max(each.loops for each in self.done),
            max(each.choices for each in self.done) + math.log2(len(self.done)),
            any(each.is_endless for each in self.done),
        )


def searches_long(pattern: str) -> bool:
    r"""Whether a pattern could search a text of usual length for minutes, or may not be read here.

    >>> searches_long(r"(?:a+)+$"), searches_long(r"(a|aa)*b"), searches_long(r"\s*\s*\s*x")
    (True, True, True)
    >>> searches_long(r" ?[^\s\p{L}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|(?:\d{3})+")
    False
    """
    for known in KNOWN:
        pattern = pattern.replace(known, r"\p{L}+")
    cost = _cost(pattern)
    return cost is None or cost.is_endless or cost.loops > MAX_LOOPS or cost.choices > MAX_CHOICES


def _cost(pattern: str) -> _Cost | None:
    """None for a pattern that is not read."""
    groups, at = [_Group()], 0
    while at < len(pattern):
        char, here = pattern[at], groups[-1]
        found = _REPEATED.match(pattern, at) if here.can_repeat else None
        if found is not None and (found[0][0] != "{" or any(found.groups()[::2])):
            here.last, at = here.last.repeated(*_times(found)), found.end()
            if pattern[at : at + 1] == "?" or (found[0][0] != "{" and pattern[at : at + 1] == "+"):
                at += 1  # lazy, or possessive; behind a brace, a plus repeats once more
            continue
        if _REFUSED.match(pattern, at):
            return None
        if char == "(":
            head = _HEAD.match(pattern, at)
            if pattern.startswith("(?", at) and (head is None or "x" in head[0].partition("<")[0].partition("'")[0]):
                return None
            at = head.end() if head else at + 1
            if not (head and head[0].endswith(")")):
                groups.append(_Group())
            continue
        if char == ")":
            if len(groups) == 1:
                return None
            groups[-2].add(groups.pop().cost())
        elif char == "|":
            here.alternative()
        else:
            here.add(_Cost(choices=float(pattern.startswith(r"\R", at))))
        at = _end(pattern, at)
    return groups[0].cost() if len(groups) == 1 else None


def _times(found: re.Match[str]) -> tuple[int, float]:
    if found[0] in "*+?":
        return int(found[0] == "+"), 1 if found[0] == "?" else math.inf
    low, comma, high = found.groups()
    least = int(low[:9] or 0)
    return least, (float(high[:9]) if high else math.inf) if comma else least


def _end(pattern: str, at: int) -> int:
    """Behind one item: a character, an escape, a class."""
    if pattern[at] == "\\":
        return _escape_end(pattern, at)
    return _class_end(pattern, at) if pattern[at] == "[" else at + 1


def _escape_end(pattern: str, at: int) -> int:
    if pattern[at + 1 : at + 2] in ("p", "P", "x", "o") and pattern[at + 2 : at + 3] == "{":
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
