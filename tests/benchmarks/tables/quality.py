"""Seconds until the policy is good: the mean score of five consecutive iterations at the threshold."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.figures import Figure, alternate, median_of, ratio
from benchmarks.runs import train
from benchmarks.suite import Effort, Grid, Result
from benchmarks.trainings import NO_TRL, has_trl, train_peer
from benchmarks.world import BATCH_SIZE, KL_COEF, ROOT

NAME = "seconds to a score"
GOAL = "a quarter of the seconds of TRL at its better rate, at a lower KL"
CONFIG = ROOT / "deployments" / "configs" / "reviews-fast.yaml"
WINDOW = 5
RATES = (1e-4, 3e-4)
OURS = "ours, reviews-fast.yaml"


def measure(effort: Effort) -> Result:
    """Ours and TRL at both rates in turns; TRL stops once it is there, or at 100 updates."""
    sides: dict[str, Callable[[int], dict[str, Any]]] = {OURS: lambda turn: _ours(effort, turn)}
    if has_trl():
        sides |= {f"TRL, rate {rate:g}": lambda turn, r=rate: _theirs(effort, r, turn) for rate in RATES}
    found = alternate(sides, effort.rounds)
    seconds = {side: _middle(turns, "seconds") for side, turns in found.items()}
    kl = {side: _middle(turns, "kl") for side, turns in found.items()}
    better = min((side for side in found if side != OURS), key=lambda side: _or_never(seconds[side]), default=None)
    theirs = None if better is None else seconds[better]
    own, compared = _or_never(seconds[OURS]), better is not None and theirs is not None
    why_not = "" if compared else "TRL not measured" if better is None else "TRL did not reach it"
    times = own / theirs if compared and theirs else None
    nats = ratio(kl[OURS], kl[better]) if compared and better else None
    return Result(
        [
            Figure(f"seconds to a score of {effort.threshold:g}", times, 0.25, "at most", "x TRL", why_not),
            Figure("KL there", nats, 1.0, "at most", "x TRL", why_not),
        ],
        [Grid("each side", ("", "reached", "seconds", "with start-up", "KL, nats", "updates"), _rows(found))],
        [
            f"mean score of {WINDOW} consecutive iterations; KL of the same five, summed over a response's tokens; "
            "the clock starts with the first iteration (TRL: with training), ours includes loading the models",
            *([] if better is None else [f"the better of TRL's rates: {better}"]),
            *([] if has_trl() else [NO_TRL]),
        ],
        {"rounds": found, "threshold": effort.threshold},
    )


def first_window(scores: Sequence[float], threshold: float, window: int = WINDOW) -> int | None:
    """Index of the last of the first ``window`` consecutive entries whose mean is there; None: never."""
    for end in range(window, len(scores) + 1):
        if statistics.fmean(scores[end - window : end]) >= threshold:
            return end - 1
    return None


def _ours(effort: Effort, turn: int) -> dict[str, Any]:
    settings = effort.world.settings() | {"seed": 1, "num_threads": effort.threads, "device": "cpu"}
    settings |= {"num_iterations": 60}  # its rate is constant, so that more of them change none before
    if effort.small:
        settings |= {"num_iterations": 6, "prompts.batch_size": 8}
    run = train(effort.folder / f"ours-{turn}", settings, threads=effort.threads, config=CONFIG)
    metrics = [run.manifest(i, "shape_rewards")["metrics"] for i in range(run.num_iterations)]
    ends = [run.committed(i, "ppo_update") for i in range(run.num_iterations)]
    found = _told(
        [m["objective/scores"] for m in metrics],
        [m["objective/kl"] for m in metrics],
        [end - run.began for end in ends],
        startup=run.began - run.ended.began,
        threshold=effort.threshold,
    )
    effort.say(f"round {turn}: {OURS}: {_text(found['seconds'])} s")
    return found


def _theirs(effort: Effort, rate: float, turn: int) -> dict[str, Any]:
    options = {"updates": effort.size(6, 100), "batch": effort.size(8, BATCH_SIZE), "kl_coef": KL_COEF}
    options |= {"lr": rate, "until": effort.threshold}
    done = train_peer(effort.folder / f"trl-{rate:g}-{turn}", effort.world, threads=effort.threads, **options)
    found = _told(
        [u["scores"] for u in done.updates],
        [u["kl"] for u in done.updates],
        [u["seconds"] for u in done.updates],
        startup=max(done.ended.seconds - done.updates[-1]["seconds"], 0.0),
        threshold=effort.threshold,
    )
    effort.say(f"round {turn}: TRL, rate {rate:g}: {_text(found['seconds'])} s")
    return found


def _told(
    scores: list[float], kl: list[float], clock: list[float], *, startup: float, threshold: float
) -> dict[str, Any]:
    end = first_window(scores, threshold)
    last = len(scores) - 1 if end is None else end
    return {
        "seconds": None if end is None else clock[end],
        "with_startup": None if end is None else clock[end] + startup,
        "kl": statistics.fmean(kl[max(last + 1 - WINDOW, 0) : last + 1]),
        "updates": last + 1,
        "curve": [list(point) for point in zip(clock, scores, kl, strict=True)],
    }


def _middle(turns: list[dict[str, Any]], name: str) -> float | None:
    """None unless every turn has it."""
    values = [turn[name] for turn in turns]
    return None if None in values else median_of(values)


def _or_never(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds


def _text(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f}"


def _rows(found: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    rows: list[list[str]] = []
    for side, turns in found.items():
        reached = sum(turn["seconds"] is not None for turn in turns)
        seconds, whole = (_text(_middle(turns, name)) for name in ("seconds", "with_startup"))
        updates = statistics.median(turn["updates"] for turn in turns)
        kl = statistics.median(turn["kl"] for turn in turns)
        rows.append([side, f"{reached} of {len(turns)}", seconds, whole, f"{kl:.2f}", f"{updates:g}"])
    return rows
