"""What `rlhf inspect` shows of a run: as tables, as JSON, or as a file for another program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Group
from rich.table import Table
from rich.text import Text

from flows.console import Console
from flows.displays.narrow import WIDE, Column, cell_text, middle, print_rows
from flows.displays.terminal import LABEL, print_records
from flows.visible import write_json_line
from rlhf_core.choice import ALL, chosen_iterations
from rlhf_core.contracts.cleaned import Cleaned
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.export import check_target, export_table
from rlhf_core.inspection import (
    Sheet,
    artifact_sheet,
    histogram_sheet,
    iteration_sheet,
    last_of_user,
    run_sheet,
    sample_sheet,
    samples_sheet,
)
from rlhf_core.selection import Selection
from rlhf_core.store.address import shown

SHOWN = 20
"""Rows in a terminal, unless a person asks for another number."""
NUMBERS = {"score": "score", "kl": "KL", "num_tokens": "tokens", "change": "change"}
"""Number of a response -> its heading."""
INDENT = "  "
MAX_NAMED = 8
"""Iterations that a sentence names one by one."""
LINES = 3
"""Of a response in a narrow terminal."""
BAR = 24
"""Characters of a histogram's longest bar."""


@dataclass(frozen=True)
class Question:
    """What a person wants to see of a run; at most one of a stage, a sample, samples and histograms."""

    iteration: int | None = None
    stage: str | None = None
    sample: str | None = None
    samples: bool = False
    histograms: bool = False
    iterations: str | None = None
    """Of samples and histograms, instead of one: 0,10,last or 3-7 or all."""
    selection: Selection = field(default_factory=Selection)

    def __post_init__(self) -> None:
        wants_samples = self.samples or self.selection != Selection()
        asked = {
            "--stage": self.stage is not None,
            "--sample": self.sample is not None,
            "--histograms": self.histograms,
            "--samples, --by, --finish and --contains": wants_samples,
        }
        several = [name for name, is_asked in asked.items() if is_asked]
        if len(several) > 1 and several != ["--histograms", "--samples, --by, --finish and --contains"]:
            raise UserError(f"{' and '.join(several)} ask for different tables; choose one")
        if self.iterations is not None and (self.iteration is not None or not (self.histograms or wants_samples)):
            raise UserError("--iterations goes with --samples or --histograms, instead of --iteration")

    def answer(self, run: RunFolder) -> tuple[Sheet, Callable[[Console, Sheet, int], None]]:
        """The sheet, and what prints the first rows of it."""
        if self.sample is not None:
            return sample_sheet(run, self.sample), _print_sample
        if self.stage is not None:
            return artifact_sheet(run, self.iteration, self.stage), _print_artifact
        if self.histograms:
            return histogram_sheet(run, self._where(run), self.selection), _print_histograms
        if self.samples or self.selection != Selection():
            return samples_sheet(run, self._where(run), self.selection), _print_samples
        if self.iteration is not None:
            return iteration_sheet(run, self.iteration), _print_iteration
        return run_sheet(run), _print_run

    def _where(self, run: RunFolder) -> list[int] | None:
        """The iterations whose responses are asked for; None: of the newest."""
        if self.iterations is not None:
            chosen = chosen_iterations(self.iterations, run.num_finished())
            cleaned = Cleaned.of(run.path)
            return [i for i in chosen if not cleaned.lacks(i)] if self.iterations.strip() == ALL else chosen
        return None if self.iteration is None else [self.iteration]


