"""Figures against goals, and the little statistics behind them. Standard library only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Figure:
    """One number, and what it shall be.

    Example: ``Figure("episodes/s, over TRL's", 2.2, goal=2.5, unit="x").verdict`` is ``"12 % below"``
    """

    name: str
    value: float | None
    """None where it was not measured, infinite where it was never reached."""
    goal: float | None = None
    """None: only reported."""
    side: Literal["at least", "at most"] = "at least"
    unit: str = ""
    why_not: str = ""
    """Why it was not measured, or does not count here."""

    @property
    def met(self) -> bool | None:
        """None where nothing can be said."""
        if self.goal is None or self.value is None or self.why_not:
            return None
        return self.value >= self.goal if self.side == "at least" else self.value <= self.goal

    @property
    def verdict(self) -> str:
        """Met, or by how much not."""
        if self.value is None or self.why_not:
            return self.why_not or "not measured"
        if self.goal is None:
            return ""
        if self.met:
            return "yes"
        if not math.isfinite(self.value):
            return "never reached"
        if self.goal <= 0 or self.unit in {"%", "MB", "ms"}:  # numbers that may cross zero: told in their own unit
            return f"by {_number(abs(self.value - self.goal))} {self.unit}".rstrip()
        if self.value > 3 * self.goal:
            return f"{_number(self.value / self.goal)} times the goal"
        missing = abs(self.value / self.goal - 1)
        return f"{missing:.0%}".replace("%", " %") + (" below" if self.side == "at least" else " above")

    @property
    def goal_text(self) -> str:
        """As ``≥ 2.5 x``."""
        if self.goal is None:
            return "none"
        return f"{'≥' if self.side == 'at least' else '≤'} {_number(self.goal)} {self.unit}".rstrip()

    @property
    def value_text(self) -> str:
        """As ``2.2 x``."""
        return "" if self.value is None else f"{_number(self.value)} {self.unit}".rstrip()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: what is not finite is null."""
        value = self.value if self.value is not None and math.isfinite(self.value) else None
        told = {"name": self.name, "value": value, "goal": self.goal, "side": self.side, "unit": self.unit}
        return {**told, "met": self.met, "verdict": self.verdict}


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ratio(above: float | None, below: float | None) -> float | None:
    """Their quotient, where both were measured."""
    return None if above is None or not below else above / below


def median_of(values: Sequence[float | None]) -> float | None:
    """Of those that were measured; None if none was."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def alternate(sides: Mapping[str, Callable[[int], Measured]], rounds: int) -> dict[str, list[Measured]]:
    """Measure the sides in turns, ABAB…; the order is swapped each round.

    Args:
        sides: name -> measurement, which is given the round.
        rounds: how often each is measured.
    Returns: name -> what it gave, by round.
    """
    found: dict[str, list[Measured]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            found[name].append(sides[name](turn))
    return found


def log_log_slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Exponent a of cost = c · size^a, by least squares of the logarithms; 1 is linear."""
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(c) for c in costs]).slope
