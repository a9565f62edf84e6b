"""What a table of the suite is: a goal, and a measurement that gives figures against it.

A table lives in a module of its own, ``tests/benchmarks/tables/<name>.py``, with NAME (what it is, for a person), GOAL
and ``measure(effort)``. Another name in TABLES and another module make another table.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from benchmarks.figures import Figure
from benchmarks.world import World

TABLES = (
    "peer",
    "limit",
    "orchestration",
    "quality",
    "growth",
    "startup",
    "accelerator",
    "durability",
    "sharding",
    "overlap",
)
"""Every table, in order."""


@dataclass(frozen=True)
class Effort:
    """How much a table may do, where, and on what."""

    small: bool
    """Tiny sizes that show that everything runs: their figures say nothing."""
    rounds: int
    """How often each side of a comparison is measured."""
    threads: int
    """CPU threads of each measured process."""
    folder: Path
    """Empty, of this table alone; removed afterwards."""
    world: World
    threshold: float = 3.0
    """Mean score that `quality` runs for."""
    say: Callable[[str], None] = lambda line: None
    """Progress, for a person."""

    def size(self, small: int, full: int) -> int:
        """How many."""
        return small if self.small else full


@dataclass(frozen=True)
class Grid:
    """A table of details under the goals."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Result:
    """What a table measured."""

    figures: Sequence[Figure]
    grids: Sequence[Grid] = ()
    notes: Sequence[str] = ()
    """One sentence each: conditions, and what could not be measured."""
    numbers: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Raw, plain JSON."""
    failure: str = ""
    """Why there is no result."""

    @property
    def met(self) -> bool | None:
        """Every goal that could be judged is met; None if none could."""
        judged = [figure.met for figure in self.figures if figure.met is not None]
        return all(judged) if judged else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "met": self.met,
            "failure": self.failure,
            "figures": [figure.to_json() for figure in self.figures],
            "grids": [asdict(grid) for grid in self.grids],
            "notes": list(self.notes),
            "numbers": dict(self.numbers),
        }


class Table(Protocol):
    """What the module of a table offers."""

    NAME: str
    GOAL: str

    def measure(self, effort: Effort) -> Result:
        """Measure, and say what was seen."""
        ...


def load_table(name: str) -> Table:
    """The module of a table. Raises ImportError where it is missing, AttributeError where it is no table."""
    module: Any = importlib.import_module(f"benchmarks.tables.{name}")
    for part in ("NAME", "GOAL", "measure"):
        if not hasattr(module, part):
            raise AttributeError(f"tests/benchmarks/tables/{name}.py has no {part}")
    return cast("Table", module)


def unlisted_tables() -> list[str]:
    """Modules of tables that are not in TABLES: nobody would run them."""
    there = {path.stem for path in (Path(__file__).parent / "tables").glob("*.py")} - {"__init__"}
    return sorted(there - set(TABLES))


def measure_table(table: Table, effort: Effort) -> Result:
    """A table's result; what it raises is its failure, not the end of the suite."""
    try:
        return table.measure(effort)
    except Exception as error:
        lines = traceback.format_exc().strip().splitlines()
        return Result([], notes=lines[-12:], failure=f"it raised {type(error).__name__}: {error}")