def show_run(
    console: Console,
    path: Path,
    question: Question,
    *,
    limit: int | None = None,
    as_json: bool = False,
    to: Path | None = None,
) -> None:
    """Print what was asked of a run, or write it to a file. Raises UserError for what is not there.

    Args:
        console: where to.
        path: the run folder.
        question: what is asked.
        limit: the first so many rows; default: SHOWN in a terminal, all in JSON or a file.
        as_json: print one JSON object and nothing else.
        to: the file, instead of printing.
    """
    run = RunFolder.open(path)
    if to is not None:
        check_target(to, path)
    sheet, show = question.answer(run)
    if to is not None:
        table = sheet.table.slice(0, limit)
        export_table(table, to)
        console.print(
            f"{table.num_rows} rows{_of_iterations(sheet.iterations(limit))}, {table.num_columns} columns: {to}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    if as_json:
        rows = sheet.table.slice(0, limit).to_pylist()
        write_json_line({"title": sheet.title, **sheet.facts, "rows": rows})
    elif to is None:
        show(console, sheet, limit or SHOWN)


def _of_iterations(there: Sequence[int]) -> str:
    """Of which iterations rows are, in words."""
    if not there:
        return ""
    if len(there) == 1:
        return f" of iteration {there[0]}"
    gaps = len(there) != there[-1] - there[0] + 1
    named = ", ".join(map(str, there)) if gaps and len(there) <= MAX_NAMED else f"{there[0]} to {there[-1]}"
    return f" of iterations {named}" + (f" ({len(there)} of them)" if gaps and len(there) > MAX_NAMED else "")


def _print_run(console: Console, sheet: Sheet, limit: int) -> None:
    rows = sheet.table.to_pylist()
    if rows:
        shown = rows if len(rows) <= limit else rows[:: -(-len(rows) // limit)]
        print_rows(console, shown, sheet.title)
        kept = ", ".join(f"{i:06d}" for i in sheet.facts["checkpoints"]) or "none yet"
        console.print(f"checkpoints: {kept}", highlight=False, soft_wrap=True)
    else:
        console.print(sheet.title, highlight=False, markup=False, soft_wrap=True)
    for sentence in sheet.facts.get("extensions", ()):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    console.print(sheet.facts["standing"], highlight=False, markup=False, soft_wrap=True)


def _print_iteration(console: Console, sheet: Sheet, _: int) -> None:
    rows = [{**row, "sha256": row["sha256"][:12]} for row in sheet.table.to_pylist()]
    print_rows(console, rows, sheet.title)
    print_rows(console, [{"metric": k, "value": v} for k, v in sheet.facts["metrics"].items()])


def _print_artifact(console: Console, sheet: Sheet, limit: int) -> None:
    rows = sheet.table.slice(0, limit).to_pylist()
    if any(row.get("messages") for row in rows):
        _print_chats(console, rows, sheet.title)
    else:
        print_records(console, rows, sheet.title)
    _print_rest(console, sheet, limit)


def _print_chats(console: Console, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Prompts one after the other: what is asked, then each message of the chat whole, then the other columns."""
    console.print(title, style="italic", highlight=False)
    for row in rows:
        console.print()
        lines = [("asked", last_of_user(row["messages"]) or row["prompt_text"])]
        lines += [(f"  {message['role']}", message["content"]) for message in row["messages"]]
        others = (item for item in row.items() if item[0] != "messages")
        lines += [(name, middle(cell_text(value), console.width - LABEL)) for name, value in others]
        table = Table.grid()
        table.add_column(width=LABEL, style="bold")
        table.add_column()
        for name, text in lines:
            table.add_row(Text(name), Text(text))
        console.print(table)


def _print_sample(console: Console, sheet: Sheet, _: int) -> None:
    spoken = sheet.spoken({"prompt_text": sheet.facts["prompt"]})
    for name, value in {**sheet.facts, "prompt": spoken}.items():
        console.print(Text.assemble((f"{name:{LABEL}}", "bold"), str(value)))
    if spoken != sheet.facts["prompt"]:
        told = "the prompt is a chat, shown by its last user message; --json has it as the policy reads it"
        console.print(told, style="dim", soft_wrap=True, highlight=False)
    print_rows(console, sheet.table.to_pylist())


def _print_samples(console: Console, sheet: Sheet, limit: int) -> None:
    rows = sheet.table.slice(0, limit).to_pylist()
    (_print_wide_samples if console.width >= WIDE else _print_narrow_samples)(console, sheet, rows)
    if sheet.table.num_rows:
        one = sheet.table["sample_id"][0].as_py()
        command = f"rlhf inspect {sheet.facts['run']} --sample {one}"
        console.print(f"one of them token by token:  {command}", highlight=False, markup=False, soft_wrap=True)
    _print_rest(console, sheet, limit)


def _print_narrow_samples(console: Console, sheet: Sheet, rows: Sequence[dict[str, Any]]) -> None:
    """The numbers of each response on one line, then its prompt on one and the beginning of what it answers."""
    console.print(Text(shown(sheet.title), "italic"))
    columns = [
        Column("sample", [row["sample_id"] for row in rows], is_left=True),
        *(Column(heading, [_digits(row[name]) for row in rows]) for name, heading in NUMBERS.items()),
        Column("finish", [row["finish_reason"] for row in rows], is_left=True),
    ]
    widths = [column.width for column in columns]
    for i in range(-1, len(rows)):
        cells = [column.heading if i < 0 else str(column.cells[i]) for column in columns]
        line = "  ".join(
            cell.ljust(width) if column.is_left else cell.rjust(width)
            for cell, width, column in zip(cells, widths, columns, strict=True)
        )
        console.print(Text(line.rstrip(), "bold" if i < 0 else ""), no_wrap=True, overflow="ignore", crop=False)
        if i < 0:
            continue
        room = console.width - len(INDENT)
        prompt, response = _one_line(sheet.spoken(rows[i])), _one_line(rows[i]["response_text"])
        console.print(Text(f"{INDENT}{middle(prompt, room)}", "dim"), no_wrap=True)
        for part in Text(response).wrap(console, room)[:LINES]:
            console.print(Text.assemble(INDENT, part), no_wrap=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _digits(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _print_wide_samples(console: Console, sheet: Sheet, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(
        title=Text(shown(sheet.title)), title_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("sample", no_wrap=True)
    for heading in NUMBERS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for name, ratio in (("finish", None), ("prompt", 2), ("response", 5)):
        table.add_column(name, ratio=ratio)
    for row in rows:
        cells = (_digits(row[name]) for name in NUMBERS)
        texts = (row["finish_reason"], sheet.spoken(row).strip(), row["response_text"].strip())
        table.add_row(row["sample_id"], *cells, *(Text(text) for text in texts))
    console.print(table)


def _print_rest(console: Console, sheet: Sheet, limit: int) -> None:
    total = sheet.facts["total"]
    if total > limit:
        console.print(f"{limit} of {total} rows; --limit shows more, --to FILE keeps all", highlight=False)


def _print_histograms(console: Console, sheet: Sheet, _: int) -> None:
    console.print(sheet.title, style="italic")
    quantities: dict[str, list[Mapping[str, Any]]] = {}
    for row in sheet.table.to_pylist():
        quantities.setdefault(f"{row['quantity']}, {row['unit']}", []).append(row)
    console.print(Columns([_histogram(name, rows) for name, rows in quantities.items()], padding=(1, 4)))


def _histogram(name: str, rows: Sequence[Mapping[str, Any]]) -> Group:
    highest = max(row["count"] for row in rows) or 1
    bars = Table.grid(padding=(0, 1))
    for justify in ("right", "left", "right"):
        bars.add_column(justify=justify)
    for row in rows:
        bars.add_row(f"{row['low']:.3g}", _bar(row["count"] / highest), str(row["count"]))
    bars.add_row(f"{rows[-1]['high']:.3g}", "", "")
    return Group(Text(name, style="bold"), bars)


def _bar(share: float) -> Text:
    eighths = round(share * BAR * 8)
    return Text("█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8], style="green")
