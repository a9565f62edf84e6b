"""SIGKILL at each operation of the compactions of old iterations, just before it and just after it, then resume."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torture.battery import Effort, Outcome
from torture.deaths import KILLED, MortalDisk, last_words, live, log_of, lost, promises, torn
from torture.runs import battery_config, fingerprint, in_child, start

from rlhf_core.contracts.archive import segment_paths
from rlhf_core.contracts.compaction import check_segment, loose_iterations
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.durable import is_leftover, using_disk
from tasks.lifecycle import retention

NAME = "kill -9 in a compaction"
GOAL = "at each of its operations, before and after: 100 % bit-identical to a run that compacts nothing, 0 lost"
ITERATIONS = 4
SMALL = 4
"""Deaths of the small row."""


def measure(effort: Effort) -> Outcome:
    """Each death is a process; the resume is another one, with nothing remembered."""
    changes: dict[str, Any] = {"num_iterations": ITERATIONS}
    if in_child(lambda: start(battery_config(effort.tiny, changes), effort.folder / "loose")):
        raise RuntimeError("the run without compaction failed")
    expected = fingerprint(effort.folder / "loose")
    config = battery_config(effort.tiny, changes | {"artifacts": {"keep_iterations": 1}})
    whole = effort.folder / "whole"
    operations = _operations(config, whole)
    failures = [f"nobody was killed: {problem}" for problem in _problems(whole, expected)]
    cases = list(itertools.product(operations, (False, True)))
    if not effort.full:
        cases = [cases[len(cases) * (2 * i + 1) // (2 * SMALL)] for i in range(SMALL)]
    tried = 0
    for at, after in cases:
        problems = _die_and_resume(config, effort.folder / f"{at}-{after}", at, expected, after=after)
        when = f"killed {'after' if after else 'before'} operation {at}"
        failures += [f"{when}: {problem}" for problem in problems[:1]]
        tried += 1
        effort.progress(tried, len(cases))
    passed = tried - len(failures)
    return Outcome(
        tried=tried,
        passed=max(0, passed),
        figure=f"{tried:,} deaths at the {len(operations):,} operations of {ITERATIONS - 2} compactions: "
        f"{passed:,} bit-identical",
        goal_size=2 * len(operations),
        failures=failures[:20],
        numbers={"operations": len(operations)},
    )


def _operations(config: RunConfig, run_dir: Path) -> list[int]:
    """Make a whole run; returns the numbers of the operations that its compactions did."""
    counted = run_dir.with_suffix(".count")

    def work() -> None:
        disk = MortalDisk(run_dir.with_suffix(".ledger"))
        found: list[int] = []
        compact: Any = retention.compact
        done: Callable[..., list[str]] = compact.fn

        def watched(*arguments: Any) -> list[str]:
            begin = disk.count + 1
            told = done(*arguments)
            found.extend(range(begin, disk.count + 1))
            return told

        compact.fn = watched
        with using_disk(disk):
            start(config, run_dir)
        counted.write_text(json.dumps(found))

    if in_child(work, log=log_of(run_dir)):
        raise RuntimeError(log_of(run_dir).read_text())
    return json.loads(counted.read_text())


def _die_and_resume(config: RunConfig, run_dir: Path, at: int, expected: str, *, after: bool) -> list[str]:
    """Whatever is wrong."""
    ledger = run_dir.with_suffix(".ledger")
    died = live(config, run_dir, ledger, at, after=after)
    problems = _unread(run_dir) + lost(promises(ledger)) + torn(run_dir)
    if died != KILLED:
        problems.append(f"it did not die: exit {died}: {last_words(run_dir)}")
    elif live(config, run_dir, ledger):
        problems.append(f"the resume failed: {last_words(run_dir)}")
    else:
        problems += lost(promises(ledger)) + _problems(run_dir, expected)
    shutil.rmtree(run_dir, ignore_errors=True)
    for path in run_dir.parent.glob(f"{run_dir.name}.*"):
        path.unlink()
    return problems


def _problems(run_dir: Path, expected: str) -> list[str]:
    """What is wrong with a finished run."""
    problems = _unread(run_dir)
    if fingerprint(run_dir) != expected:
        problems.append("another result than that of the run without compaction")
    if loose_iterations(run_dir) != [ITERATIONS - 2, ITERATIONS - 1]:
        problems.append(f"loose at the end: {loose_iterations(run_dir)}")
    problems += [f"left over: {path.name}" for path in run_dir.rglob(".*") if is_leftover(path)]
    return problems


def _unread(run_dir: Path) -> list[str]:
    """What the archive cannot give back."""
    return [damage.sentence for _, _, path in segment_paths(run_dir) for damage in check_segment(path)]
