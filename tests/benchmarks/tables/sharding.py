"""What workers gain, and what it costs to have one."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.figures import Figure, alternate, ratio
from benchmarks.runs import WARM_UP, Training, train
from benchmarks.suite import Effort, Grid, Result
from benchmarks.world import same_work

NAME = "generation, scoring and reference log-probs by two workers, by one, and by none"
GOAL = "two workers of one thread at least 1.8 x one; one worker at most 5 % more than none"
STAGES, GENERATE = "the three stages", "generate"
SIDES = {"two workers": 2, "one worker": 1, "no worker": 0}


def measure(effort: Effort) -> Result:
    """The same two shards of one thread each, computed by each in turns."""
    sides = {side: lambda turn, side=side: _side(effort, side, turn) for side in SIDES}
    found = alternate(sides, effort.rounds)
    seconds = {
        side: {name: statistics.median(s for turn in turns for s in turn[name]) for name in (STAGES, GENERATE)}
        for side, turns in found.items()
    }
    gain = ratio(seconds["one worker"][STAGES], seconds["two workers"][STAGES])
    cost = seconds["one worker"][GENERATE] / seconds["no worker"][GENERATE] - 1
    return Result(
        [
            Figure("two workers over one, the three stages", gain, 1.8, unit="x"),
            Figure("cost of one worker over none, generate", cost * 100, 5.0, "at most", "%"),
        ],
        [
            Grid(
                "seconds an iteration",
                ("", STAGES, GENERATE),
                [[side, f"{of[STAGES]:.3f}", f"{of[GENERATE]:.3f}"] for side, of in seconds.items()],
            )
        ],
        [
            "without workers scoring and reference run side by side in the process of the run, on two cores: "
            "one worker is held against none in generation alone",
        ],
        {"seconds": found},
    )


def _side(effort: Effort, side: str, turn: int) -> dict[str, Any]:
    settings = same_work(effort.world, critic="separate", threads=1, small=effort.small) | {
        "num_iterations": WARM_UP + effort.size(2, 8),
        "prompts.batch_size": effort.size(8, 256),
        "ppo.num_ppo_epochs": 1,
        "execution.num_shards": 2,
        "execution.threads_per_shard": 1,
        "execution.num_workers": SIDES[side],
    }
    run = train(effort.folder / f"{side.replace(' ', '-')}-{turn}", settings, threads=1)
    spans = [_spans(run, iteration) for iteration in range(WARM_UP, run.num_iterations)]
    found = {name: [span[name] for span in spans] for name in (STAGES, GENERATE)}
    effort.say(f"round {turn}: {side}: {statistics.median(found[STAGES]):.3f} s for the three stages")
    return found


def _spans(run: Training, iteration: int) -> dict[str, float]:
    """Seconds from commit to commit, whatever happens in between."""
    begun = run.committed(iteration, "sample_prompts")
    scored = max(run.committed(iteration, stage) for stage in ("score_rewards", "reference_logprobs"))
    return {STAGES: scored - begun, GENERATE: run.committed(iteration, "generate") - begun}
