"""What may change between the start of a run and its resumption, held fast at the start: commits, and a date.

A hub id stands for the newest commit of a branch, and a chat template may write today's date. So a run takes both
down in its config before it begins: every process and every later load has the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.hub import NEWEST, is_commit, split_revision
from rlhf_core.contracts.places import model_places, with_places
from rlhf_core.models.clock import clock_day, clock_readers
from rlhf_core.models.hub import pinned_name
from rlhf_core.prompts.hub import pinned_source

DATE: Final = "prompts.template_date"
SOURCE: Final = "prompts.source"


@dataclass(frozen=True)
class Pinned:
    """A config of which nothing moves by itself any more."""

    config: RunConfig
    before: Mapping[str, str | None]
    """Field -> its value before, of those that were held: ``{"policy.model": "owner/name"}``."""
    notes: list[str]
    """What was chosen, in a sentence each."""


def pinned(config: RunConfig, leave: Collection[str] = ()) -> Pinned:
    """Give every hub id of a config its commit, and the clock of chat templates its day.

    A model whose commit cannot be found out stays as it is, and loading it is refused. Prompts stay as they are where
    `datasets` has them and the hub cannot be asked: their content is in the identity of the run.

    Args:
        config: as the user has it; one that is pinned already stays the same.
        leave: fields that stay as they are.
    """
    places, notes = _commits(config, leave)
    before: dict[str, str | None] = {field: _value(config, field) for field in places}
    for field, name in places.items():
        repo, commit = split_revision(name)
        asked = split_revision(_value(config, field))[1] or NEWEST
        notes.append(f"{field} {repo!r} at {asked!r} is commit {commit}: the run keeps it, wherever the branch goes")
    is_open = config.prompts.template_date is None and DATE not in leave
    if is_open and (readers := clock_readers(config)):
        places[DATE], before[DATE] = clock_day(), None
        notes.append(
            f"the chat template of {' and '.join(readers)} reads the clock: it shows {places[DATE]} throughout the run "
            f"(set {DATE} for another day)"
        )
    return Pinned(with_places(config, places), before, notes)


def moved_branches(config: RunConfig, before: Mapping[str, str | None]) -> list[str]:
    """Compare the commits of a run with those that its hub ids stand for now.

    Args:
        config: of the run, pinned.
        before: of :class:`Pinned`, from when the run began.
    Returns: a sentence for each that has moved; one that cannot be asked is left out.
    """
    moved: list[str] = []
    for field, name in before.items():
        if name is None:
            continue
        repo, asked = split_revision(name)
        with suppress(Exception):  # no network, or the repository is gone: the run has its commit
            now = split_revision(_pin(field, name))[1]
            then = split_revision(_value(config, field))[1]
            if then is not None and is_commit(now) and now != then:
                moved.append(
                    f"{field} {repo!r} has moved: {asked or NEWEST} is commit {now} now, and the run keeps {then}"
                )
    return moved


def _commits(config: RunConfig, leave: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Field -> name with its commit, of those that have none yet; and what could not be found out."""
    named = model_places(config)
    if config.prompts.source:
        named[SOURCE] = config.prompts.source
    found: dict[str, str] = {}
    notes: list[str] = []
    known: dict[tuple[bool, str], str] = {}
    for field, name in named.items():
        if field in leave:
            continue
        key = (field == SOURCE, name)
        try:
            known[key] = known.get(key) or _pin(field, name)
        except Exception as error:  # whatever the hub raises: loading a model tells
            if field == SOURCE:
                reason = str(error).strip().split("\n")[0]
                notes.append(f"{SOURCE} {name!r} is not held at a commit, which could not be found out: {reason}")
            continue
        if known[key] != name:
            found[field] = known[key]
    return found, notes


def _pin(field: str, name: str) -> str:
    return pinned_source(name) if field == SOURCE else pinned_name(name)


def _value(config: RunConfig, field: str) -> str:
    found: Any = config
    for part in field.split("."):
        found = found[int(part)] if part.isdecimal() else getattr(found, part)
    return str(found)
