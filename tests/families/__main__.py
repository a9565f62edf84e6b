"""Print the table of model families, and write it as a page.

python -m families [--page docs/models.md] [--only llama qwen3] [--jobs 2]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track
from tiny_world import make_tiny

from families.models import families
from families.rows import Row, measured, policy_row, reward_row

FAMILIES_A_PROCESS = 8
POLICIES, REWARDS = "AutoModelForCausalLM", "AutoModelForSequenceClassification"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns the exit code: 1 if a family is wrong or dies after a passed check."""
    parser = argparse.ArgumentParser(prog="families", description=__doc__)
    parser.add_argument("--page", type=Path, help="write the tables there, as Markdown")
    parser.add_argument("--only", nargs="*", default=None, help="model types; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="families at the same time")
    asked = parser.parse_args(arguments)
    console = Console()
    tables: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as place, _processes(asked.jobs) as processes:
        root = make_tiny(Path(place)).root
        for title, auto_class, measure in (
            ("Policies", POLICIES, policy_row),
            ("Reward models", REWARDS, reward_row),
        ):
            kinds = [k for k in families(auto_class) if asked.only is None or k in asked.only]
            rows = processes.map(measured, kinds, repeat(measure), repeat(root))
            tables[title] = list(track(rows, description=title, total=len(kinds), console=Console(stderr=True)))
    text = page(tables)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if asked.page is not None:
        asked.page.write_text(text, encoding="utf-8")
    return 0 if all(row.is_right for rows in tables.values() for row in rows) else 1


def page(tables: dict[str, list[Row]]) -> str:
    """The tables as Markdown: every cell a number, or the sentence of check."""
    lines = ["# Model families", ""]
    lines += [
        f"Measured with transformers {transformers.__version__} and torch {torch.__version__} on models of random "
        "weights at tiny size, by `make families`.",
        "Each number is the largest difference from transformers alone, one unpadded row at a time (float32).",
        "",
    ]
    for title, rows in tables.items():
        measured = [row for row in rows if row.cells]
        refused = [row for row in rows if row.refusal is not None]
        broken = [row for row in rows if row.died is not None]
        not_made = [row for row in rows if row.not_made is not None]
        names = list(dict.fromkeys(name for row in measured for name in row.cells))
        lines += [f"## {title}", "", f"{len(measured)} measured, {len(refused)} refused by `rlhf check`.", ""]
        lines += ["| family | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for row in measured:
            cells = [_number(row.cells.get(name)) for name in names]
            lines.append(f"| {row.kind} | " + " | ".join(cells) + " |")
        for heading, some in (
            ("Refused by check", refused),
            ("Died after a passed check", broken),
            ("Not made", not_made),
        ):
            if some:
                lines += ["", f"### {heading}", "", "| family | |", "|---|---|"]
                reasons = [(row.kind, row.refusal or row.died or row.not_made or "") for row in some]
                lines += [f"| {kind} | {_cell(reason)} |" for kind, reason in reasons]
        lines.append("")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.0e}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _processes(jobs: int) -> ProcessPoolExecutor:
    """Processes that end after a few families each: what a library keeps of one would fill the memory."""
    return ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=FAMILIES_A_PROCESS)


if __name__ == "__main__":
    sys.exit(main())
