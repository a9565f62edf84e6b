"""What a row of the battery is: a goal, and a measurement that says whether it is met.

    python -m torture [--only NAME ...] [--json FILE]      the whole battery, hours allowed: `make torture`
    pytest tests/torture                                   each row again, small: minutes, in the test command

A row lives in a module of its own, ``tests/torture/rows/<name>.py``, with NAME (what it is, for a person), GOAL and
``measure(effort)``. Another name in ROWS and another module make another row.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from tiny_world import Tiny

ROWS = (
    "baseline",
    "kill_every_operation",
    "kill_in_compaction",
    "kill_in_extension",
    "object_store",
    "random_kills",
    "chains",
    "power_loss",
    "planted_bugs",
    "disk_faults",
    "prefect_api",
    "mlflow_outages",
    "mlflow_store",
    "races",
    "signals",
    "orphans",
    "ray_nodes",
    "clock",
    "surroundings",
    "bit_rot",
    "fuzz",
    "numeric_injection",
    "malicious",
    "secrets",
)
"""Every row, in the order of the table."""


@dataclass(frozen=True)
class Effort:
    """How much a row may do, and where."""

    full: bool
    """The whole battery; otherwise the small one of the test command."""
    folder: Path
    """Empty, of this row alone; removed afterwards."""
    tiny: Tiny
    """The tiny world: never changed, copied where it must be."""
    progress: Callable[[int, int], None] = lambda done, total: None

    def size(self, small: int, full: int) -> int:
        """How many: small in the test command, full in the battery."""
        return full if self.full else small


@dataclass(frozen=True)
class Outcome:
    """What a row measured.

    Example: ``Outcome(tried=1512, passed=1512, figure="1,512 deaths, all bit-identical", goal_size=1500)``
    """

    tried: int
    passed: int
    figure: str
    """For a person: what was done and seen, with numbers."""
    goal_size: int
    """How many tries the goal asks for; the small battery may do fewer."""
    failures: list[str] = field(default_factory=list[str])
    """One sentence each, the first few of them."""
    numbers: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Whatever else is worth keeping, plain JSON."""
    not_run: str = ""
    """Why parts could not be tried on this machine; empty if all were."""

    @property
    def met(self) -> bool:
        """Everything that was tried passed, something was tried, and nothing was left out."""
        return 0 < self.tried == self.passed and not self.not_run

    def met_in_full(self) -> bool:
        """Met, with as many tries as the goal asks for."""
        return self.met and self.tried >= self.goal_size


class Row(Protocol):
    """What the module of a row offers."""

    NAME: str
    GOAL: str

    def measure(self, effort: Effort) -> Outcome:
        """Do what the row is about, and say what was seen."""
        ...


def load_row(name: str) -> Row:
    """The module of a row. Raises ImportError where it is missing, AttributeError where it is no row."""
    module: Any = importlib.import_module(f"torture.rows.{name}")
    for part in ("NAME", "GOAL", "measure"):
        if not hasattr(module, part):
            raise AttributeError(f"tests/torture/rows/{name}.py has no {part}")
    return cast("Row", module)


def unlisted_rows() -> list[str]:
    """Modules of rows that are not in ROWS: nobody would run them."""
    there = {path.stem for path in (Path(__file__).parent / "rows").glob("*.py")} - {"__init__"}
    return sorted(there - set(ROWS))


def measure_row(name: str, effort: Effort) -> Outcome:
    """A row's outcome; what it raises is its failure, not the end of the battery."""
    try:
        return load_row(name).measure(effort)
    except Exception as error:
        lines = traceback.format_exc().strip().splitlines()
        return Outcome(1, 0, f"it raised {type(error).__name__}: {error}", goal_size=1, failures=lines[-12:])
