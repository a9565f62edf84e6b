"""Two or eight processes on one folder: one works, the others are refused at once, and a kill frees the folder.

Most races are between bare holders of the lock, which cost no training; a share is between real starts and resumes.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torture.battery import Effort, Outcome
from torture.deaths import KILLED, live
from torture.runs import battery_config, fork, go_on, start

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.durable import Disk, using_disk
from rlhf_core.contracts.errors import RunLockedError, UserError
from rlhf_core.contracts.run_folder import RunFolder

NAME = "2 or 8 runs on one folder"
GOAL = "1,000 races, one winner each, the others refused within a second, the folder free within a second of a kill"
AT_ONCE_S = 1.0
PATIENCE_S = 120.0
"""How long a race may take on a busy machine before it counts as hanging."""
ENOUGH = 20
"""Failures after which no more races are run."""
DIE_AT = "000001/04_ref_logprobs.json"
REAL = 25
"""Of so many races, one is between real starts, one between real resumes."""


@dataclass(frozen=True)
class Racer:
    """What one process says of its race."""

    pid: int
    won: bool
    seconds: float
    """From asking for the folder to the answer."""
    said: str
    """The refusal."""


class WaitingDisk(Disk):
    """Says that its process works on the run, then waits there to be killed."""

    def __init__(self, at_work: Callable[[], None]) -> None:
        self.at_work = at_work

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        if target.name.startswith("01_") or target.parent.name == "000001":
            self.at_work()


def measure(effort: Effort) -> Outcome:
    """Races of bare locks, of RunFolder.create, of real starts and of real resumes, with 2 and 8 processes in turn."""
    races = effort.size(24, 1000)
    config = battery_config(effort.tiny)
    stopped = effort.folder / "stopped"
    if live(config, stopped, effort.folder / "ledger", DIE_AT) != KILLED:
        raise RuntimeError("the run that the others fight for did not come about")
    failures: list[str] = []
    slowest = freed = 0.0
    kinds: dict[str, int] = {}
    for number, kind in enumerate(itertools.islice(_kinds(), races)):
        if len(failures) == ENOUGH:
            races = number
            break
        kinds[kind] = kinds.get(kind, 0) + 1
        run_dir = effort.folder / "arena"
        if kind in ("lock", "resume"):
            shutil.copytree(stopped, run_dir)
        racers, seconds_to_free = _race(kind, config, run_dir, 8 if number % 2 else 2, effort.folder / "said")
        slowest = max([slowest, *(r.seconds for r in racers if not r.won)])
        freed = max(freed, seconds_to_free)
        problems = _problems(racers, 8 if number % 2 else 2, seconds_to_free)
        failures += [f"race {number}, {kind}: {problem}" for problem in problems[:1]]
        shutil.rmtree(run_dir)
        effort.progress(number + 1, races)
    return Outcome(
        tried=races,
        passed=races - len(failures),
        figure=f"{races - len(failures):,} of {races:,} races with one winner, refusals within {slowest:.2f} s, "
        f"free within {freed:.2f} s of a kill",
        goal_size=1000,
        failures=failures,
        numbers={"kinds": kinds, "slowest_refusal_s": slowest, "slowest_release_s": freed},
    )


def _kinds() -> Iterator[str]:
    """lock, create, lock, create, ... with a real start and a real resume now and then."""
    for number in itertools.count():
        real = {1: "start", 2: "resume"}.get(number % REAL)
        yield real or ("create" if number // 2 % 2 else "lock")


def _race(kind: str, config: RunConfig, run_dir: Path, racers: int, said: Path) -> tuple[list[Racer], float]:
    """Let processes go for one folder at the same moment.

    Returns: what each said, and after how many seconds the folder of the killed winner could be locked.
    """
    said.mkdir()
    gate, opened = os.pipe()
    children = [fork(lambda i=i: _run_for_it(kind, config, run_dir, gate, said / f"{i}")) for i in range(racers)]
    os.close(gate)
    os.write(opened, b"!" * racers)
    os.close(opened)
    deadline = time.monotonic() + PATIENCE_S
    while len(list(said.glob("*.json"))) < racers and time.monotonic() < deadline:
        time.sleep(0.002)
    for child in children:
        os.kill(child, signal.SIGKILL)
    killed = time.monotonic()
    while not _is_free(run_dir) and time.monotonic() < killed + 3 * AT_ONCE_S:
        time.sleep(0.001)
    freed = time.monotonic() - killed
    for child in children:
        os.waitpid(child, 0)
    answers = [Racer(**json.loads(path.read_text())) for path in said.glob("*.json")]
    shutil.rmtree(said)
    return answers, freed


def _is_free(run_dir: Path) -> bool:
    try:
        with RunFolder(run_dir, _no_config(), {}).locked():
            return True
    except RunLockedError:
        return False


def _no_config() -> RunConfig:
    return RunConfig.model_construct()


def _run_for_it(kind: str, config: RunConfig, run_dir: Path, gate: int, said: Path) -> None:
    """Wait for the gate, go for the folder, say how it went; the winner then waits to be killed."""
    os.read(gate, 1)
    began: list[float] = [time.monotonic(), time.process_time()]
    real = kind in ("start", "resume")

    def tell(*, won: bool, text: str = "") -> None:
        # A real start first reads models and prompts: what counts is what it works, not how busy the machine is.
        seconds = time.process_time() - began[1] if real else time.monotonic() - began[0]
        values = {"pid": os.getpid(), "won": won, "seconds": seconds, "said": text}
        said.with_suffix(".part").write_text(json.dumps(values))
        said.with_suffix(".part").rename(said.with_suffix(".json"))

    def at_work() -> None:
        tell(won=True)
        while True:
            signal.pause()

    contest: dict[str, Callable[[], Any]] = {
        "lock": lambda: _hold(RunFolder.open(run_dir), at_work),
        "create": lambda: _hold(RunFolder.create(run_dir, config, {"num_threads": 1}), at_work),
        "start": lambda: start(config, run_dir),
        "resume": lambda: go_on(run_dir),
    }
    try:
        with using_disk(WaitingDisk(at_work) if real else Disk()):
            contest[kind]()
    except (RunLockedError, UserError) as error:
        tell(won=False, text=f"{type(error).__name__}: {error}")
    except BaseException as error:
        tell(won=False, text=f"unexpected {type(error).__name__}: {error}")


def _hold(run: RunFolder, at_work: Callable[[], None]) -> None:
    with run.locked():
        at_work()


def _problems(racers: list[Racer], expected: int, seconds_to_free: float) -> list[str]:
    problems: list[str] = []
    winners, losers = [r for r in racers if r.won], [r for r in racers if not r.won]
    if len(winners) != 1:
        problems.append(f"{len(winners)} winners of {expected}")
    if len(racers) != expected:
        problems.append(f"{expected - len(racers)} of {expected} had no answer")
    problems += [f"a refusal took {r.seconds:.1f} s" for r in losers if r.seconds > AT_ONCE_S]
    problems += [r.said for r in losers if not r.said.startswith(("RunLockedError: ", "UserError: "))]
    if seconds_to_free > AT_ONCE_S:
        problems.append(f"the lock was free only {seconds_to_free:.1f} s after the kill")
    return problems
