"""The same work as TRL's PPOTrainer: episodes a second from steady state, and peak memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.figures import Figure, alternate, median_of, ratio
from benchmarks.runs import train
from benchmarks.suite import Effort, Grid, Result
from benchmarks.trainings import NO_TRL, has_trl, train_peer
from benchmarks.world import BATCH_SIZE, EPOCHS, KL_COEF, LEARNING_RATE, MINIBATCHES, RESPONSE_LEN, same_work

NAME = "the same work as TRL 1.12's PPOTrainer"
GOAL = "2.5 times its episodes/s with a separate critic, 4 times with a shared trunk, 0.6 of its peak memory"
TRL, SEPARATE, SHARED = "TRL", "ours, separate critic", "ours, shared trunk"


def measure(effort: Effort) -> Result:
    """All sides in turns, each in a process of its own."""
    sides: dict[str, Callable[[int], dict[str, Any]]] = {
        SEPARATE: lambda turn: _ours(effort, "separate", turn),
        SHARED: lambda turn: _ours(effort, "shared", turn),
    }
    if has_trl():
        sides = {TRL: lambda turn: _theirs(effort, turn), **sides}
    found = alternate(sides, effort.rounds)
    rate = {side: _middle(found, side, "episodes_per_s") for side in (TRL, SEPARATE, SHARED)}
    peak = {side: _middle(found, side, "peak_bytes") for side in (TRL, SEPARATE, SHARED)}
    why_not = "" if has_trl() else "TRL not measured"
    return Result(
        [
            Figure("episodes/s, separate critic", ratio(rate[SEPARATE], rate[TRL]), 2.5, unit="x TRL", why_not=why_not),
            Figure("episodes/s, shared trunk", ratio(rate[SHARED], rate[TRL]), 4.0, unit="x TRL", why_not=why_not),
            Figure("peak memory, separate critic", ratio(peak[SEPARATE], peak[TRL]), 0.6, "at most", "x TRL", why_not),
        ],
        [Grid("each side", ("", "episodes/s", "s an update", "peak MB", "Prefect server MB"), _rows(found))],
        [
            f"batch {_batch(effort)}, {RESPONSE_LEN} tokens, {EPOCHS} epochs x {MINIBATCHES} minibatches, β {KL_COEF}, "
            f"rate {LEARNING_RATE:g}; ours is the full flow with Prefect, Arrow files and MLflow",
            *([] if has_trl() else [NO_TRL]),
        ],
        {"rounds": found},
    )


def _ours(effort: Effort, critic: str, turn: int) -> dict[str, Any]:
    folder = effort.folder / f"{critic}-{turn}"
    length = {"num_iterations": effort.size(5, 12)}
    settings = same_work(effort.world, critic=critic, threads=effort.threads, small=effort.small) | length
    run = train(folder, settings, threads=effort.threads)
    effort.say(f"round {turn}: ours, {critic}: {statistics.median(run.seconds()):.3f} s an update")
    return _side(effort, run.seconds(), run.ended.peak_bytes) | {"server_peak_bytes": run.ended.server_peak_bytes}


def _theirs(effort: Effort, turn: int) -> dict[str, Any]:
    options = {"updates": effort.size(5, 10), "batch": _batch(effort), "lr": LEARNING_RATE, "kl_coef": KL_COEF}
    done = train_peer(effort.folder / f"trl-{turn}", effort.world, threads=effort.threads, **options)
    effort.say(f"round {turn}: TRL: {statistics.median(done.seconds()):.3f} s an update")
    return _side(effort, done.seconds(), done.peak_bytes) | {"server_peak_bytes": 0}


def _side(effort: Effort, seconds: list[float], peak: int) -> dict[str, Any]:
    return {
        "episodes_per_s": _batch(effort) / statistics.median(seconds),
        "seconds": seconds,
        "peak_bytes": peak,
    }


def _batch(effort: Effort) -> int:
    return effort.size(8, BATCH_SIZE)


def _middle(found: dict[str, list[dict[str, Any]]], side: str, name: str) -> float | None:
    return median_of([turn[name] for turn in found.get(side, [])])


def _rows(found: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    rows: list[list[str]] = []
    for side, turns in found.items():
        rate, peak, server = (
            statistics.median(turn[name] for turn in turns)
            for name in ("episodes_per_s", "peak_bytes", "server_peak_bytes")
        )
        update = statistics.median(s for turn in turns for s in turn["seconds"])
        rows.append(
            [side, f"{rate:.1f}", f"{update:.3f}", f"{peak / 1e6:,.0f}", f"{server / 1e6:,.0f}" if server else ""]
        )
    return rows
