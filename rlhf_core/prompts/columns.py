"""Which columns of a source are read, and what the columns beside them suggest."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Final

from rlhf_core.contracts.config import PromptsConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.prompts.messages import shown

PAIR: Final = ("chosen", "rejected")
"""Columns of a preference pair."""
USUAL: Final = (
    "prompt", "messages", "conversations", "conversation", "question", "instruction", "query", "problem", "text",
    "input", "prompts", "context", "content",
)  # fmt: skip
"""Names that prompt columns have, the likeliest first."""
BESIDE: Final = {"instruction": ("input", "context"), "question": ("context",)}
"""Prompt column -> columns that usually belong to the same prompt."""
_ALWAYS_BESIDE: Final = ("system", "system_prompt", "history", "tools")
_MAX_NAMES: Final = 30
_MAX_WORDS: Final = 4


class ColumnChoice:
    """Chooses the columns of a source, and remembers what it had.

    Args:
        config: the prompt column, the further columns, and whether pairs are asked for.
    """

    def __init__(self, config: PromptsConfig) -> None:
        self.config = config
        self.names: Sequence[str] = ()

    def __call__(self, names: Sequence[str]) -> Sequence[str]:
        """The columns to read.

        Args:
            names: of the columns that the source has.
        Raises:
            UserError: one that is asked for is not there, or is there twice.
        """
        self.names, config = names, self.config
        own = [config.column] if config.column in names else []
        pair = PAIR if config.from_preferences and _has_pair(names) and config.column not in PAIR else ()
        if not own and not pair:
            raise UserError(self._missing_column(names))
        for name in config.columns:
            if name not in names:
                raise UserError(
                    f"prompts.columns names {name!r}, which is not in prompts.source {config.source!r}, whose columns "
                    f"are: {_listed(names)}{_did_you_mean('', name, names)}"
                )
        wanted = list(dict.fromkeys([*own, *pair, *config.columns]))
        for name in wanted:
            if list(names).count(name) > 1:
                raise UserError(f"prompts.source {config.source!r} has the column {name!r} more than once")
        return wanted

    def likely_prompts(self) -> list[str]:
        """Columns that may hold the prompts, beside the one that is set."""
        return [name for name in USUAL if name in self.names and name != self.config.column]

    def notes(self) -> list[str]:
        """Sentences about columns that look as if they belonged to the prompt, and are not read."""
        config, names = self.config, self.names
        beside = (*BESIDE.get(config.column, ()), *_ALWAYS_BESIDE)
        unread = [name for name in beside if name in names and name not in (config.column, *config.columns)]
        notes = [
            f"prompts.column is {config.column!r}; the column {name!r} beside it is not part of the prompt, and is "
            "not used"
            for name in unread
        ]
        if not config.from_preferences and _has_pair(names) and config.column not in PAIR:
            notes.append(
                f"prompts.column is {config.column!r}, and chosen and rejected beside it are not read; set "
                "prompts.from_preferences: true to take the prompt that they share"
            )
        if config.column in PAIR and _has_pair(names):
            notes.append(
                f"prompts.column is {config.column!r}, so what it holds is the prompt, its answer included; set "
                "prompts.from_preferences: true and leave prompts.column out to take what chosen and rejected share"
            )
        return notes

    def _missing_column(self, names: Sequence[str]) -> str:
        config = self.config
        hint = _did_you_mean("prompts.column: ", config.column, names)
        if config.from_preferences:
            remedy = f"; prompts.from_preferences needs that column, or both chosen and rejected{hint}"
        elif _has_pair(names):
            remedy = "; to take the shared beginning of chosen and rejected, set prompts.from_preferences: true"
        else:
            remedy = hint
        if any(len(name.split()) > _MAX_WORDS for name in names):
            remedy += f"; if its first line is a prompt, write a line {config.column} above it"
        return (
            f"prompts.column {config.column!r} is not in prompts.source {config.source!r}, whose columns are: "
            f"{_listed(names)}{remedy}"
        )


def _has_pair(names: Sequence[str]) -> bool:
    return all(name in names for name in PAIR)


def _listed(names: Sequence[str]) -> str:
    listed = [name if len(name) <= 60 else shown(name) for name in names[:_MAX_NAMES]]
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return (", ".join(listed) or "none") + more


def _did_you_mean(field: str, name: str, names: Sequence[str]) -> str:
    """The column that is meant: of the same letters, else of almost the same, else of a usual name."""
    same = [other for other in names if _letters(other) == _letters(name)]
    close = same or [other for other in names if other in difflib.get_close_matches(name, names, n=1, cutoff=0.75)]
    usual = [other for other in USUAL if other in names] if field else []
    found = close or usual
    if not found:
        return ""
    best = found[0] if found[0].strip() == found[0] else repr(found[0])
    return f"; did you mean {field}{best}?"


def _letters(name: str) -> str:
    """A name without case, blanks, marks and the s of a plural."""
    return "".join(character for character in name.casefold() if character.isalnum()).removesuffix("s")
