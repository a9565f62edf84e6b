"""Rows one after the other, or a few at a time; each in a process of its own, so that none meets another's leavings."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tiny_world import Tiny
from torture.battery import Effort, Outcome, load_row, measure_row

LONGEST_S = {False: 600.0, True: 4 * 3600.0}
"""Seconds after which a row hangs: small, full."""
QUIET_S = 60.0
"""Seconds between two lines of progress where there is no terminal."""


@dataclass(frozen=True)
class Finished:
    """A row with its outcome."""

    name: str
    title: str
    goal: str
    outcome: Outcome
    seconds: float
    cpu_seconds: float
    """Of the row's process and of all that it has waited for: hardly dependent on how busy the machine is."""

    def is_good(self, *, full: bool) -> bool:
        """Met, and in full if the battery is."""
        return self.outcome.met_in_full() if full else self.outcome.met

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "name": self.name,
            "row": self.title,
            "goal": self.goal,
            "met": self.outcome.met,
            "met_in_full": self.outcome.met_in_full(),
            "seconds": round(self.seconds, 1),
            "cpu_seconds": round(self.cpu_seconds, 1),
            **asdict(self.outcome),
        }

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Finished:
        """The same from what ``to_json`` gave."""
        outcome = Outcome(**{part.name: row[part.name] for part in fields(Outcome)})
        return Finished(row["name"], row["row"], row["goal"], outcome, row["seconds"], row["cpu_seconds"])


@dataclass
class _Row:
    """A row at work in a child, which leads a process group of its own."""

    name: str
    folder: Path
    full: bool
    pid: int
    progress: int
    """Descriptor from which its ``done total`` lines are read."""
    started: float = field(default_factory=time.monotonic)
    done: int = 0
    total: int | None = None
    told: float = field(default_factory=time.monotonic)
    cpu_seconds: float = 0.0

    def look(self) -> None:
        """Read how far it is."""
        try:
            lines = os.read(self.progress, 1 << 16).decode().splitlines()
        except BlockingIOError:
            return
        if lines:
            done, total = lines[-1].split()
            self.done, self.total = int(done), int(total)

    def has_ended(self) -> bool:
        """Whether the child is gone; one that hangs is ended here."""
        if time.monotonic() - self.started > LONGEST_S[self.full]:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            return True
        ended, _, used = os.wait4(self.pid, os.WNOHANG)
        self.cpu_seconds = used.ru_utime + used.ru_stime
        return ended == self.pid

    def take(self) -> Finished:
        """What it has measured; its folder and whatever it left running are gone then."""
        end_group(self.pid)
        os.close(self.progress)
        seconds = time.monotonic() - self.started
        result = self.folder / "outcome.json"
        if result.is_file():
            outcome = Outcome(**json.loads(result.read_text()))
        else:
            said = (self.folder / "output").read_text(errors="replace").strip().splitlines()
            outcome = Outcome(1, 0, "its process died, or hung, without an outcome", 1, failures=said[-12:])
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            row = load_row(self.name)
        except Exception as error:
            return Finished(self.name, self.name, f"unknown: {error}", outcome, seconds, self.cpu_seconds)
        return Finished(self.name, row.NAME, row.GOAL, outcome, seconds, self.cpu_seconds)


def run_rows(
    names: Sequence[str],
    folder: Path,
    tiny: Tiny,
    *,
    full: bool,
    jobs: int,
    console: Console,
    done: Callable[[Finished], object] = lambda row: None,
) -> list[Finished]:
    """Measure rows, ``jobs`` at a time, ``done`` with each as it ends; returns them in the order asked for."""
    waiting, running, finished = list(names), dict[str, _Row](), dict[str, Finished]()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"), TimeElapsedColumn())
    shown: dict[str, Any] = {}
    try:
        with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
            while waiting or running:
                while waiting and len(running) < jobs:
                    name = waiting.pop(0)
                    running[name] = _begin(name, folder / name, tiny, full=full)
                    shown[name] = progress.add_task(name, total=None, count="")
                time.sleep(0.05)
                for name, row in list(running.items()):
                    row.look()
                    count = f"{row.done:,}/{row.total:,}" if row.total else ""
                    progress.update(shown[name], completed=row.done, total=row.total, count=count)
                    if not console.is_terminal and time.monotonic() - row.told > QUIET_S:
                        row.told = time.monotonic()
                        console.print(f"{name}: {count}, {row.told - row.started:.0f} s", highlight=False)
                    if row.has_ended():
                        finished[name] = running.pop(name).take()
                        progress.remove_task(shown[name])
                        verdict = "[green]met[/]" if finished[name].is_good(full=full) else "[red]not met[/]"
                        took = f"{finished[name].seconds:.0f} s"
                        console.print(f"{name}: {verdict}, {took}  ({len(finished)}/{len(names)})", highlight=False)
                        console.print(f"  {escape(finished[name].outcome.figure)}", highlight=False)
                        done(finished[name])
                progress.refresh()
    finally:
        for row in running.values():
            end_group(row.pid)
    return [finished[name] for name in names]


def _begin(name: str, folder: Path, tiny: Tiny, *, full: bool) -> _Row:
    """Fork the child that measures a row."""
    (folder / "work").mkdir(parents=True)
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    sys.stdout.flush()
    child = os.fork()
    if child:
        os.close(writing)
        return _Row(name, folder, full, child, reading)
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)

        def progress(done: int, total: int) -> None:
            os.write(writing, f"{done} {total}\n".encode())

        outcome = measure_row(name, Effort(full, folder / "work", tiny, progress))
        (folder / "outcome.part").write_text(json.dumps(asdict(outcome)))
        (folder / "outcome.part").rename(folder / "outcome.json")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)


def end_group(leader: int) -> None:
    """End what a child has left running in the process group that it leads, itself included."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return
