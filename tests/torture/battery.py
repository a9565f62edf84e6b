"""What a row of the battery is: a goal, and a measurement that says whether it is met.

    python -m torture [--only NAME ...] [--json FILE]      the whole battery, hours allowed: `make torture`
    pytest tests/torture                                   each row again, small: minutes, in the test command

A row lives in a module of its own, ``tests/torture/rows/<name>.py``, with NAME, GOAL and ``measure(effort)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_world import Tiny


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
