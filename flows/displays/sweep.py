"""What a person sees of a sweep in the terminal: the plan, all runs as they go, then a row a point and the best."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flows.console import Console
from flows.displays.terminal import print_warning
from flows.progress import Silent, watched_by
from rlhf_core.contracts.config import RunConfig
from rlhf_core.store.address import shown as by_address

if TYPE_CHECKING:
    from rlhf_core.sweeping.folder import SweepFolder
    from tasks.sweep.runs import PlannedSweep, SweepRequest

NUMBERS = {"score": ("score", 3), "kl": ("KL,\nnats", 2), "gain_per_nat": ("gained\na nat", 3)}
"""Number of a point -> what it is called, and its digits. Two lines, so that 80 columns are enough."""
WIDE = 100
"""Columns of a terminal that has room for everything."""


def sweep_and_show(console: Console, request: SweepRequest, config: RunConfig, *, as_json: bool) -> bool:
    """Run the sweep flow with progress, then print its results, or its summary as JSON.

    Returns: whether all of its runs are finished.
    Raises: UserError with every problem of every combination.
    """
    from tasks.sweep.runs import check_sweep

    progress = Console(stderr=True) if as_json else console
    with progress.status("checking every combination, its models and prompts"):
        planned = check_sweep(request, config)
    print_plan(progress, planned)
    from flows.calling import run_flow
    from flows.sweep import sweep
    from rlhf_core.sweeping.folder import SweepFolder

    with SweepWatcher(progress, Path(request.folder), planned.num_runs) as runs, watched_by(runs):
        run_flow(
            sweep, config, request.folder, request.grid, request.seeds, request.jobs, request.at_kl, request.price,
            request.max_runs,
        )  # fmt: skip
    there = SweepFolder.open(Path(request.folder))
    summary = there.summary()
    if as_json:
        console.file.write((there.path / "summary.json").read_text())
    else:
        print_sweep(console, summary)
        print_files(console, there)
    return all(run["finished"] for run in summary["runs"])


class SweepWatcher(Silent):
    """Shows the runs that are at work, and tells of each that has ended. Reads their files: nobody has to report."""

    def __init__(self, console: Console, folder: Path, num_runs: int) -> None:
        self._console, self._folder = console, folder
        self._there: SweepFolder | None = None
        self._ended: set[str] = set()
        columns = (TextColumn("[bold]runs"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[what]}", style="cyan", markup=False), console=console)
        self._task = self._bar.add_task("runs", total=num_runs, what="starting")
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=1, transient=True)

    def __enter__(self) -> SweepWatcher:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def warned(self, sentence: str) -> None:
        """Print it above the runs."""
        print_warning(self._console, sentence)

    def stage_started(self, iteration: int, stage: str) -> None:
        """``iteration`` runs have ended; ``stage`` begins, or nothing if it is empty."""
        if self._there is None:
            from rlhf_core.sweeping.folder import SweepFolder

            self._there = SweepFolder.open(self._folder)
            self._ended = {run.name for run in self._there.runs if self._there.standing(run).is_finished}
        self._bar.update(self._task, completed=iteration, what=stage)
        for run in self._there.runs:
            if run.name in self._ended:
                continue
            standing = self._there.standing(run)
            if standing.is_finished and not standing.is_running:
                self._ended.add(run.name)
                numbers = f"score {standing.score:.3f}, KL {standing.kl:.2f} in its last iteration"
                self._console.print(f"{run.name}: finished, {numbers}", highlight=False, markup=False)
        if stage and not self._console.is_terminal:
            self._console.print(f"{stage}: begins; {iteration} runs have ended", highlight=False, markup=False)

    def render(self) -> RenderableType:
        """The bar of all runs, and a line for each that a process is working on."""
        if self._there is None:
            return self._bar
        grid = Table.grid(padding=(0, 2))
        for run in self._there.runs:
            if run.name in self._ended:
                continue
            at = self._there.standing(run)
            if at.is_running:
                score, kl = ("" if n is None else f"{n:.{d}f}" for n, d in ((at.score, 3), (at.kl, 2)))
                bar = ProgressBar(total=at.of, completed=at.finished, width=20)
                grid.add_row(Text(run.name), bar, f"{at.finished}/{at.of}", f"score {score}", f"KL {kl}")
        return Group(self._bar, grid)


def print_plan(console: Console, planned: PlannedSweep) -> None:
    """How much a sweep is, before it begins, and how much of it is done."""
    size = f"{_counted(planned.num_points, 'point')} x {_counted(planned.num_seeds, 'seed')}"
    runs = f"{size} = {_counted(planned.num_runs, 'run')}"
    work = f"{planned.iterations:,} iterations, {planned.episodes:,} episodes"
    at_a_time = f"{planned.jobs} at a time, each with {_counted(planned.num_threads, 'thread')}"
    disk = f"about {planned.disk_bytes / 1e9:,.2f} GB on the disk at most"
    console.print(Text.assemble(("plan", "bold"), f": {runs}, {work}; {at_a_time}; {disk}"), soft_wrap=True)
    if planned.disk_bytes > planned.free_bytes:
        print_warning(
            console,
            f"the disk of {planned.folder} has {planned.free_bytes / 1e9:,.2f} GB free: free some, or set "
            "artifacts.keep_iterations or a larger checkpoint.every",
        )
    if planned.num_finished or planned.num_begun:
        left = planned.num_runs - planned.num_finished - planned.num_begun
        told = f"{planned.num_finished} finished, {planned.num_begun} stopped, {left} to begin"
        console.print(Text.assemble(("goes on", "bold"), f": {told}"))


def print_sweep(console: Console, summary: Mapping[str, Any]) -> None:
    """A row a point, the runs that are not finished, and what it comes to."""
    from rlhf_core.sweeping.grid import value_text
    from tasks.sweep.log import with_reach

    keys, best, criterion = list(summary["grid"]), summary["best"], summary["criterion"]
    is_priced = criterion["at_kl"] is None and criterion["price"] > 0
    is_narrow = console.width < WIDE
    shown = NUMBERS | ({"value": (f"score -\n{criterion['price']:g} x KL", 3)} if is_priced else {})
    table = Table(
        title=f"{_counted(len(summary['points']), 'point')} x {_counted(len(summary['seeds']), 'seed')}; "
        "± 95 % over seeds, of the last iterations",
        title_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    if is_narrow and is_priced:
        del shown["gain_per_nat"]
    # a narrow terminal breaks the names of keys, never the numbers
    cells = {key: [value_text(point["values"][key]) for point in summary["points"]] for key in keys}
    cells = cells or {"point": [point["label"] for point in summary["points"]]}
    for key, values in cells.items():
        heading = Text(key.replace(".", ".\n") if is_narrow else key)
        table.add_column(heading, overflow="fold", min_width=min(max(map(len, values)), 16))
    if has_failures := any(point["finished"] < point["of"] for point in summary["points"]):
        table.add_column("finished", justify="right", no_wrap=True)
    for label, _ in shown.values():
        table.add_column(label, justify="right", no_wrap=True)
    table.add_column("")
    for number, point in enumerate(summary["points"]):
        row = [Text(values[number]) for values in cells.values()]
        row += [Text(f"{point['finished']} of {point['of']}")] * has_failures
        row += [Text(with_reach(point[name], digits)) for name, (_, digits) in shown.items()]
        marks = ["best"] * (point["point"] == best["point"]) + ["frontier"] * point["on_frontier"]
        table.add_row(*row, " ".join(marks))
    console.print(table)
    if any(point["on_frontier"] for point in summary["points"]):
        console.print("frontier: no other point has a higher score at less KL", style="dim", highlight=False)
    for run in summary["runs"]:
        if not run["finished"]:
            console.print(
                Text.assemble(("not finished: ", "yellow"), run["name"], ": ", run["failure"]), soft_wrap=True
            )
    for group in summary.get("equal", ()):
        if group["why"] not in best["note"]:
            console.print(Text.assemble(("equal: ", "yellow"), group["why"]), soft_wrap=True)
    console.print(Text(verdict(summary)), soft_wrap=True)


def verdict(summary: Mapping[str, Any]) -> str:
    """The sentence that matters: which point, by what, and whether it could be chance."""
    best, criterion = summary["best"], summary["criterion"]["sentence"]
    if best["point"] is None:
        return f"no best point: {best['note']}"
    labels = [point["label"] for point in summary["points"]]
    said = f"best: {labels[best['point']]}, by the {criterion}"
    if best["next"] is None:
        return said
    if best["note"].startswith("more seeds would tell nothing"):
        return f"{said}, and exactly equal to {labels[best['next']]}; {best['note']}"
    lead = best["lead"]
    reach = "" if lead["low"] is None else f" ± {lead['high'] - lead['mean']:.3f}"
    ahead = f"{said}; {lead['mean']:.3f}{reach} ahead of {labels[best['next']]}"
    return f"{ahead}, {best['note']}" if best["note"] else f"{ahead}, seed by seed"


def print_files(console: Console, there: SweepFolder) -> None:
    """Where the results are, and what to do with them."""
    from tasks.sweep.log import shown_tracker

    told: dict[str, object] = {"numbers": there.path / "summary.json"}
    if (there.path / "sweep.png").is_file():
        told["picture"] = there.path / "sweep.png"
    if (there.path / "best.yaml").is_file():
        told["train the best"] = f"rlhf train --config {there.path / 'best.yaml'}"
    if there.config.tracking.enabled:
        tracker = shown_tracker(there)
        told["compare in MLflow"] = tracker if tracker.startswith("http") else f"rlhf ui --runs {there.path}"
    for what, where in told.items():
        console.print(Text.assemble((what, "bold"), ": ", by_address(str(where))), soft_wrap=True)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
