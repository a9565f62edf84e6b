"""SIGKILL at each operation that changes the disk, just before it and just after it, then resume to the end."""

from __future__ import annotations

import itertools
import random
import shutil
from pathlib import Path
from typing import Any

from torture.battery import Effort, Outcome
from torture.deaths import (
    KILLED,
    count_operations,
    done_again,
    inodes,
    last_words,
    live,
    lost,
    promises,
    torn,
)
from torture.runs import battery_config, fingerprint

from rlhf_core.contracts.config import RunConfig

NAME = "kill -9 at every durable operation"
GOAL = "≥ 1,500 deaths, before and after, 3 seeds: 100 % bit-identical, 0 lost, 0 torn"
SEEDS = (7, 8, 9)
ARCHIVED = 8
"""The run of this seed puts its old iterations into the archive."""
SMALL = 9
"""Deaths of the small row."""
AGAIN = 4
"""Of so many cases, one has its resume killed, too."""


def measure(effort: Effort) -> Outcome:
    """Each death is a process; each resume another one, with nothing remembered."""
    seeds = SEEDS if effort.full else (ARCHIVED,)
    deaths = tried = 0
    operations: dict[str, int] = {}
    failures: list[str] = []
    for number, seed in enumerate(seeds):
        changes: dict[str, Any] = {"artifacts": {"keep_iterations": 1}} if seed == ARCHIVED else {}
        config = battery_config(effort.tiny, {"seed": seed} | changes)
        whole = effort.folder / f"whole-{seed}"
        operations[str(seed)] = count = count_operations(config, whole, effort.folder / "ledger-of-whole")
        expected = fingerprint(whole)
        cases = list(itertools.product(range(1, count + 1), (False, True)))
        if not effort.full:
            cases = [cases[len(cases) * i // SMALL] for i in range(SMALL)]
        for done, (at, after) in enumerate(cases):
            died, problems = _die_and_resume(config, effort.folder / f"{seed}-{at}-{after}", at, expected, after=after)
            deaths, tried = deaths + died, tried + 1
            when = f"seed {seed}, killed {'after' if after else 'before'} operation {at} of {count}"
            failures += [f"{when}: {problem}" for problem in problems[:1]]
            effort.progress(number * len(cases) + done + 1, len(seeds) * len(cases))
    counts = {kind: sum(f": {kind}" in failure for failure in failures) for kind in ("lost", "torn")}
    return Outcome(
        tried=tried,
        passed=tried - len(failures),
        figure=f"{deaths:,} deaths at {sum(operations.values()):,} operations ({len(seeds)} seeds): "
        f"{tried - len(failures):,} of {tried:,} bit-identical, {counts['lost']} lost, {counts['torn']} torn",
        goal_size=1500,
        failures=failures[:20],
        numbers={"deaths": deaths, "operations": operations},
    )


def _die_and_resume(config: RunConfig, run_dir: Path, at: int, expected: str, *, after: bool) -> tuple[int, list[str]]:
    """How often it died, and whatever is wrong."""
    ledger = run_dir.with_suffix(".ledger")
    ends = [live(config, run_dir, ledger, at, after=after)]
    problems = _look(run_dir, ledger)
    first = inodes(promises(ledger))
    dice = random.Random(f"{config.seed} {at} {after}")
    if at % AGAIN == 0:
        ends.append(live(config, run_dir, ledger, dice.randint(1, 60), after=after))
        problems += _look(run_dir, ledger)
    ends.append(live(config, run_dir, ledger))
    problems += _look(run_dir, ledger) + done_again(first)
    if ends[0] != KILLED:
        problems.append(f"it did not die: exit {ends[0]}: {last_words(run_dir)}")
    elif 1 in ends or ends[-1] != 0:
        problems.append(f"the resume failed: {last_words(run_dir)}")
    elif fingerprint(run_dir) != expected:
        problems.append("another result than that of the undisturbed run")
    deaths = sum(end == KILLED for end in ends)
    shutil.rmtree(run_dir, ignore_errors=True)
    for path in run_dir.parent.glob(f"{run_dir.name}.*"):
        path.unlink()
    return deaths, problems


def _look(run_dir: Path, ledger: Path) -> list[str]:
    return lost(promises(ledger)) + torn(run_dir)
