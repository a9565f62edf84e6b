"""What durability costs: :mod:`benchmarks.protocol_cost`, in a process of its own."""

from __future__ import annotations

import json

from benchmarks.figures import Figure
from benchmarks.processes import measured, python
from benchmarks.runs import overrides
from benchmarks.suite import Effort, Grid, Result
from benchmarks.world import ROOT

NAME = "the cost of durability"
GOAL = "3 % of an iteration's wall time for fsync, digests, checks, seals and the outbox"
CONFIG = ROOT / "deployments" / "configs" / "reviews.yaml"


def measure(effort: Effort) -> Result:
    """The same iterations with the protocol and without, in turns, in one process."""
    out = effort.folder / "found.json"
    settings = effort.world.settings() | {"num_threads": effort.threads, "device": "cpu"}
    if effort.small:
        settings |= {"prompts.batch_size": 8}
    blocks = ("--blocks", effort.size(1, 2 * effort.rounds), "--block", effort.size(1, 5))
    options = ["--config", CONFIG, *overrides(settings), *blocks, "--folder", effort.folder, "--json", out]
    measured(python("benchmarks.protocol_cost", *options), threads=effort.threads, folder=effort.folder)
    found = json.loads(out.read_text())
    rows = [
        [clock, *(f"{found[clock][side]:.3f}" for side in ("on", "off")), f"{found[clock]['cost']:+.1%}"]
        for clock in ("wall", "cpu")
    ]
    return Result(
        [
            Figure("wall time", found["wall"]["cost"] * 100, found["goal"] * 100, "at most", "%"),
            Figure("CPU time", found["cpu"]["cost"] * 100, unit="%"),
        ],
        [Grid("seconds an iteration", ("", "on", "off", "cost"), rows)],
        numbers=found,
    )
