"""What the flow costs over its stages, and whether that grows over a long run."""

from __future__ import annotations

import statistics
import sys
from typing import Any

from benchmarks.figures import Figure, alternate
from benchmarks.runs import Training, train, train_bare
from benchmarks.suite import Effort, Grid, Result
from benchmarks.world import same_work, tiny_world

NAME = "the full flow against the same stages in a bare loop"
GOAL = "5 % of an iteration of about 2 s, 150 ms each; no growth over 500 iterations: 10 % and 20 MB"
FLOW, BARE = "full flow", "bare loop"


def measure(effort: Effort) -> Result:
    """Both in turns on the same work; then one long run of very small iterations."""
    sides = {FLOW: lambda turn: _side(effort, FLOW, turn), BARE: lambda turn: _side(effort, BARE, turn)}
    found = alternate(sides, effort.rounds)
    seconds = {side: statistics.median(s for turn in turns for s in turn) for side, turns in found.items()}
    cost = seconds[FLOW] - seconds[BARE]
    long, hundred = _long_run(effort)
    early, late = long["parts"][0], long["parts"][-1]
    slower, more = late["seconds"] / early["seconds"] - 1, late["resident_bytes"] - early["resident_bytes"]
    return Result(
        [
            Figure("cost of the flow", cost / seconds[BARE] * 100, 5.0, "at most", "%"),
            Figure("cost of the flow, an iteration", cost * 1000, 150.0, "at most", "ms"),
            Figure("cost of the flow, a very small iteration", long["cost"] * 1000, 150.0, "at most", "ms"),
            Figure(f"time of the last {hundred} against the first", slower * 100, 10.0, "at most", "%"),
            Figure(f"memory of the last {hundred} over the first", more / 1e6, 20.0, "at most", "MB"),
        ],
        [
            Grid("seconds an iteration", ("", "median"), [[side, f"{s:.4f}"] for side, s in seconds.items()]),
            Grid(
                f"a run of {long['iterations']} very small iterations",
                ("iterations", "ms an iteration", "resident MB"),
                [
                    [part["name"], f"{part['seconds'] * 1000:.0f}", f"{part['resident_bytes'] / 1e6:,.0f}"]
                    for part in long["parts"]
                ],
            ),
        ],
        ["the bare loop writes the same artifacts with the same checks; it has no Prefect run and no MLflow"],
        {"seconds": found, "long_run": long},
    )


def _side(effort: Effort, side: str, turn: int) -> list[float]:
    settings = same_work(effort.world, critic="separate", threads=effort.threads, small=effort.small)
    settings |= {"num_iterations": effort.size(5, 12)}
    start = train if side == FLOW else train_bare
    run = start(effort.folder / f"{side.replace(' ', '-')}-{turn}", settings, threads=effort.threads)
    effort.say(f"round {turn}: {side}: {statistics.median(run.seconds()):.3f} s an iteration")
    return run.seconds()


def _long_run(effort: Effort) -> tuple[dict[str, Any], int]:
    """Milliseconds and memory of each fifth of a run on the tests' tiny world; and a fifth of it in the bare loop."""
    iterations = effort.size(20, 500)
    settings = tiny_world(effort.folder / "tiny").settings() | {
        "num_iterations": iterations,
        "num_threads": 1,
        "device": "cpu",
        "prompts.batch_size": 8,
        "policy.critic.init": "policy",
        "generation.max_new_tokens": 6,
        "ppo.num_minibatches": 2,
        "ppo.learning_rate": 1e-5,
        "checkpoint.every": iterations,
    }
    effort.say(f"a run of {iterations} very small iterations")
    run = train(effort.folder / "long", settings, threads=1)
    hundred = iterations // 5
    parts = [_part(run, first, first + hundred) for first in range(0, iterations, hundred)]
    bare = train_bare(effort.folder / "long-bare", settings | {"num_iterations": hundred}, threads=1).seconds()
    cost = statistics.median(run.seconds()) - statistics.median(bare)
    told = {"iterations": iterations, "parts": parts, "bare_seconds": bare, "cost": cost}
    return told | {"memory": _thinned(run.ended.memory)}, hundred


def _part(run: Training, first: int, end: int) -> dict[str, Any]:
    """Iterations [first, end): the median seconds, the median of resident memory."""
    began = run.committed(first - 1, "ppo_update") if first else run.began
    ended = run.committed(end - 1, "ppo_update")
    seconds = run.seconds(warm_up=1)[max(first - 1, 0) : end - 1]
    resident = [size for clock, size in run.ended.memory if began <= clock <= ended] or [sys.maxsize]
    return {
        "name": f"{first}-{end - 1}",
        "seconds": statistics.median(seconds),
        "resident_bytes": statistics.median(resident),
    }


def _thinned(memory: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """A few hundred of the samples."""
    return memory[:: max(len(memory) // 300, 1)]
