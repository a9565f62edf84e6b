"""SIGKILL while MLflow's sqlite store is made, by us and by MLflow itself: the runs beside it are tracked anyway."""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from torture.battery import Effort, Outcome
from torture.runs import fork, in_child

NAME = "kill -9 while MLflow makes its store"
GOAL = "at random moments, of our own making and of MLflow's: the store works, nothing is deleted"
KILLS = 12
"""Of each of the two makers, in the full row."""
LONGEST_S = 120.0


def measure(effort: Effort) -> Outcome:
    """Each killed maker is a process, and so are the two that use the store after it, at the same time."""
    importlib.import_module("mlflow.tracking")
    makers: dict[str, Callable[[Path], None]] = {"ours": _by_us, "MLflow's": _by_mlflow}
    random_, failures, tried, aside = random.Random(7), list[str](), 0, 0
    if in_child(lambda: _by_us(effort.folder / "whole"), log=effort.folder / "log"):
        raise RuntimeError((effort.folder / "log").read_text())
    final, wanted = (effort.folder / "whole" / "mlflow.db").stat().st_size, effort.size(1, KILLS)
    for maker, make in makers.items():
        for number in range(wanted):
            folder = effort.folder / f"{len(maker)}-{number}"
            folder.mkdir()
            child = fork(lambda make=make, folder=folder: make(folder))
            _wait_for(folder, final * random_.uniform(0.01, 0.9), random_.uniform(0, 0.2))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            problem = _problem(folder, effort.folder / "log")
            failures += [f"{maker} store, kill {number}: {problem}"] * bool(problem)
            aside += len(list(folder.glob("mlflow.db.broken-*")))
            tried += 1
            effort.progress(tried, 2 * wanted)
    return Outcome(
        tried=tried,
        passed=tried - len(failures),
        figure=f"{tried} kills while a store is made: {tried - len(failures)} stores work for two "
        f"processes at once; {aside} half-made ones put aside",
        goal_size=2 * KILLS,
        failures=failures[:10],
        numbers={"put_aside": aside},
    )


def _wait_for(folder: Path, size: float, then_s: float) -> None:
    """Until the store that is being made has grown so large, and a little longer."""
    deadline = time.monotonic() + LONGEST_S
    while time.monotonic() < deadline:
        names = [*folder.glob("mlflow.db"), *folder.glob(".mlflow.db.new-*")]
        with contextlib.suppress(FileNotFoundError):
            if any(path.stat().st_size >= size for path in names):
                break
        time.sleep(0.005)
    time.sleep(then_s)


def _by_us(folder: Path) -> None:
    from tasks.tracking import sqlite_store
    from tasks.tracking.outbox import store_lock
    from tasks.tracking.tracker import _make_store

    folder.mkdir(exist_ok=True)
    sqlite_store.QUIET_S = 0.5
    with store_lock(f"sqlite:///{folder}/mlflow.db"):
        sqlite_store.make_ready(folder / "mlflow.db", _make_store)


def _by_mlflow(folder: Path) -> None:
    from mlflow.tracking import MlflowClient

    MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()


def _use(folder: Path, name: str) -> None:
    from mlflow.tracking import MlflowClient

    _by_us(folder)
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    run = client.create_run(client.create_experiment(name))
    client.log_metric(run.info.run_id, "score", 1.0)


def _problem(folder: Path, log: Path) -> str:
    """What is wrong after a kill, in a sentence; empty if nothing is."""
    there = folder / "mlflow.db"
    before = there.stat().st_size if there.is_file() else 0
    users = [fork(lambda name=name: _use(folder, name), log=log) for name in ("one", "two")]
    ends = [os.waitstatus_to_exitcode(os.waitpid(user, 0)[1]) for user in users]
    if any(ends):
        return f"it cannot be used: {log.read_text().strip().splitlines()[-1]}"
    kept = [path.stat().st_size for path in folder.iterdir() if path.name.startswith("mlflow.db")]
    return "" if max(kept) >= before else "what was there has been deleted"
