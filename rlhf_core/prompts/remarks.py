"""What was read in another way than it stands: counted, with the first example of each kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Remarks:
    """Counts of remarks about the rows of a source, for the notes of a plan."""

    row: int = 0
    """Index of the row that is being read."""
    unused: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Key of a message that is not used -> the first chat that has it, as the source holds it."""
    _seen: dict[str, _Sighting] = field(default_factory=dict)

    def see(self, sentence: str, example: str = "") -> None:
        """Count the current row for a remark.

        Args:
            sentence: the end of "N prompts ...", beginning with a verb.
            example: shown once, of the first row.
        """
        found = self._seen.setdefault(sentence, _Sighting(self.row, example))
        if found.last != self.row:
            found.last, found.count = self.row, found.count + 1

    def absorb(self, other: Remarks) -> None:
        """Take over the remarks of a reading of other columns of the same rows."""
        self._seen = other._seen | self._seen
        self.unused = other.unused | self.unused

    def notes(self, place: Callable[[int], str]) -> list[str]:
        """One sentence for each kind of remark.

        Args:
            place: from the index of a row to its place in the source.
        """
        return [
            f"{counted_that(found.count, sentence)} ({place(found.first)}{': ' * bool(found.example)}{found.example})"
            for sentence, found in self._seen.items()
        ]


@dataclass
class _Sighting:
    first: int
    example: str
    last: int = -1
    count: int = 0


def counted(count: int, noun: str) -> str:
    """``1 prompt``, ``2 prompts``."""
    return f"{count} {noun}{'s' * (count != 1)}"


def counted_that(count: int, sentence: str) -> str:
    """``2 prompts hold ...``, ``1 prompt holds ...``."""
    verb, rest = sentence.split(" ", 1)
    one = {"have": "has", "are": "is"}.get(verb, f"{verb}s")
    return f"{counted(count, 'prompt')} {one if count == 1 else verb} {rest}"


def first_of(found: Mapping[str, int]) -> str:
    """``ChatML 40, HH 2``: names with their counts, the most frequent first."""
    return ", ".join(f"{name} {count}" for name, count in sorted(found.items(), key=lambda item: -item[1]))
