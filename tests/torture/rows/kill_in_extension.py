"""SIGKILL at each operation of a finished run that goes on to more iterations, then the same command again."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

from torture.battery import Effort, Outcome
from torture.deaths import KILLED, MortalDisk, last_words, log_of, lost, promises, torn
from torture.runs import battery_config, fingerprint, go_on, in_child, start

from flows.calling import without_prefect
from flows.ppo import iterate
from rlhf_core.contracts.durable import using_disk
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.verification.run import verify_run
from tasks.lifecycle.extension import extend_run
from tasks.lifecycle.start import check_resumable
from tasks.session.session import open_session

NAME = "kill -9 in an extension"
GOAL = "a finished run goes on to more iterations: at each operation, before and after, 100 % bit-identical, 0 lost"
BEFORE, AFTER = 2, 4
SMALL = 4
"""Deaths of the small row."""


def measure(effort: Effort) -> Outcome:
    """Each death is a process. The next one gives the same command, or, every second time, a plain resume."""
    schedule = {"lr_schedule": "linear", "learning_rate": 1e-3, "num_ppo_epochs": 2, "num_minibatches": 2}
    config = battery_config(effort.tiny, {"num_iterations": BEFORE, "ppo": schedule})
    ended, whole = effort.folder / "ended", effort.folder / "whole"
    if in_child(lambda: start(config, ended), log=log_of(ended)):
        raise RuntimeError(last_words(ended))
    shutil.copytree(ended, whole, symlinks=True)
    counted = whole.with_suffix(".count")
    if _extend(whole, counted=counted):
        raise RuntimeError(last_words(whole))
    expected, operations = fingerprint(whole), int(counted.read_text())
    cases = list(itertools.product(range(1, operations + 1), (False, True)))
    if not effort.full:
        cases = [cases[len(cases) * (2 * i + 1) // (2 * SMALL)] for i in range(SMALL)]
        cases[0] = (3, True)  # about run.json itself
    failures: list[str] = []
    for tried, (at, after) in enumerate(cases, 1):
        run_dir = effort.folder / f"{at}-{after}"
        shutil.copytree(ended, run_dir, symlinks=True)
        problems = _die_and_resume(run_dir, at, expected, after=after)
        when = f"killed {'after' if after else 'before'} operation {at}"
        failures += [f"{when}: {problem}" for problem in problems[:1]]
        shutil.rmtree(run_dir, ignore_errors=True)
        effort.progress(tried, len(cases))
    passed = len(cases) - len(failures)
    return Outcome(
        tried=len(cases),
        passed=passed,
        figure=f"{len(cases):,} deaths at the {operations:,} operations of an extension from {BEFORE} to {AFTER} "
        f"iterations: {passed:,} bit-identical",
        goal_size=2 * operations,
        failures=failures[:20],
        numbers={"operations": operations},
    )


def _extend(run_dir: Path, at: int | None = None, *, after: bool = False, counted: Path | None = None) -> int:
    """What ``rlhf resume RUN --iterations`` does, in a child. Returns: its exit code."""

    def work() -> None:
        disk = MortalDisk(run_dir.with_suffix(".ledger"), at, after=after)
        open_session.cache_clear()
        with using_disk(disk), without_prefect():
            check_resumable(str(run_dir), accept_drift=False)
            extend_run(str(run_dir), AFTER)
            iterate(str(run_dir))
        if counted is not None:
            counted.write_text(str(disk.count))

    return in_child(work, log=log_of(run_dir))


def _die_and_resume(run_dir: Path, at: int, expected: str, *, after: bool) -> list[str]:
    """Whatever is wrong."""
    died = _extend(run_dir, at, after=after)
    if died != KILLED:
        return [f"it did not die: exit {died}: {last_words(run_dir)}"]
    problems = lost(promises(run_dir.with_suffix(".ledger"))) + torn(run_dir)
    is_recorded = bool(RunFolder.open(run_dir).extensions)
    is_plain = is_recorded and at % 2
    if in_child(lambda: go_on(run_dir), log=log_of(run_dir)) if is_plain else _extend(run_dir):
        return [*problems, f"the resume failed: {last_words(run_dir)}"]
    if fingerprint(run_dir) != expected:
        problems.append("another result than that of the extension that nobody killed")
    if len(RunFolder.open(run_dir).extensions) != 1:
        problems.append("it is not recorded once")
    return problems + [f"{f.path}: {f.problem}" for f in verify_run(run_dir).findings]
