"""Bugs planted on purpose: each must make the row that is responsible for it fail; see ``planted.py``.

A row that cannot fail proves nothing. Each mutant lives in a forked child, which measures that row at its small size;
the same rows are measured without any bug too, and must then be met.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace

from torture.battery import Effort, Outcome, measure_row
from torture.planted import MUTANTS
from torture.runs import in_child

from rlhf_core.contracts.config_io import canonical_json

NAME = "planted bugs"
GOAL = "12/12 caught"
WANTED = 12
QUICK = ("no fsync of a folder", "digests of artifacts are not compared")
"""Those of the test command."""
BROKEN = ("the child failed", "it raised")
"""A row that does not come to its end has not noticed a bug: it has one."""


def measure(effort: Effort) -> Outcome:
    """Plant, measure, and look whether the row has noticed."""
    mutants = [m for m in MUTANTS if effort.full or m.bug in QUICK]
    rows = sorted({(mutant.row, mutant.healthy) for mutant in mutants}, key=str)
    failures: list[str] = []
    noticed: dict[str, str] = {}
    for number, (row, healthy) in enumerate(rows):
        effort.progress(number, len(rows) + len(mutants))
        outcome = _measure(row, effort, healthy)
        if not outcome.met:
            failures.append(f"{row} is not met without any bug either: {_first(outcome)}")
    for number, mutant in enumerate(mutants):
        effort.progress(len(rows) + number, len(rows) + len(mutants))
        outcome = _measure(mutant.row, effort, mutant.plant)
        if outcome.met:
            failures.append(f"{mutant.row} has not noticed: {mutant.bug}")
        elif outcome.figure.startswith(BROKEN):
            failures.append(f"{mutant.row} says nothing of: {mutant.bug}: {_first(outcome)}")
        else:
            noticed[mutant.bug] = f"{mutant.row}: {_first(outcome)}"[:300]
    tried = len(mutants) + len(rows)
    return Outcome(
        tried=tried,
        passed=tried - len(failures),
        figure=f"{len(noticed)}/{len(mutants)} caught, by {len({m.row for m in mutants})} rows at their small size"
        f"{'' if failures else ', all met without a bug'}",
        goal_size=WANTED,
        failures=failures,
        numbers={"noticed": noticed},
    )


def _measure(row: str, effort: Effort, plant: Callable[[], None]) -> Outcome:
    """A row's small outcome in a child with a bug."""
    folder, answer = effort.folder / row, effort.folder / "answer.json"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    answer.unlink(missing_ok=True)

    def work() -> None:
        plant()
        outcome = measure_row(row, replace(effort, full=False, folder=folder, progress=lambda done, total: None))
        answer.write_bytes(canonical_json(asdict(outcome)))

    status = in_child(work, log=effort.folder / "log")
    if not answer.is_file():
        reason = (effort.folder / "log").read_text() if status == 1 else f"ended with {status}"
        return Outcome(1, 0, f"{BROKEN[0]}: {reason}", goal_size=1, failures=reason.splitlines()[-1:])
    return Outcome(**json.loads(answer.read_text()))


def _first(outcome: Outcome) -> str:
    return outcome.failures[0] if outcome.failures else outcome.not_run or outcome.figure
