"""All prompts of ``prompts.source``: find it, read it, check every row, name its content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_core.contracts.config import PromptsConfig
from rlhf_core.contracts.config_io import canonical_json
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.hub import split_revision
from rlhf_core.prompts.columns import PAIR, ColumnChoice
from rlhf_core.prompts.entries import PromptEntry, as_entry, as_json, check_prompt, without_last_answer
from rlhf_core.prompts.hub import read_folder, read_hub
from rlhf_core.prompts.messages import shown
from rlhf_core.prompts.oddities import oddities
from rlhf_core.prompts.pairs import read_pairs
from rlhf_core.prompts.readers import FILE_READERS, Choose, Rows, first_problems, read_file
from rlhf_core.prompts.remarks import Remarks, counted
from rlhf_core.prompts.text_chats import read_text_chats


@dataclass(frozen=True)
class PromptSet:
    """All prompts of a source, in source order.

    Example: ``PromptSet(["Hi", [{"role": "user", "content": "Ho"}]], "51d3...", 0, [{"answer": 4}, {"answer": 5}])``
    """

    entries: Sequence[PromptEntry]
    digest: str
    """sha256 of the canonical JSON of ``entries``, and of ``columns`` where there are any: the same for the same
    prompts in any file format."""
    num_duplicates: int
    """Repeated prompts that were dropped: only of preferences, where a prompt stands in several pairs."""
    columns: Sequence[Mapping[str, Any]]
    """prompts.columns of each entry, plain JSON; of a repeated prompt those of its first row."""
    notes: Sequence[str] = field(default=(), compare=False)
    """How the source was read, and what may surprise in it: sentences for the plan."""
    unused_keys: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict, compare=False)
    """Key of a message that is not used -> the first chat that has it, as the source holds it."""


def load_prompt_set(config: PromptsConfig) -> PromptSet:
    """Read and check all prompts of a source.

    Args:
        config: where they are and in which column. With ``from_preferences`` they are the shared beginning of
            ``chosen`` and ``rejected``, or this column if these hold answers alone; repeated prompts are dropped.
    Returns: the prompts in source order.
    Raises:
        UserError: the source is not there or not readable, the column is missing, there are no rows, or rows
            hold no usable prompt (all of them are counted, the first ten are named).
    """
    choice, remarks = ColumnChoice(config), Remarks()
    rows = read_rows(config, choice)
    if not any(rows.columns.values()):
        raise UserError(f"prompts.source {config.source!r} holds no rows; at least one prompt is needed")
    prompts, notes = _prompts(config, rows, choice, remarks)
    columns = _columns(config, rows, list(prompts))
    kept = list(prompts)
    if config.from_preferences:
        first: dict[bytes, int] = {}
        for row, entry in prompts.items():
            first.setdefault(canonical_json(entry), row)
        kept = list(first.values())
    entries = [prompts[row] for row in kept]
    num_duplicates = len(prompts) - len(kept)
    if num_duplicates:
        notes.append(f"{counted(num_duplicates, 'repeated prompt')} of preference pairs are left out")
    about_file = [f"prompts.source {config.source!r}: {note}" for note in rows.notes]

    def place(index: int) -> str:
        return rows.place(kept[index])

    about_rows = [*remarks.notes(rows.place), *oddities(entries, place, as_chat=config.as_chat)]
    return PromptSet(
        entries=entries,
        digest=_digest(config, entries, [columns[row] for row in kept]),
        num_duplicates=num_duplicates,
        columns=[columns[row] for row in kept],
        notes=[*about_file, *notes, *choice.notes(), *about_rows],
        unused_keys=remarks.unused,
    )


def read_rows(config: PromptsConfig, choose: Choose) -> Rows:
    """Read the columns of ``prompts.source`` that ``choose`` takes from all names; raises UserError if it cannot."""
    source = config.source
    if not source.strip():
        raise UserError(
            f"prompts.source is not set; name a file ({', '.join(FILE_READERS)}), "
            "a `datasets` folder or a dataset of the hub"
        )
    path = Path(source).expanduser() if source.startswith("~/") else Path(source)
    try:
        if path.is_dir():
            return read_folder(config, path, choose)
        if path.is_file():
            return read_file(config, path, choose)
    except OSError as error:  # of the look-up: no permission, a name too long
        raise UserError(f"prompts.source {shown(source)} cannot be looked up: {error.strerror}") from None
    if any(character in source for character in "*?["):
        raise UserError(
            f"prompts.source {source!r} is a pattern of files, which is not read; name one file, or the folder that "
            "holds the files and nothing else"
        )
    if _looks_like_path(source):
        raise UserError(f"prompts.source {source!r} does not exist")
    return read_hub(config, choose)


def _looks_like_path(source: str) -> bool:
    source, _ = split_revision(source)
    return (
        source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or Path(source).suffix.lower() in (*FILE_READERS, ".gz")
    )


def _prompts(
    config: PromptsConfig, rows: Rows, choice: ColumnChoice, remarks: Remarks
) -> tuple[dict[int, PromptEntry], list[str]]:
    """(row -> prompt, notes). Raises UserError naming the rows that have none."""
    has_pair = config.from_preferences and config.column not in PAIR and all(name in rows.columns for name in PAIR)
    holders = [name for name in (config.column, *PAIR * has_pair) if name in rows.columns]
    cells: dict[str, Sequence[Any]] = {}
    notes: list[str] = []
    problems: list[str] = []
    for name in holders:
        try:
            cells[name], found = read_text_chats(
                f"prompts.source {config.source!r}", name, rows.columns[name], rows.place
            )
            notes += found
        except UserError as error:
            problems += error.problems
    if problems:
        raise first_problems(problems)
    if has_pair:
        pairs, found = read_pairs(config, rows, cells, choice, remarks)
        notes += found
        if pairs is not None:
            return pairs, notes
    return _entries(config, rows, cells[config.column], remarks), notes


def _entries(config: PromptsConfig, rows: Rows, cells: Sequence[Any], remarks: Remarks) -> dict[int, PromptEntry]:
    """The prompt column's entries. Raises UserError naming the rows that have none."""
    entries: dict[int, PromptEntry] = {}
    problems: list[str] = []
    for row, cell in enumerate(cells):
        remarks.row = row
        try:
            entry = as_entry(config.column, cell, remarks)
            if config.last_answer == "cut" and (cut := without_last_answer(entry)) != entry:
                remarks.see("end with the assistant's answer, which is cut off (prompts.last_answer: cut)")
                entry = cut
            check_prompt(config.column, entry)
            entries[row] = entry
        except ValueError as error:
            problems.append(f"prompts.source {config.source!r}, {rows.place(row)}: {error}")
    if problems:
        raise first_problems(problems)
    return entries


def _columns(config: PromptsConfig, rows: Rows, kept: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Row -> prompts.columns. Raises UserError naming the cells that JSON does not have."""
    columns: dict[int, dict[str, Any]] = {}
    problems: list[str] = []
    for row in kept:
        try:
            columns[row] = {name: as_json(name, rows.columns[name][row]) for name in config.columns}
        except ValueError as error:
            problems.append(f"prompts.source {config.source!r}, {rows.place(row)}: {error}")
    if problems:
        raise first_problems(problems)
    return columns


def _digest(config: PromptsConfig, entries: Sequence[PromptEntry], columns: Sequence[Mapping[str, Any]]) -> str:
    """Equal to ``digest_json`` of the entries, then of the columns, without holding their JSON at once."""
    digest = hashlib.sha256()
    for rows in (entries, columns) if config.columns else (entries,):
        digest.update(b"[")
        for index, row in enumerate(rows):
            digest.update(b"," * bool(index) + canonical_json(row))
        digest.update(b"]")
    return digest.hexdigest()
