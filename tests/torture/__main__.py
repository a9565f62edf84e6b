"""The battery: every row of it, its goal, and the figure reached.

    python -m torture [--only NAME ...] [--json FILE] [--again] [--small] [--jobs N]

Exit code 0 only if every row is met in full (with ``--small``: is met).
"""

# ruff: noqa: E402 - the environment stands above the imports that read it
from __future__ import annotations

from environment import be_quiet_and_private

be_quiet_and_private()

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tiny_world import Tiny, make_tiny, tiny_in
from torture.battery import ROWS, Outcome, unlisted_rows
from torture.report import code_digest, report, still_valid
from torture.running import Finished, run_rows
from torture.runs import battery_config, in_child, warm

ROOM_NEEDED = 4 * 2**30
"""Bytes that the battery wants free where it works."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows asked for; returns the exit code."""
    asked = _parsed(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log is read in an editor
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="rlhf-torture-", dir=asked.folder or _room()))
    code = code_digest()
    finished = [] if asked.again else still_valid(asked.json, small=asked.small, code=code)
    asked.only = [name for name in asked.only if name not in {row.name for row in finished}]
    for row in finished:
        console.print(f"{row.name}: met earlier on this code, {row.seconds:.0f} s; --again measures it again")

    def keep(row: Finished) -> None:
        """A battery that is stopped has kept the rows that were done."""
        finished.append(row)
        if asked.json:
            asked.json.write_text(json.dumps(report(finished, small=asked.small, code=code), indent=2) + "\n")

    is_whole = False
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if asked.only:
            run_rows(
                asked.only, folder, _prepare(folder), full=not asked.small, jobs=asked.jobs, console=console, done=keep
            )
        is_whole = True
    except KeyboardInterrupt:
        console.print("[yellow]stopped[/]; the same command goes on with the rows that are left")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    good = all(row.is_good(full=not asked.small) for row in finished)
    finished.sort(key=lambda row: ROWS.index(row.name))
    console.print(_table(finished, full=not asked.small))
    for row in finished:
        for failure in row.outcome.failures:
            console.print(f"[red]{row.name}[/]: {escape(failure)}", highlight=False)
        if row.outcome.not_run:
            console.print(f"[yellow]{row.name}[/], not run: {escape(row.outcome.not_run)}", highlight=False)
    return (0 if good else 1) if is_whole else 130


def _parsed(arguments: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(prog="python -m torture", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=ROWS, default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table and its numbers there, too")
    parser.add_argument("--again", action="store_true", help="also the rows that FILE has met on this code")
    parser.add_argument("--small", action="store_true", help="a small size of each row: minutes, not hours")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    parser.add_argument("--folder", type=Path, help="where to work; default: memory if there is room, else a disk")
    asked = parser.parse_args(arguments)
    if unlisted := unlisted_rows():
        parser.error(f"add to ROWS in tests/torture/battery.py, or remove: {', '.join(unlisted)}")
    return asked


def _room() -> str | None:
    """A file system in memory, if there is one with room; None for the usual temporary folder."""
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > ROOM_NEEDED
    return str(memory) if has_room else None


def _prepare(folder: Path) -> Tiny:
    """The tiny world, made by a child since that starts threads; and everything imported that a run needs."""
    (folder / "tiny").mkdir()
    (folder / "warm").mkdir()
    log = folder / "tiny.log"
    if in_child(lambda: make_tiny(folder / "tiny"), log=log):
        raise RuntimeError(f"the tiny world could not be made:\n{log.read_text()}")
    tiny = tiny_in(folder / "tiny")
    warm(battery_config(tiny), folder / "warm")
    return tiny


def _table(finished: Sequence[Finished], *, full: bool) -> Table:
    table = Table(title="the battery" if full else "the battery, small", title_justify="left", show_lines=True)
    for column in ("row", "goal", "figure"):
        table.add_column(column, overflow="fold")
    table.add_column("met", justify="center")
    table.add_column("time", justify="right")
    for row in finished:
        verdict = "[green]yes[/]" if row.is_good(full=full) else f"[red]{_shortfall(row.outcome)}[/]"
        minutes, seconds = divmod(round(row.seconds), 60)
        cells = (row.title, row.goal, row.outcome.figure)
        table.add_row(*(escape(cell) for cell in cells), verdict, f"{minutes}:{seconds:02d}")
    return table


def _shortfall(outcome: Outcome) -> str:
    if outcome.passed < outcome.tried:
        return f"{outcome.passed:,} of {outcome.tried:,}"
    return "not all run" if outcome.not_run else f"{outcome.tried:,} of {outcome.goal_size:,} tried"


if __name__ == "__main__":
    sys.exit(main())
