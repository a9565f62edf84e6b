"""What a person sees in the terminal: live progress, and the result of a run as tables."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.prompt import Confirm
from rich.table import Table
from rich.text import Text

from flows.console import Console
from flows.displays.narrow import cell_text, middle, print_rows
from rlhf_core.store.address import shown

BARS = "▁▂▃▄▅▆▇█"
WIDEST = 9
"""Columns that fit side by side in a terminal."""
FEW = "--num-prompts 16 --samples 8 --frontier-samples 32"
"""Options of an evaluation that takes seconds on a small model, not minutes."""
LABEL = 17
"""Columns of a name before its value."""
EDGE = 5
"""Iterations averaged at the beginning and at the end."""


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The last values as a line of bars."""
    last = list(values)[-width:]
    low, high = min(last), max(last)
    return "".join(BARS[round((v - low) / (high - low) * 7)] if high > low else BARS[0] for v in last)


class TerminalWatcher:
    """Shows stage, iteration, score, KL and β while a flow runs; plain lines where there is no terminal."""

    def __init__(self, console: Console, num_iterations: int, num_done: int = 0) -> None:
        self.console = console
        self.history: list[Mapping[str, float]] = []
        self._bar = Progress(
            TextColumn("[bold]iteration"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[stage]}", style="cyan", markup=False),
        )
        self._task = self._bar.add_task("iterations", total=num_iterations, completed=num_done, stage="starting")
        self._live = Live(self._render(), console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> TerminalWatcher:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def stage_started(self, iteration: int, stage: str) -> None:
        """Name the stage beside the bar."""
        self._bar.update(self._task, stage=stage)
        self._live.update(self._render())

    def iteration_finished(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Advance the bar; without a terminal, print a line."""
        self.history.append(metrics)
        self._bar.update(self._task, completed=iteration + 1)
        self._live.update(self._render())
        if not self.console.is_terminal:
            self.console.print(
                f"iteration {iteration:4d}  score {metrics['objective/scores']:7.3f}  "
                f"kl {metrics['objective/kl']:6.2f}  beta {metrics['kl/beta']:.4f}  "
                f"length {metrics['rollout/response_len']:5.1f}  {metrics['time/iteration_s']:.2f} s",
                highlight=False,
            )

    def guards_spoke(self, iteration: int, sentences: Sequence[str]) -> None:
        """Print what the guards have seen, above the bar."""
        self._print_guards(sentences)

    def warned(self, sentence: str) -> None:
        """Print it above the bar."""
        print_warning(self.console, sentence)

    def decide(self, sentences: Sequence[str]) -> bool | None:
        """Ask whoever sits at the terminal; None where nobody does."""
        if not (self.console.is_terminal and sys.stdin.isatty()):
            return None
        self._live.stop()
        self._print_guards(sentences)
        try:
            return Confirm.ask("Go on?", console=self.console, default=False)
        except EOFError:
            return False
        finally:
            self._live.start()

    def _print_guards(self, sentences: Sequence[str]) -> None:
        for sentence in sentences:
            self.console.print(Text.assemble(("guard: ", "yellow"), sentence))

    def _render(self) -> Group:
        if not self.history:
            return Group(self._bar)
        grid = Table.grid(padding=(0, 2))
        for label, name, digits in (
            ("score", "objective/scores", 3),
            ("KL", "objective/kl", 2),
            ("β", "kl/beta", 4),
        ):
            values = [metrics[name] for metrics in self.history]
            grid.add_row(Text(label, style="bold"), f"{values[-1]:.{digits}f}", Text(sparkline(values), style="green"))
        return Group(self._bar, grid)


def print_warning(console: Console, sentence: str) -> None:
    """A sentence about what is not as it should be."""
    console.print(Text.assemble(("warning: ", "yellow"), shown(sentence)), soft_wrap=True)


def print_result(
    console: Console, run_dir: str, rows: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]],
    *, kl_target: float | None, tracking_uri: str,
) -> None:  # fmt: skip
    """The result of a run: first -> last, responses before and after, and what to do next."""
    if rows:
        console.print(_first_to_last(rows, kl_target))
    if samples:
        names = ("prompt", "before", "score_before", "after", "score_after")
        pairs = [tuple(sample[name] for name in names) for sample in samples]
        console.print(side_by_side("Before and after: same prompts, same random numbers", ("before", "after"), pairs))
        whole = f"{_command('rlhf')} inspect {run_dir} --stage sample_prompts --iteration 0"
        print_how_chats_are_shown(console, samples, whole)
    console.print("Next", style="italic")
    for what, command in next_commands(run_dir, tracking_uri).items():
        console.print(Text.assemble((what, "bold"), ":"))
        console.print(f"  {command}", soft_wrap=True, markup=False, highlight=False)


def print_records(console: Console, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Rows as a table where they are narrow, else one after the other, a line a column."""
    if rows and len(rows[0]) <= WIDEST:
        print_rows(console, rows, title)
        return
    console.print(title, style="italic")
    for row in rows:
        console.print()
        for name, value in row.items():
            text = middle(cell_text(value), console.width - LABEL)
            console.print(Text.assemble((f"{name:{LABEL}}", "bold"), text), soft_wrap=True)


def next_commands(run_dir: str, tracking_uri: str) -> dict[str, str]:
    """What to do next -> the command that does it, to be copied as it is. ``tracking_uri``: "" where none is."""
    artifact = f"{run_dir}/iterations/000000/05_experience.arrow"
    pages = f"{_command('rlhf')} ui --runs {Path(run_dir).parent}"
    tracker = {"compare runs in MLflow": tracking_uri if tracking_uri.startswith("http") else pages}
    read = f"import pandas; print(pandas.read_feather('{artifact}'))"
    page = f"{run_dir}/view.html"
    if shown(run_dir) != run_dir:  # in an object store
        read = f"from rlhf_core.tables import open_run; print(open_run('{run_dir}').samples().arrow())"
        page = f"{_command('rlhf')} view {run_dir}"
    return (tracker if tracking_uri else {}) | {
        "look into the run": f"{_command('rlhf')} inspect {run_dir}",
        "compare it with another one": f"{_command('rlhf')} compare {run_dir} OTHER_RUN --out compare.html",
        "measure it against the reference, first on few samples": f"{_command('rlhf')} evaluate {run_dir} {FEW}",
        "open an artifact": f'{_command("python")} -c "{read}"',
        "see the picture": f"{run_dir}/report.png",
        "read its responses token by token, in a browser": page,
    }


def _command(name: str) -> str:
    """How to call a program of this environment from here: by its name where that finds it, else by its path."""
    own = Path(sys.executable).parent / name
    found = shutil.which(name)
    if found and Path(found).parent == own.parent:
        return name
    return str(own.relative_to(Path.cwd())) if own.is_relative_to(Path.cwd()) else str(own)


def _first_to_last(rows: Sequence[Mapping[str, Any]], kl_target: float | None) -> Table:
    edge = min(EDGE, max(1, len(rows) // 2))
    table = Table(title=f"First → last (means of {edge} iterations)", title_justify="left", header_style="bold")
    for name, justify in (("", "left"), ("first", "right"), ("last", "right"), ("change", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # pyright: ignore[reportArgumentType]
    for label, key, digits in (
        ("score", "score", 3),
        ("KL to the reference, nats", "kl", 2),
        ("β", "beta", 4),
        ("entropy, nats", "entropy", 1),
        ("response length, tokens", "length", 1),
        ("clip fraction", "clip_fraction", 3),
        ("seconds an iteration", "seconds", 2),
    ):
        first = sum(row[key] for row in rows[:edge]) / edge
        last = sum(row[key] for row in rows[-edge:]) / edge
        note = f"target {kl_target:g} ({last / kl_target - 1:+.0%})" if key == "kl" and kl_target else ""
        table.add_row(label, f"{first:.{digits}f}", f"{last:.{digits}f}", f"{last - first:+.{digits}f}", note)
    return table


def print_how_chats_are_shown(console: Console, samples: Sequence[Mapping[str, Any]], whole: str) -> None:
    """Say so where prompts are shown by their last user message, and where the whole ones are."""
    if any("prompt_text" in sample for sample in samples):
        told = f"prompts are chats, shown by their last user message; whole:  {whole}"
        console.print(told, style="dim", soft_wrap=True, highlight=False, markup=False)


def side_by_side(title: str, names: tuple[str, str], rows: Iterable[tuple[Any, ...]]) -> Table:
    """Two responses to each prompt with their scores: (prompt, first, its score, second, its score)."""
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("prompt", style="bold", ratio=2)
    for name in names:
        table.add_column(name, ratio=5)
        table.add_column("score", justify="right", no_wrap=True)
    for prompt, first, first_score, second, second_score in rows:
        scores = (f"{first_score:.2f}", f"{second_score:.2f}")
        table.add_row(Text(prompt), Text(first.strip()), scores[0], Text(second.strip()), scores[1])
    return table
