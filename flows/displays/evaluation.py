"""What a person sees of an evaluation in the terminal: progress, then tables and the sentence that matters."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, cast

from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from flows.console import Console
from flows.displays.narrow import print_rows
from flows.displays.terminal import print_how_chats_are_shown, print_warning, side_by_side
from flows.progress import Silent, watched_by
from flows.visible import write_json_text
from rlhf_core.contracts.config import RunConfig
from rlhf_core.store.address import shown
from rlhf_core.store.opening import local

if TYPE_CHECKING:
    from rlhf_core.evaluation.request import Request
    from tasks.evaluation.evaluate import PlannedEvaluation

ROWS = {
    "score": ("score", 3),
    "gain": ("gain over the reference", 3),
    "kl": ("KL to the reference, nats", 2),
    "k3": ("KL by k3, nats", 2),
    "win_rate": ("win rate against the reference", 3),
    "attainable_score": ("score attainable at this KL", 3),
    "share_of_attainable": ("share of what is attainable", 3),
    "response_len": ("response length, tokens", 1),
    "eos_rate": ("ended with EOS", 3),
    "entropy": ("entropy of a response, nats", 1),
    "distinct_1": ("distinct-1", 3),
    "distinct_2": ("distinct-2", 3),
    "repetition": ("repeated bigrams", 3),
}
"""Number -> what it is called, and its digits."""
NUM_SAMPLES = 3
LINE_EVERY_S = 10.0
"""Seconds between two lines of progress where there is no terminal."""
FOUND_S = 0.1
"""A part that took less was there already, and says nothing about those that have to be drawn."""
NEWEST = 5
"""Parts whose mean time is taken for that of the remaining ones."""


def evaluate_and_show(console: Console, request: Request, config: RunConfig | None, *, as_json: bool) -> None:
    """Run the evaluation flow with progress, then print its result, or its summary as JSON. Raises UserError."""
    from tasks.evaluation.evaluate import check_evaluation

    progress = Console(stderr=True) if as_json else console
    with progress.status("checking the models and prompts"):
        planned = check_evaluation(replace(request, target=local(request.target)), config)
    for note in notes(planned):
        progress.print(Text.assemble(("note:", "yellow"), f" {note}"))
    from pathlib import Path

    from flows.calling import run_flow
    from flows.evaluate import evaluate
    from rlhf_core.evaluation.folder import EvaluationFolder

    watched_on = progress if progress.is_terminal else Console(stderr=True)  # a pipe gets the results alone
    with PartsWatcher(watched_on, len(planned.parts)) as parts, watched_by(parts):
        folder = run_flow(evaluate, **asdict(request), config=config)
    there = EvaluationFolder.open(Path(cast("str", folder)))
    if as_json:
        write_json_text((there.path / "summary.json").read_text(encoding="utf-8"))
        return
    print_evaluation(console, there.summary(), there.side_by_side(NUM_SAMPLES))
    for what, file in (("numbers", "summary.json"), ("samples", "samples.arrow"), ("picture", "evaluation.png")):
        console.print(Text.assemble((what, "bold"), f": {shown(there.path / file)}"), soft_wrap=True)


class PartsWatcher(Silent):
    """Shows which part of which policy's samples is drawn and the time left; plain lines where there is no terminal.

    Args:
        console: on which progress is shown.
        num_parts: of all policies together.
        clock: seconds, for tests.
    """

    def __init__(self, console: Console, num_parts: int, clock: Callable[[], float] = time.monotonic) -> None:
        columns = (TextColumn("[bold]samples"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn())
        left, what = TextColumn("{task.fields[left]}"), TextColumn("{task.fields[what]}", style="cyan", markup=False)
        self._console = console
        self._bar = Progress(*columns, left, what, console=console, transient=True)
        self._task = self._bar.add_task("samples", total=num_parts, what="starting", left="")
        self._console, self._num_parts, self._clock = console, num_parts, clock
        self._part_began = clock()
        self._line_printed = -LINE_EVERY_S
        self._drawn_s: list[float] = []
        """Seconds that each part took which was not there already."""

    def __enter__(self) -> PartsWatcher:
        if self._bar.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.console.is_terminal:
            self._bar.stop()

    def warned(self, sentence: str) -> None:
        """Print it above the bar."""
        print_warning(self._console, sentence)

    def stage_started(self, iteration: int, stage: str) -> None:
        """``iteration`` parts are done; a part of the policy ``stage`` begins."""
        now = self._clock()
        if iteration and (took := now - self._part_began) > FOUND_S:
            self._drawn_s.append(took)
        self._part_began = now
        left = self._time_left(self._num_parts - iteration)
        self._bar.update(self._task, completed=iteration, what=stage, left=left)
        is_due = now - self._line_printed >= LINE_EVERY_S or iteration in (1, self._num_parts)
        if is_due and not self._bar.console.is_terminal:
            self._line_printed = now
            self._bar.console.print(
                f"samples: {iteration} of {self._num_parts} parts done{f', {left}' if left else ''}; now {stage}",
                highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip

    def _time_left(self, num_parts: int) -> str:
        """From the newest parts; nothing before the first one is drawn."""
        newest = self._drawn_s[-NEWEST:]
        if not newest or not num_parts:
            return ""
        seconds = math.ceil(num_parts * sum(newest) / len(newest))
        return f"about {seconds} s left" if seconds < 100 else f"about {math.ceil(seconds / 60)} min left"


def notes(planned: PlannedEvaluation) -> list[str]:
    """What a reader of the numbers should know."""
    of, known = planned.num_prompts, planned.num_trained_on
    if not known:
        return []
    which = "these prompts are" if known == of else f"{known} of the {of} prompts are"
    return [f"{which} among those of training; name held-out ones with --prompts"]


def print_evaluation(console: Console, summary: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
    """Numbers with their intervals, what is attainable, a few responses, and what it comes to."""
    policies: Mapping[str, Any] = summary["policies"]
    prompts = summary["prompts"]["num_prompts"]
    table = Table(
        title=f"{prompts} prompts x {summary['samples']} responses, reference {summary['reference_samples']}; "
        "± 95 % over prompts",
        title_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    table.add_column("")
    trained = {name: numbers for name, numbers in policies.items() if numbers["blend"] == 1}
    for name in ("reference", *trained):
        table.add_column(_called(name), justify="right")
    for key, (label, digits) in ROWS.items():
        shown = [_number(numbers.get(key), digits) for numbers in (summary["reference"], *trained.values())]
        table.add_row(label, *shown)
    console.print(table)
    if len(trained) < len(policies):
        console.print(_blends(policies))
    best = [
        {"best of": row["n"], "KL at most": row["kl"], "score": row["score"]["mean"],
         "low": row["score"]["low"], "high": row["score"]["high"]}
        for row in summary["best_of_n"]
    ]  # fmt: skip
    if best:
        print_rows(console, best, "Best-of-n of the reference, no training")
    if samples:
        names = ("prompt", "ref_response", "ref_score", "response", "score")
        pairs = [tuple(sample[name] for name in names) for sample in samples]
        console.print(side_by_side("Same prompt, same random numbers", ("reference", "policy"), pairs))
        print_how_chats_are_shown(console, samples, "in samples.arrow")
    for name, numbers in trained.items():
        console.print(Text(verdict(name, numbers, summary["reference"])), soft_wrap=True)


def verdict(name: str, numbers: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    """The sentence that matters: at this KL, which share of the reward that can be had."""
    share = numbers["share_of_attainable"]
    score, kl = numbers["score"]["mean"], numbers["kl"]["mean"]
    if share is None:
        return f"{_called(name)}: score {score:.3f}; no share of the attainable: {numbers['share_note']}"
    base = reference["score"]["mean"]
    could = numbers["attainable_score"]["mean"]
    return (
        f"{_called(name)}: at KL {kl:.2f} it has {share['mean']:.0%} ({share['low']:.0%} to {share['high']:.0%}) "
        f"of the reward that can be had: {score - base:+.3f} of {could - base:+.3f} above the reference"
    )


def _called(name: str) -> str:
    trained, _, share = name.partition("@")
    called = f"iteration {int(trained)}" if trained.isdecimal() else trained
    return f"{share} of {called}" if share else called


def _blends(policies: Mapping[str, Any]) -> Table:
    """A row a policy: what lies between the reference and each, in order, then itself."""
    table = Table(title="Interpolated towards the reference", title_justify="left", header_style="bold",
                  box=SIMPLE_HEAD, pad_edge=False)  # fmt: skip
    table.add_column("weights", no_wrap=True)
    shown = {"kl": "KL, nats", "score": "score", "share_of_attainable": "of the attainable"}
    for label in shown.values():
        table.add_column(label, justify="right", no_wrap=True)
    for name, numbers in policies.items():
        table.add_row(_called(name), *(_number(numbers[key], ROWS[key][1]) for key in shown))
    return table


def _number(value: Mapping[str, float] | float | None, digits: int) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        reach = max(value["high"] - value["mean"], value["mean"] - value["low"])
        return f"{value['mean']:.{digits}f} ± {reach:.{digits}f}"
    return f"{value:.{digits}f}"
