"""Folders and files that somebody else made to do harm, each through the doors of a user, in a watched child."""

from __future__ import annotations

import collections
import shutil

from torture.battery import Effort, Outcome
from torture.break_in import Seen, run
from torture.payloads import PAYLOADS

NAME = "malicious artifacts"
GOAL = ">= 60 payloads, 0 executed, 0 connections"

SLOW = ("loops", "doubling", "memory", "padding", "power", "fills_the_memory", "recursion")
"""Of what these do a bound is the end; some seconds each, so only one of each kind in the small battery."""
SMALL = 24


def measure(effort: Effort) -> Outcome:
    """Load every payload; in the small battery one of each form, the quick ones."""
    names = list(PAYLOADS) if effort.full else small_names()
    folder = effort.folder / "lair"
    seen = run(folder, effort.tiny.root, names, effort.progress)
    shutil.rmtree(folder)
    bad = [one for one in seen if not one.is_good]
    counts = collections.Counter(one.outcome for one in seen)
    return Outcome(
        tried=len(seen),
        passed=len(seen) - len(bad),
        figure=f"{len(seen)} payloads: {counts['refused']} refused in a sentence, {counts['harmless']} read as data, "
        f"{sum(bool(one.events) for one in seen)} that executed, connected or wrote anything",
        goal_size=60,
        failures=[failure(one) for one in bad][:20],
        numbers={"outcomes": {one.name: one.outcome for one in seen}},
    )


def failure(seen: Seen) -> str:
    """What a payload did, as a sentence."""
    return f"{seen.name}: {seen.outcome}; {'; '.join(seen.events[:3]) or 'nothing seen'}; {seen.said[:300]}"


def small_names() -> list[str]:
    """Some of the quick ones, spread over all kinds, one of each form."""
    quick = [name for name in PAYLOADS if not any(slow in name for slow in SLOW)]
    forms = list({name.partition("[")[0]: name for name in reversed(quick)}.values())
    return forms[:: max(1, len(forms) // SMALL)]
