"""The table of planted bugs for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from mutants.bugs import Bug
from mutants.trying import Result

GOAL: Final = 0.95
"""Of the bugs that the whole suite catches, the share that the fast tier has to catch."""


def page(bugs: Sequence[Bug], results: Mapping[str, Result]) -> tuple[str, bool]:
    """Return the table as Markdown, and whether the goal is met by what was tried."""
    of_tier = {tier: [r for r in results.values() if r.tier == tier] for tier in ("fast", "all", "escaped", "unsure")}
    fast, caught = len(of_tier["fast"]), len(of_tier["fast"]) + len(of_tier["all"])
    unsure = len(of_tier["unsure"])
    least, most = (fast / total if total else 0.0 for total in (caught + unsure, caught))
    share = f"{least:.0%}" if not unsure else f"between {least:.0%} and {most:.0%}"
    lines = [
        "# Planted bugs",
        "",
        "Written by `make mutants`. Each bug of `bugs.py` is planted in a copy of the tree; the test files of the fast",
        "tier that call the changed function run against it, and every other test if none of them fails.",
        "",
        f"- tried: {len(results)} of {len(bugs)}",
        f"- caught by the fast tier: {fast}",
        f"- caught by the rest of the suite alone: {len(of_tier['all'])}",
        f"- caught by no test: {len(of_tier['escaped'])}",
        f"- not caught by the tests tried so far, others still to run (`unsure`): {unsure}",
        f"- share of the fast tier in what the whole suite catches: {share} (goal: {GOAL:.0%})",
        "",
        "| File | Bug | Result | First test that fails | Seconds |",
        "|---|---|---|---|---|",
    ]
    for bug in bugs:
        result = results.get(bug.name)
        cells = (
            ("not tried", "", "")
            if result is None
            else (result.tier, _short(result.caught_by), f"{result.seconds:.0f}")
        )
        lines.append(f"| `{bug.file}` | {bug.about} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n", bool(results) and least >= GOAL


def _short(test: str) -> str:
    return f"`{test.removeprefix('tests/').replace('|', '/')[:100]}`" if test else ""
