"""The benchmarks: every table of the suite, its goals, and the figures reached.

    python -m benchmarks [--only NAME ...] [--assets DIR] [--json FILE] [--small] [--rounds N]

Run alone on a quiet machine. Exit code 0 unless a table fails, or a goal that could be judged is not met; with --small
goals do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.suite import TABLES, Effort, Result, load_table, measure_table, unlisted_tables
from benchmarks.world import World, default_world
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the tables asked for; returns the exit code."""
    asked = _parsed(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log is read in an editor
    folder = Path(tempfile.mkdtemp(prefix="rlhf-benchmarks-", dir=asked.folder))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    report: dict[str, Any] = {"machine": _machine(asked.threads), "small": asked.small, "rounds": asked.rounds}
    report |= {"tables": {}, "is_whole": False}
    try:
        world = World(asked.assets.resolve(), is_given=True) if asked.assets else _built(console, folder, asked)
        report["world"] = world.root.name if world.is_given else "tiny" if asked.small else "text world"
        for name in [name for name in TABLES if name in asked.only]:
            started = time.monotonic()
            result = _measure(name, world, folder / name, asked, console)
            told = {"name": load_table(name).NAME, "goal": load_table(name).GOAL, "seconds": time.monotonic() - started}
            report["tables"][name] = told | result.to_json()
            _keep(asked.json, report)  # a suite that is stopped has kept the tables that were done
            _show(console, name + " (small: figures say nothing)" * asked.small, result)
        report["is_whole"] = True
        _keep(asked.json, report)
    except KeyboardInterrupt:
        console.print(f"[yellow]stopped[/] after {len(report['tables'])} of {len(asked.only)} tables")
        return 130
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if any(_is_bad(table, small=asked.small) for table in report["tables"].values()) else 0


def _is_bad(table: Mapping[str, Any], *, small: bool) -> bool:
    return bool(table["failure"]) or (table["met"] is False and not small)


def _parsed(arguments: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=TABLES, default=list(TABLES), help=", ".join(TABLES)
    )
    parser.add_argument(
        "--assets",
        type=Path,
        metavar="DIR",
        help="holds policy/, reward/ and prompts.jsonl; default: the quickstart's text world, built if need be, "
        "with --small the tests' tiny world. Figures of another world are not comparable",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and raw numbers there, table by table")
    parser.add_argument("--small", action="store_true", help="tiny sizes: shows that it runs; figures say nothing")
    parser.add_argument("--rounds", type=int, help="how often each side is measured; default: 3, with --small 1")
    parser.add_argument("--threads", type=int, help="of each measured process; default: OMP_NUM_THREADS, or all cores")
    parser.add_argument("--threshold", type=float, default=3.0, help="mean score that `quality` runs for")
    parser.add_argument("--folder", type=Path, help="where to work: on the disk that shall be measured")
    asked = parser.parse_args(arguments)
    if unlisted := unlisted_tables():
        parser.error(f"add to TABLES in tests/benchmarks/suite.py, or remove: {', '.join(unlisted)}")
    if asked.assets and (missing := World(asked.assets).missing()):
        parser.error(f"--assets {asked.assets} has no {', '.join(missing)}")
    asked.rounds = asked.rounds or (1 if asked.small else 3)
    asked.threads = asked.threads or int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    return asked


def _built(console: Console, folder: Path, asked: Any) -> World:
    with console.status("building the world"):
        return default_world(folder / "world", small=asked.small)


def _measure(name: str, world: World, folder: Path, asked: Any, console: Console) -> Result:
    folder.mkdir()
    table = load_table(name)
    console.rule(f"[bold]{name}[/]: {table.NAME}", align="left")

    def say(line: str) -> None:
        console.print(f"  {escape(line)}", style="dim", highlight=False)

    effort = Effort(asked.small, asked.rounds, asked.threads, folder, world, asked.threshold, say)
    try:
        return measure_table(table, effort)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _show(console: Console, name: str, result: Result) -> None:
    if result.failure:
        console.print(f"[red]{name}[/]: {escape(result.failure)}", highlight=False)
    goals = _table(f"{name}: goal and figure", ("", "goal", "figure", "met"))
    for figure in result.figures:
        color = {True: "green", False: "red", None: "dim"}[figure.met]
        verdict = figure.verdict if figure.met is not False else f"no, {figure.verdict}"
        goals.add_row(escape(figure.name), figure.goal_text, figure.value_text, f"[{color}]{escape(verdict)}[/]")
    if result.figures:
        console.print(goals)
    for grid in result.grids:
        shown = _table(grid.title, grid.columns)
        for row in grid.rows:
            shown.add_row(*(escape(cell) for cell in row))
        console.print(shown)
    for note in result.notes:
        console.print(escape(note), style="dim", highlight=False)
    console.print()


def _table(title: str, columns: Sequence[str]) -> RichTable:
    table = RichTable(title=escape(title), title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table


def _machine(threads: int) -> Mapping[str, Any]:
    import torch

    return {
        "cpus_usable": len(os.sched_getaffinity(0)),
        "threads": threads,
        "machine": platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _keep(path: Path | None, report: Mapping[str, Any]) -> None:
    if path is not None:
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(report, indent=2) + "\n")
        part.rename(path)


if __name__ == "__main__":
    sys.exit(main())
