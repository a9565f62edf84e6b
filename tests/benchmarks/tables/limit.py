"""How far an iteration is from what the machine could do: its seconds over its operations at the measured peak."""

from __future__ import annotations

import json
import statistics
from typing import Any

from benchmarks.figures import Figure, alternate
from benchmarks.iteration_operations import iteration_operations
from benchmarks.processes import measured, python
from benchmarks.runs import WARM_UP, Training, train
from benchmarks.suite import Effort, Grid, Result
from benchmarks.world import EPOCHS, same_work

from rlhf_core.costs.operations import Models, Shape

NAME = "an iteration against the machine's limit"
GOAL = "1.6 times the seconds that the real tokens' operations take at the measured matrix peak"
SIDE_BY_SIDE = ("score_rewards", "reference_logprobs")


def measure(effort: Effort) -> Result:
    """Matrix products and runs in turns."""
    sides = {"peak": lambda turn: _peak(effort, turn), "run": lambda turn: _run(effort, turn)}
    found: dict[str, list[Any]] = alternate(sides, effort.rounds)
    peak = statistics.median(found["peak"])
    iterations: list[dict[str, Any]] = [iteration for run in found["run"] for iteration in run]
    times_limit = statistics.median(i["seconds"] / (sum(i["operations"].values()) / peak) for i in iterations)
    needed = statistics.median(sum(i["operations"].values()) for i in iterations)
    return Result(
        [
            Figure("seconds of an iteration, over the limit's", times_limit, 1.6, "at most", "x"),
            Figure("matrix peak, float32", peak / 1e9, unit="GFLOP/s"),
        ],
        [
            Grid(
                f"by stage, {needed / 1e9:.1f} GFLOP in all; * side by side, half of the threads each",
                ("stage", "seconds", "of them computing", "GFLOP", "share of peak"),
                _rows(iterations, peak),
            )
        ],
        ["operations are counted from true lengths, without padding: rlhf_core/costs/operations.py"],
        {"peaks": found["peak"], "iterations": iterations},
    )


def _peak(effort: Effort, turn: int) -> float:
    folder = effort.folder / f"peak-{turn}"
    sizes = ("--sizes", 128, "--seconds", 0.2) if effort.small else ()
    measured(python("benchmarks.matmul", folder / "peak.json", *sizes), threads=effort.threads, folder=folder)
    found = json.loads((folder / "peak.json").read_text())["flop_per_s"]
    effort.say(f"round {turn}: peak {found / 1e9:.1f} GFLOP/s")
    return found


def _run(effort: Effort, turn: int) -> list[dict[str, Any]]:
    settings = same_work(effort.world, critic="separate", threads=effort.threads, small=effort.small)
    settings |= {"num_iterations": effort.size(5, 12)}
    run = train(effort.folder / f"run-{turn}", settings, threads=effort.threads)
    effort.say(f"round {turn}: {statistics.median(run.seconds()):.3f} s an iteration")
    reward = Shape.in_folder(effort.world.reward, "AutoModel")
    models = Models(Shape.in_folder(effort.world.policy, "AutoModelForCausalLM"), reward, critic=reward)
    seconds = dict(enumerate(run.seconds(), start=WARM_UP))
    return [_iteration(run, index, took, models) for index, took in seconds.items()]


def _iteration(run: Training, index: int, seconds: float, models: Models) -> dict[str, Any]:
    operations = iteration_operations(run.run_dir, index, models, epochs=EPOCHS)
    return {
        "seconds": seconds,
        "operations": operations,
        "timing": {stage: run.manifest(index, stage)["timing"] for stage in operations},
    }


def _rows(iterations: list[dict[str, Any]], peak: float) -> list[list[str]]:
    def middle(stage: str, clock: str) -> float:
        return statistics.median(i["timing"][stage][clock] for i in iterations)

    rows: list[list[str]] = []
    for stage in iterations[0]["operations"]:
        total, computing = middle(stage, "total_s"), middle(stage, "compute_s")
        operations = statistics.median(i["operations"][stage] for i in iterations)
        share = f"{operations / total / peak:.0%}" if operations else ""
        star = "*" if stage in SIDE_BY_SIDE else ""
        rows.append([stage + star, f"{total:.3f}", f"{computing:.3f}", f"{operations / 1e9:.2f}", share])
    rest = statistics.median(i["seconds"] - _in_stages(i["timing"]) for i in iterations)
    whole = statistics.median(i["seconds"] for i in iterations)
    operations = statistics.median(sum(i["operations"].values()) for i in iterations)
    rows.append(["between stages (orchestration)", f"{rest:.3f}", "", "", ""])
    rows.append(["iteration", f"{whole:.3f}", "", f"{operations / 1e9:.2f}", f"{operations / whole / peak:.0%}"])
    return rows


def _in_stages(timing: dict[str, dict[str, float]]) -> float:
    """Seconds in stages; of two side by side the longer."""
    alone = sum(clock["total_s"] for stage, clock in timing.items() if stage not in SIDE_BY_SIDE)
    return alone + max(timing[stage]["total_s"] for stage in SIDE_BY_SIDE)
