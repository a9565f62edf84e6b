"""The core alone on an accelerator: :mod:`benchmarks.accelerator`, in a process of its own."""

from __future__ import annotations

import json

from benchmarks.accelerator import figures
from benchmarks.processes import measured, python
from benchmarks.suite import Effort, Grid, Result

NAME = "the core on an accelerator"
GOAL = "decoding 5 times transformers' at batch 256; an update of 1 B parameters at 40 % of the peak in bfloat16"


def measure(effort: Effort) -> Result:
    """Without an accelerator at tiny size, where no goal counts."""
    out = effort.folder / "found.json"
    small = ["--small"] if effort.small else []
    command = python("benchmarks.accelerator", "--rounds", effort.rounds, "--json", out, *small)
    measured(command, threads=effort.threads, folder=effort.folder)
    found = json.loads(out.read_text())
    rates = [[side, f"{rate:,.0f}"] for side, rate in found["decode"]["tokens_per_s"].items()]
    return Result(
        figures(found),
        [Grid("decoding", ("", "tokens/s"), rates)],
        [f"{found['device']}, {found['dtype']}, peak {found['peak_flop_per_s'] / 1e12:.3g} TFLOP/s"],
        found,
    )
