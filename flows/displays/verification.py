"""What `rlhf verify` prints: a bar while it reads, then a table of findings and one last line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from flows.console import Console
from flows.visible import write_json
from rlhf_core.verification.findings import Finding, Verification
from rlhf_core.verification.run import verify_run

COLORS = {"damaged": "red", "missing": "red", "surplus": "red", "foreign": "yellow", "leftover": "yellow"}


def verify_and_show(console: Console, path: Path, *, as_json: bool) -> bool:
    """Verify a run and print what was found. Returns: whether the run is whole."""
    with _reading(console, quiet=as_json) as tell:
        found = verify_run(path, progress=tell)
    if as_json:
        write_json(found.to_json())
    else:
        show_verification(console, found)
    return not found.damage


def show_verification(console: Console, found: Verification) -> None:
    """Print a table of findings, and a last line that says whether the run is whole."""
    if found.findings:
        console.print(table_of_findings(found.findings))
    read = f"{found.num_files} files, {found.num_bytes / 1e6:,.1f} MB"
    stands = f"{found.num_finished} of {found.num_iterations} iterations finished, {found.num_checkpoints} checkpoints"
    console.print(f"{found.path}: {stands}; read {read}", highlight=False, soft_wrap=True)
    color = "red" if found.damage else "green"
    console.print(found.summary(), style=color, highlight=False, soft_wrap=True)


def table_of_findings(findings: Sequence[Finding]) -> Table:
    """One row a finding: where, what kind, what is wrong, what to do."""
    table = Table(Column("file", overflow="fold", ratio=4), Column("kind", no_wrap=True), show_lines=True)
    table.add_column("what is wrong", ratio=4)
    table.add_column("what to do", ratio=5)
    for finding in findings:
        kind = Text(finding.kind, style=COLORS[finding.kind])
        table.add_row(finding.path, kind, finding.problem, finding.remedy)
    return table


def repair_and_show(console: Console, path: Path) -> None:
    """Repair a run and print what was done. Raises IntegrityError if it does not come back as it was."""
    from tasks.lifecycle.repair import repair_run

    with _reading(console) as tell:
        done = repair_run(str(path), progress=tell)
    for line in done or ["nothing to repair"]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _reading(console: Console, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar of what has been read, gone when it is done."""
    bar = Progress(
        TextColumn("[bold]reading"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=quiet or not console.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task("reading", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
