"""What it gains to answer the next prompts while the policy moves, and what samples that are one update old cost."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.figures import Figure, alternate, ratio
from benchmarks.runs import WARM_UP, train
from benchmarks.suite import Effort, Grid, Result
from benchmarks.world import same_work

NAME = "stages one after the other, and generation beside the update"
GOAL = "none: what is gained in seconds, and lost in reward per nat, is reported"
LAST = 5
"""Iterations whose mean is the end of a run."""
SIDES: dict[str, dict[str, object]] = {
    "in turn, 2 workers, update on 2 threads": {"execution.num_workers": 2, "num_threads": 2},
    "in turn, 1 worker, update on 1 thread": {"execution.num_workers": 1, "num_threads": 1},
    "beside each other, 1 worker, update on 1 thread": {
        "execution.num_workers": 1,
        "num_threads": 1,
        "execution.overlap": True,
    },
}
IN_TURN, IN_TURN_ALIKE, OVERLAPPED = SIDES


def measure(effort: Effort) -> Result:
    """Two cores, used in turn or at the same time, over the same number of iterations."""
    sides = {side: lambda turn, side=side: _side(effort, side, turn) for side in SIDES}
    found = alternate(sides, effort.rounds)
    middle = {
        side: {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
        for side, turns in found.items()
    }
    gain = ratio(middle[IN_TURN]["seconds"], middle[OVERLAPPED]["seconds"])
    alike = ratio(middle[IN_TURN_ALIKE]["seconds"], middle[OVERLAPPED]["seconds"])
    per_nat = ratio(middle[OVERLAPPED]["per nat"], middle[IN_TURN]["per nat"])
    return Result(
        [
            Figure("iterations in the same time, against two workers and two threads in turn", gain, None, unit="x"),
            Figure("against one of each in turn", alike, None, unit="x"),
            Figure("score gained per nat, against in turn", per_nat, None, unit="x"),
        ],
        [
            Grid(
                "each side, medians",
                ("", "s an iteration", "score", "KL, nats", "score gained per nat"),
                [
                    [side, f"{of['seconds']:.3f}", f"{of['score']:.3f}", f"{of['kl']:.2f}", f"{of['per nat']:.3f}"]
                    for side, of in middle.items()
                ],
            )
        ],
        [f"score and KL: means of the last {LAST} iterations; gained: over the first iteration's score"],
        {"rounds": found},
    )


def _side(effort: Effort, side: str, turn: int) -> dict[str, Any]:
    settings = same_work(effort.world, critic="separate", threads=1, small=effort.small) | {
        "num_iterations": effort.size(WARM_UP + LAST, 40),
        "execution.num_shards": 2,
        "execution.threads_per_shard": 1,
        **SIDES[side],
    }
    name = side.replace(", ", "-").replace(" ", "-")
    run = train(effort.folder / f"{name}-{turn}", settings, threads=effort.threads)
    metrics = [run.manifest(i, "shape_rewards")["metrics"] for i in range(run.num_iterations)]
    score = statistics.fmean(m["objective/scores"] for m in metrics[-LAST:])
    kl = statistics.fmean(m["objective/kl"] for m in metrics[-LAST:])
    gained = score - metrics[0]["objective/scores"]
    seconds = statistics.median(run.seconds())
    effort.say(f"round {turn}: {side}: {seconds:.3f} s, score {score:.3f} at {kl:.2f} nats")
    return {"seconds": seconds, "score": score, "kl": kl, "per nat": gained / kl if kl > 0 else 0.0}
