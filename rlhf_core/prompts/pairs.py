"""The prompts of preference pairs: of the pair itself, or of the column beside answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rlhf_core.contracts.config import PromptsConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.prompts.columns import PAIR, ColumnChoice
from rlhf_core.prompts.entries import PromptEntry, as_entry, check_prompt
from rlhf_core.prompts.messages import is_chat, shown, unwrapped
from rlhf_core.prompts.preferences import APART, WORDS, Parted, holds_prompt, part_pair
from rlhf_core.prompts.readers import Rows, first_problems
from rlhf_core.prompts.remarks import Remarks, counted, first_of

Cells = Mapping[str, Sequence[Any]]
Sides = tuple[PromptEntry, PromptEntry]
_SHOWN_END: Final = 40


def read_pairs(
    config: PromptsConfig, rows: Rows, cells: Cells, choice: ColumnChoice, remarks: Remarks
) -> tuple[dict[int, PromptEntry] | None, list[str]]:
    """Read the prompt of each preference pair.

    Args:
        config: the prompt column, and what happens to bad pairs.
        rows: of the source, for their places.
        cells: chosen, rejected, and the prompt column if the source has it.
        choice: the columns that the source has.
        remarks: counts what is read in another way than it stands.
    Returns: (row -> prompt, without the pairs that are dropped; notes). None in place of the prompts where the
        pairs hold answers alone, so that the prompt column has them.
    Raises:
        UserError: bad pairs are refused, no pair is good, or the source rather looks like answers alone.
    """
    own = cells.get(config.column)
    sides, marks = _sides(cells, remarks)
    prompts = [None] * len(sides) if own is None else [_or_none(config.column, cell) for cell in own]
    beside = {} if own is None else sides  # without a prompt column nothing is to be decided
    where = {row: holds_prompt(*pair, prompts[row]) for row, pair in beside.items() if isinstance(pair, tuple)}
    votes = Counter(where.values())
    if own is not None and (votes["apart"] > votes["inside"] or not votes["inside"]):
        return None, [_answers_alone(config, rows, sides)]
    remarks.absorb(marks)
    parted: dict[int, Parted] = {}
    bad: dict[int, str] = {}
    for row, pair in sides.items():
        try:
            if isinstance(pair, str):
                raise ValueError(pair)
            if own is not None and where[row] == "apart":
                raise ValueError(APART)
            found = part_pair(*pair, prompts[row])
            check_prompt("the shared beginning", found.prompt)
            parted[row] = found
        except ValueError as error:
            bad[row] = str(error)
    notes = _dropped(config, rows, bad, parted, choice)
    notes += _how(rows, parted)
    if own is not None:
        notes.append(f"the column {config.column!r} beside chosen and rejected is not the prompt: the pair decides")
    return {row: found.prompt for row, found in parted.items()}, notes


def _sides(cells: Cells, remarks: Remarks) -> tuple[dict[int, Sides | str], Remarks]:
    """Row -> its two sides, or what is wrong with them."""
    marks, sides = Remarks(row=remarks.row), {}
    for row, (chosen, rejected) in enumerate(zip(*(cells[name] for name in PAIR), strict=True)):
        marks.row = row
        try:
            sides[row] = _side("chosen", chosen, marks), _side("rejected", rejected, marks)
        except ValueError as error:
            sides[row] = str(error)
    return sides, marks


def _side(column: str, cell: Any, remarks: Remarks) -> PromptEntry:
    """One side of a pair; one message alone is an answer, as LLaMA-Factory has it."""
    alone = isinstance(cell, dict) and is_chat(cell) and unwrapped(cell) is cell
    return as_entry(column, [cell] if alone else cell, remarks)


def _or_none(column: str, cell: object) -> PromptEntry | None:
    try:
        return as_entry(column, cell)
    except ValueError:
        return None


def _answers_alone(config: PromptsConfig, rows: Rows, sides: Mapping[int, Sides | str]) -> str:
    row = next((row for row, pair in sides.items() if isinstance(pair, tuple)), None)
    if row is None:
        return f"prompts are of the column {config.column!r}: no row has both chosen and rejected"
    chosen = sides[row][0]
    answer = chosen if isinstance(chosen, str) else "".join(message["content"] for message in chosen[-1:])
    return (
        f"prompts are of the column {config.column!r}: chosen and rejected hold answers alone ({rows.place(row)}: "
        f"chosen is {shown(answer)})"
    )


def _dropped(
    config: PromptsConfig, rows: Rows, bad: Mapping[int, str], parted: Mapping[int, Parted], choice: ColumnChoice
) -> list[str]:
    """The note about bad pairs. Raises UserError where they are refused."""
    named = f"prompts.source {config.source!r}"
    by_words = [row for row, found in parted.items() if found.marking == WORDS]
    likely = [] if config.column in choice.names else choice.likely_prompts()
    example = f"{rows.place(by_words[0])}: {shown(parted[by_words[0]].prompt)}" if by_words else ""
    if likely and (by_words or not parted):
        found = f"share nothing but words ({example})" if by_words else "share no prompt"
        raise UserError(
            f"{named} has the column {likely[0]!r} beside chosen and rejected, which {found}; set prompts.column: "
            f"{likely[0]}"
        )
    if bad and (config.bad_pairs == "refuse" or not parted):
        raise first_problems([f"{named}, {rows.place(row)}: {problem}" for row, problem in bad.items()])
    if not bad:
        return []
    row, problem = next(iter(bad.items()))
    if len(bad) > len(parted) and by_words:
        raise UserError(
            f"{named}: {len(bad)} of {len(bad) + len(parted)} pairs show no prompt ({rows.place(row)}: {problem}), and "
            f"of others it would be their shared words ({example}); chosen and rejected seem to be answers alone: "
            "give the prompts a column of their own and name it in prompts.column"
        )
    return [
        f"{len(bad)} of {counted(len(bad) + len(parted), 'pair')} are dropped (prompts.bad_pairs: drop), the first is "
        f"{rows.place(row)}: {problem}"
    ]


def _how(rows: Rows, parted: Mapping[int, Parted]) -> list[str]:
    """How the prompts were found, with an example; and the warning where nothing marks them."""
    row, first = next(iter(parted.items()))
    prompt = first.prompt if isinstance(first.prompt, str) else first.prompt[-1]["content"]
    counts = Counter(found.marking for found in parted.values())
    notes = [
        f"prompts are what chosen and rejected share, up to the answer ({first_of(counts)}), e.g. {rows.place(row)} "
        f"ends with {shown(prompt[-_SHOWN_END:])}"
    ]
    plain = [row for row, found in parted.items() if found.marking == WORDS]
    if plain:
        found = parted[plain[0]]
        notes.append(
            f"nothing marks where the answer begins in {counted(len(plain), 'pair')}, so their prompt is the shared "
            f"words, which may hold the beginning of both answers ({rows.place(plain[0])}: "
            f"{shown(str(found.prompt)[-_SHOWN_END:])} before {shown(found.answers[0])} and {shown(found.answers[1])})"
        )
    return notes
