"""What `rlhf runs` and `rlhf clean` print: where each run of a folder stands, and what would be removed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.text import Text

from flows.console import Console
from flows.displays.narrow import Column, print_columns
from flows.visible import write_json
from rlhf_core.cleaning import Wanted
from rlhf_core.run_list import ListedRun, list_runs

if TYPE_CHECKING:
    from tasks.lifecycle.cleaning import CleaningPlan

STYLES: Final = {"running": "yellow", "waiting": "cyan", "stopped": "red", "finished": "green", "damaged": "bold red"}
UNITS: Final = ("B", "kB", "MB", "GB", "TB")
AGES: Final = ((86_400 * 2, 86_400, "d"), (3_600 * 2, 3_600, "h"), (120, 60, "min"), (0, 1, "s"))
"""From so many seconds on -> seconds of a unit, and its name."""


def show_runs(console: Console, folder: Path, *, as_json: bool) -> None:
    """Print the runs of a folder, the newest first. Raises UserError if there is no such folder."""
    runs = list_runs(folder)
    if as_json:
        write_json({"folder": str(folder), "runs": [run.to_json() for run in runs]})
        return
    if not runs:
        _line(console, f"no run in {folder}; `rlhf train --config FILE` makes one")
        return
    _print_runs(console, runs)
    for run in runs:
        if run.note and run.state in ("damaged", "stopped", "waiting") and run.written is not None:
            _line(console, f"{run.name}: {run.note}", style=STYLES[run.state])
    counted = ", ".join(f"{sum(r.state == state for r in runs)} {state}" for state in STYLES
                        if any(r.state == state for r in runs))  # fmt: skip
    _line(console, f"{counted}; {size_text(sum(run.num_bytes for run in runs))}")


def clean_and_show(
    console: Console, folder: Path, what: Wanted, *, does_it: bool, asks_registry: bool, as_json: bool
) -> bool:
    """Print what would be removed, and remove it where a person has said so.

    Returns: whether all of it is removed, or was only shown.
    Raises: UserError if there is no such folder.
    """
    from tasks.lifecycle.cleaning import clean, plan_cleaning

    plan = plan_cleaning(folder, what, asks_registry=asks_registry)
    if not as_json:
        _print_plan(console, plan)
    problems = clean(plan) if does_it else []
    if as_json:
        write_json(_as_json(plan, problems, is_done=does_it))
        return not problems
    for problem in problems:
        _line(console, f"not removed: {problem}", style="red")
    num = len(plan.removals) + len(plan.leftovers)
    if num == 0:
        _line(console, "nothing to remove")
    elif does_it:
        _line(console, f"removed: {num - len(problems)} of {num}", style="green" if not problems else "yellow")
    else:
        _line(console, "nothing was removed: the same with --yes removes this")
    return not problems


def size_text(num_bytes: float) -> str:
    """``1.2 GB``: two digits at least, the unit behind them.

    >>> [size_text(n) for n in (0, 999, 1_000, 52_000_000)]
    ['0 B', '999 B', '1.0 kB', '52 MB']
    """
    for unit in UNITS[:-1]:
        if num_bytes < 999.5:
            return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 9.95 else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1_000
    return f"{num_bytes:,.1f} {UNITS[-1]}"


def age_text(seconds: float) -> str:
    """``3 d``, ``5 h``, ``12 min`` or ``40 s``.

    >>> [age_text(s) for s in (5, 130, 7_300, 200_000)]
    ['5 s', '2 min', '2 h', '2 d']
    """
    _, unit, name = next(age for age in AGES if seconds >= age[0])
    return f"{int(seconds // unit)} {name}"


def _print_runs(console: Console, runs: Sequence[ListedRun], more: Sequence[Column] = ()) -> None:
    now = time.time()
    columns = [
        Column("run", [run.name for run in runs], is_name=True),
        Column("state", [run.state for run in runs], styles=STYLES),
        Column("done", [_done(run) for run in runs]),
        Column("score", [_number(run.score, 3) for run in runs]),
        Column("KL", [_number(run.kl, 2) for run in runs]),
        Column("size", [size_text(run.num_bytes) for run in runs]),
        Column("age", ["" if run.written is None else age_text(run.age_s(now)) for run in runs]),
        *(more or [Column("policy", [_model(run.model) for run in runs], is_name=True)]),
    ]
    print_columns(console, columns)


def _print_plan(console: Console, plan: CleaningPlan) -> None:
    if plan.removals:
        what = Column("removed", [removal.sentence for removal in plan.removals], is_name=True)
        _print_runs(console, [removal.run for removal in plan.removals], [what])
    for path in plan.leftovers:
        _line(console, f"{path}: left by a removal that was killed")
    for run, why in plan.spared:
        _line(console, f"{run.name} stays: {why}", style="yellow")
    if plan.removals:
        _line(console, f"{size_text(plan.num_bytes)} in all; MLflow keeps what it was sent")


def _as_json(plan: CleaningPlan, problems: Sequence[str], *, is_done: bool) -> dict[str, object]:
    return {
        "folder": str(plan.folder),
        "is_done": is_done,
        "bytes": plan.num_bytes,
        "removals": [
            {"run": str(r.run.path), "part": r.part, "what": r.sentence, "bytes": r.num_bytes} for r in plan.removals
        ],
        "spared": [{"run": str(run.path), "reason": why} for run, why in plan.spared],
        "leftovers": [str(path) for path in plan.leftovers],
        "problems": list(problems),
    }


def _done(run: ListedRun) -> str:
    return "" if run.finished is None else f"{run.finished}/{run.of}"


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.2e}"


def _model(model: str | None) -> str:
    """A hub id as it is; of a folder, its name."""
    if model is None:
        return ""
    return Path(model).name or model if model.startswith(("/", "~", ".")) or model.count("/") > 1 else model


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style), soft_wrap=True, highlight=False)
