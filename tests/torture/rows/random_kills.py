"""SIGKILL from outside at a random moment, be it inside a computation or a library, then resume to the end."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from torture.battery import Effort, Outcome
from torture.configs import CASES, config_of
from torture.deaths import KILLED, last_words, live, log_of, torn
from torture.runs import battery_config, fingerprint, fork, start_or_go_on, warm

from rlhf_core.contracts.config import RunConfig

NAME = "random kills"
GOAL = "500 SIGKILLs at random moments, 100 % bit-identical"
SEED = 20261
OTHER = 2
"""Of so many deaths, one is of another configuration than the battery's own, each in turn."""
TRIES = 4
"""A run that ended before its death is tried so often again."""


@dataclass
class Undisturbed:
    """A configuration, what it computes, and how long that takes."""

    config: RunConfig
    fingerprint: str
    seconds: float


@dataclass
class Bench:
    """Makes each configuration's undisturbed run once, and kills others like it."""

    effort: Effort
    dice: random.Random = field(default_factory=lambda: random.Random(SEED))
    _known: dict[str, Undisturbed] = field(default_factory=dict[str, Undisturbed])

    def undisturbed(self, case: str | None) -> Undisturbed:
        """The run that all others of this case must equal; None: the battery's own config."""
        name = case or ""
        if name not in self._known:
            config = config_of(self.effort.tiny, case) if case else battery_config(self.effort.tiny)
            if config.policy.uses_lora and not any(name.startswith("LoRA") for name in self._known):
                warm(config, new_folder(self.effort.folder / "warm"))  # a library more
            run_dir = self.effort.folder / f"whole{len(self._known)}"
            started = time.monotonic()
            if live(config, run_dir, run_dir.with_suffix(".ledger")):
                raise RuntimeError(f"{name}: the undisturbed run failed: {last_words(run_dir)}")
            seconds = time.monotonic() - started
            self._known[name] = Undisturbed(config, fingerprint(run_dir), seconds)
            shutil.rmtree(run_dir)
        return self._known[name]

    def case_of(self, number: int) -> str | None:
        """Every OTHER-th one is of another configuration, each in turn."""
        names = list(CASES)
        return names[number // OTHER % len(names)] if number % OTHER == OTHER - 1 else None

    def kill(self, whole: Undisturbed, run_dir: Path, share: float) -> int:
        """Start or resume, and kill after a random time below ``share`` of a whole run; returns how it ended."""
        child = fork(lambda: start_or_go_on(whole.config, run_dir), log=log_of(run_dir))
        time.sleep(self.dice.uniform(0, share * whole.seconds))
        os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def chain(self, whole: Undisturbed, run_dir: Path, kills: int, share: float) -> list[str]:
        """Kill so many times in a row, then resume to the end. Returns whatever is wrong."""
        problems: list[str] = []
        ends: list[int] = []
        for _ in range(TRIES):
            ends = [self.kill(whole, run_dir, share)]
            while ends[-1] == KILLED and len(ends) < kills:
                problems += torn(run_dir)
                ends.append(self.kill(whole, run_dir, share))
            if ends[-1] != 0:
                break
            shutil.rmtree(run_dir)  # it was faster: once more, and earlier
            share /= 2
        if ends != [KILLED] * kills:
            return [f"a killed run or its resume failed (exits {ends}): {last_words(run_dir)}"]
        problems += torn(run_dir)
        if live(whole.config, run_dir, run_dir.with_suffix(".ledger")):
            return [*problems, f"the resume failed: {last_words(run_dir)}"]
        if fingerprint(run_dir) != whole.fingerprint:
            problems.append("another result than that of the undisturbed run")
        shutil.rmtree(run_dir)
        run_dir.with_suffix(".ledger").unlink()
        return problems


def new_folder(path: Path) -> Path:
    """An empty folder."""
    path.mkdir()
    return path


def measure(effort: Effort) -> Outcome:
    """Half of the deaths are of the battery's config, the other half of each other one in turn."""
    tries = effort.size(6, 500)
    failures, cases = kill_and_compare(effort, tries, kills=1, share=1.0)
    return Outcome(
        tried=tries,
        passed=tries - len(failures),
        figure=f"{tries - len(failures):,} of {tries:,} killed runs bit-identical, of {cases} configurations",
        goal_size=500,
        failures=failures[:20],
        numbers={"configurations": cases},
    )


def kill_and_compare(effort: Effort, tries: int, *, kills: int, share: float) -> tuple[list[str], int]:
    """Failures, one for each run at most, and how many configurations were tried."""
    bench = Bench(effort)
    failures: list[str] = []
    tried: set[str | None] = set()
    for number in range(tries):
        case = bench.case_of(number)
        tried.add(case)
        problems = bench.chain(bench.undisturbed(case), effort.folder / f"{number}", kills, share)
        failures += [f"run {number} ({case or 'the battery’s config'}): {problem}" for problem in problems[:1]]
        effort.progress(number + 1, tries)
    return failures, len(tried)
