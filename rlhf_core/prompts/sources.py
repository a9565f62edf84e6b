"""All prompts of ``prompts.source``: find it, read it, check every row, name its content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.contracts.config import PromptsConfig
from rlhf_core.contracts.config_io import canonical_json
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.hub import split_revision
from rlhf_core.prompts.entries import PromptEntry, as_entry, as_json, check_prompt, shown
from rlhf_core.prompts.hub import read_folder, read_hub
from rlhf_core.prompts.preferences import shared_prompt
from rlhf_core.prompts.readers import (
    FILE_READERS,
    Choose,
    Rows,
    first_problems,
    read_file,
)

PAIR = ("chosen", "rejected")
"""Columns of a preference pair."""


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


def load_prompt_set(config: PromptsConfig) -> PromptSet:
    """Read and check all prompts of a source.

    Args:
        config: where they are and in which column; ``from_preferences`` takes this column if it exists, else
            the shared beginning of ``chosen`` and ``rejected``, and drops repeated prompts.
    Returns: the prompts in source order.
    Raises:
        UserError: the source is not there or not readable, the column is missing, there are no rows, or rows
            hold no usable prompt (all of them are counted, the first ten are named).
    """
    rows = _read_rows(config)
    if not any(rows.columns.values()):
        raise UserError(f"prompts.source {config.source!r} holds no rows; at least one prompt is needed")
    entries, columns = _entries(config, rows)
    kept: Sequence[int] = range(len(entries))
    if config.from_preferences:
        first: dict[bytes, int] = {}
        for row, entry in enumerate(entries):
            first.setdefault(canonical_json(entry), row)
        kept = list(first.values())
    return PromptSet(
        entries=[entries[row] for row in kept],
        digest=_digest(config, [entries[row] for row in kept], [columns[row] for row in kept]),
        num_duplicates=len(entries) - len(kept),
        columns=[columns[row] for row in kept],
    )


def _read_rows(config: PromptsConfig) -> Rows:
    source, choose = config.source, _column_choice(config)
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
    if _looks_like_path(source):
        raise UserError(f"prompts.source {source!r} does not exist")
    return read_hub(config, choose)


def _looks_like_path(source: str) -> bool:
    source, _ = split_revision(source)
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).suffix.lower() in FILE_READERS


def _column_choice(config: PromptsConfig) -> Choose:
    def choose(names: Sequence[str]) -> Sequence[str]:
        if config.column in names:
            wanted: Sequence[str] = [config.column]
        elif config.from_preferences and _has_pair(names):
            wanted = PAIR
        else:
            raise UserError(_missing_column(config, names))
        for name in config.columns:
            if name not in names:
                raise UserError(
                    f"prompts.columns names {name!r}, which is not in prompts.source {config.source!r}, whose columns "
                    f"are: {', '.join(names)}"
                )
        wanted = list(dict.fromkeys([*wanted, *config.columns]))
        for name in wanted:
            if list(names).count(name) > 1:
                raise UserError(f"prompts.source {config.source!r} has the column {name!r} more than once")
        return wanted

    return choose


def _has_pair(names: Sequence[str]) -> bool:
    return all(name in names for name in PAIR)


def _missing_column(config: PromptsConfig, names: Sequence[str]) -> str:
    if config.from_preferences:
        remedy = "; prompts.from_preferences needs that column, or both chosen and rejected"
    elif _has_pair(names):
        remedy = "; to take the shared beginning of chosen and rejected, set prompts.from_preferences: true"
    else:
        remedy = ""
    columns = ", ".join(names) or "none"
    return (
        f"prompts.column {config.column!r} is not in prompts.source {config.source!r}, whose columns are: "
        f"{columns}{remedy}"
    )


def _entries(config: PromptsConfig, rows: Rows) -> tuple[list[PromptEntry], list[dict[str, Any]]]:
    """Prompt and further columns of every row. Raises UserError naming the rows that have none."""
    entries: list[PromptEntry] = []
    columns: list[dict[str, Any]] = []
    problems: list[str] = []
    holders = [config.column] if config.column in rows.columns else PAIR
    for index, values in enumerate(zip(*rows.columns.values(), strict=True)):
        cells = dict(zip(rows.columns, values, strict=True))
        try:
            entries.append(_prompt({name: cells[name] for name in holders}))
            columns.append({name: as_json(name, cells[name]) for name in config.columns})
        except ValueError as error:
            problems.append(f"prompts.source {config.source!r}, {rows.place(index)}: {error}")
    if problems:
        raise first_problems(problems)
    return entries, columns


def _prompt(cells: Mapping[str, Any]) -> PromptEntry:
    """From {column: cell}, or from {"chosen": cell, "rejected": cell}. Raises ValueError with the problem."""
    sides = {column: as_entry(column, cell) for column, cell in cells.items()}
    name, prompt = next(iter(sides.items()))
    if len(sides) > 1:
        name, prompt = "the shared beginning", shared_prompt(**sides)
    check_prompt(name, prompt)
    return prompt


def _digest(config: PromptsConfig, entries: Sequence[PromptEntry], columns: Sequence[Mapping[str, Any]]) -> str:
    """Equal to ``digest_json`` of the entries, then of the columns, without holding their JSON at once."""
    digest = hashlib.sha256()
    for rows in (entries, columns) if config.columns else (entries,):
        digest.update(b"[")
        for index, row in enumerate(rows):
            digest.update(b"," * bool(index) + canonical_json(row))
        digest.update(b"]")
    return digest.hexdigest()
