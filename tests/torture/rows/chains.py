"""Killed, resumed and killed again, five times in a row, then resumed to the end."""

from __future__ import annotations

from torture.battery import Effort, Outcome
from torture.rows.random_kills import kill_and_compare

NAME = "chains of 5 kills"
GOAL = "200 chains: a resume of a resume of a resume, 100 % bit-identical"
KILLS = 5
SHARE = 0.6
"""A life is shorter than this share of a whole run."""


def measure(effort: Effort) -> Outcome:
    """As :mod:`torture.rows.random_kills`, five kills a run."""
    tries = effort.size(3, 200)
    failures, cases = kill_and_compare(effort, tries, kills=KILLS, share=SHARE)
    passed = tries - len(failures)
    return Outcome(
        tried=tries,
        passed=passed,
        figure=f"{passed:,} of {tries:,} chains of {KILLS} kills bit-identical, of {cases} configurations",
        goal_size=200,
        failures=failures[:20],
        numbers={"kills": tries * KILLS, "configurations": cases},
    )
