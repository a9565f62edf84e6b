"""What the runs of a sweep say together: a row a point, with intervals over seeds, and the best of them.

A run's score and KL are means of its last iterations, of the samples that it was trained on. The seed is the
independent unit, so every interval is Student's over seeds; one seed has none.

The best point is chosen among those whose every seed has finished (a point that diverges in one seed of three would
else be judged by the two that it spared), by one of two criteria:

    at_kl    highest score among the points whose KL is at most this many nats
    price    highest score - price x KL otherwise: RLHF's objective, at one price of a nat for every point. It is the
             kl.coef of the config that the sweep was begun with, never a point's own: with its own β each point would
             be measured by another ruler, and the smallest β would win by being cheap.

Points share their seeds, and thereby prompts and random numbers, so the lead of the best over the next is an interval
of paired differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.ops.comparison import interval
from rlhf_core.sweeping.equal import equal_points
from rlhf_core.sweeping.folder import SweepFolder
from rlhf_core.sweeping.grid import point_label

EDGE: Final = 5
"""Iterations averaged at the end of a run; of a short one half."""
MIN_KL: Final = 0.01
"""Nats below which a reward per nat is no number."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Criterion:
    """What makes a point better than another.

    Example: ``Criterion(price=0.2, at_kl=None)``
    """

    price: float
    """Score that a nat of KL must buy."""
    at_kl: float | None = None
    """Nats that a point may have at most; then the price is not asked."""

    def value(self, numbers: Mapping[str, float]) -> float:
        """Of a run: higher is better."""
        return numbers["score"] if self.at_kl is not None else numbers["score"] - self.price * numbers["kl"]

    @property
    def sentence(self) -> str:
        """What it is, to a person."""
        if self.at_kl is not None:
            return f"highest score among the points whose KL is at most {self.at_kl:g} nats"
        return f"highest score - {self.price:g} x KL, the same price of a nat for every point"


def criterion_of(kl_coef: float, at_kl: float | None, price: float | None) -> Criterion:
    """The criterion that a user asks for.

    Args:
        kl_coef: of the config that the sweep was begun with: the price where none is given.
        at_kl: nats.
        price: score for a nat.
    Raises: UserError if both are given, or one is no number of its kind.
    """
    problems: list[str] = []
    if at_kl is not None and price is not None:
        problems.append("--at-kl and --price are both given; the best point is chosen by one of them: leave one out")
    if at_kl is not None and not (math.isfinite(at_kl) and at_kl > 0):
        problems.append(f"--at-kl is {at_kl:g}; give a number of nats above 0")
    if price is not None and not (math.isfinite(price) and price >= 0):
        problems.append(f"--price is {price:g}; give the score that a nat of KL must buy, 0 or more")
    if problems:
        raise UserError(*problems)
    return Criterion(kl_coef if price is None else price, at_kl)


def run_numbers(run: RunFolder) -> dict[str, float]:
    """Score and KL at the end of a finished run, and the score that it has gained since its first iteration.

    A run that was extended since is read up to where the others end.
    """
    last = min(run.num_iterations_begun_with, run.num_finished())
    edge = min(EDGE, max(1, last // 2))
    first = _metrics(run, 0)["objective/scores"]
    ends = [_metrics(run, iteration) for iteration in range(last - edge, last)]
    score, kl = (sum(metrics[name] for metrics in ends) / edge for name in ("objective/scores", "objective/kl"))
    return {"score": score, "kl": kl, "gain": score - first}


def summarize(there: SweepFolder, criterion: Criterion, failures: Mapping[str, str]) -> dict[str, Any]:
    """The results of a sweep, as plain JSON.

    Args:
        there: the sweep.
        criterion: by which the best point is chosen.
        failures: name of a run that has failed -> why.
    """
    runs: list[Row] = []
    for run in there.runs:
        standing = there.standing(run)
        row: Row = {"name": run.name, "point": run.point, "seed": run.seed, "finished": standing.is_finished}
        row |= {"iterations": standing.finished, "of": standing.of, "failure": None}
        if standing.is_finished:
            numbers = run_numbers(RunFolder.open(there.run_path(run)))
            row |= {**numbers, "value": criterion.value(numbers)}
        else:
            row["failure"] = failures.get(run.name) or standing.problem or _unfinished(standing.stopped_by)
        runs.append(row)
    points = [_point(i, values, [r for r in runs if r["point"] == i]) for i, values in enumerate(there.points)]
    _mark_frontier(points)
    equal = equal_points(there, points, runs)
    return {
        "grid": {key: list(values) for key, values in there.grid.items()},
        "seeds": list(there.seeds),
        "criterion": {"sentence": criterion.sentence, "price": criterion.price, "at_kl": criterion.at_kl},
        "best": choose(points, runs, criterion, equal),
        "equal": equal,
        "points": points,
        "runs": runs,
    }


def choose(
    points: Sequence[Row], runs: Sequence[Row], criterion: Criterion, equal: Sequence[Row] = ()
) -> dict[str, Any]:
    """The best point, the next one, and the lead over it.

    Args:
        points: rows of :func:`summarize`.
        runs: likewise.
        criterion: what is better.
        equal: groups of points that came out exactly equal.
    Returns: ``point`` is null where there is none, with the reason in ``note``.
    """
    none: dict[str, Any] = {"point": None, "next": None, "lead": None}
    complete = [p for p in points if p["finished"] == p["of"]]
    if not complete:
        return none | {"note": "no point has finished with all of its seeds"}
    allowed = [p for p in complete if criterion.at_kl is None or p["kl"]["mean"] <= criterion.at_kl]
    if not allowed:
        lowest = min(complete, key=lambda p: p["kl"]["mean"])
        return none | {
            "note": f"no point's KL is at most {criterion.at_kl:g} nats; the lowest is {lowest['kl']['mean']:.2f}, "
            f"of {lowest['label']}"
        }
    order = sorted(allowed, key=lambda p: -p["value"]["mean"])
    if len(order) == 1:
        return none | {"point": order[0]["point"], "note": "there is no other point to compare it with"}
    ahead, behind = ({r["seed"]: r["value"] for r in runs if r["point"] == p["point"]} for p in order[:2])
    lead = _interval([ahead[seed] - behind[seed] for seed in ahead])
    note = ""
    same = next((group for group in equal if {p["point"] for p in order[:2]} <= {*group["points"]}), None)
    if same is not None:
        note = f"more seeds would tell nothing: {same['why']}"
    elif lead["low"] is None:
        note = "one seed tells no difference from chance: give --seeds 3 or more"
    elif lead["low"] <= 0:
        note = "which may be chance: more seeds would tell"
    return {"point": order[0]["point"], "next": order[1]["point"], "lead": lead, "note": note}


def _point(index: int, values: Mapping[str, Any], runs: Sequence[Row]) -> Row:
    done = [run for run in runs if run["finished"]]
    row: Row = {"point": index, "values": dict(values), "label": point_label(values)}
    row |= {"finished": len(done), "of": len(runs)}
    for name in ("score", "kl", "gain", "value"):
        row[name] = _interval([run[name] for run in done]) if done else None
    row["gain_per_nat"] = _per_nat(done)
    return row | {"on_frontier": False}


def _interval(values: Sequence[float], per: Sequence[float] | None = None) -> dict[str, float | None]:
    """Mean, or ratio of two means, with its 95 % interval over seeds: none of one seed."""
    over = None if per is None else torch.tensor(per, dtype=torch.float64)
    if len(values) == 1:
        return {"mean": values[0] / (1.0 if per is None else per[0]), "low": None, "high": None}
    found = interval(torch.tensor(values, dtype=torch.float64), over)
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _per_nat(done: Sequence[Row]) -> dict[str, float | None] | None:
    """Gained score for a nat of KL; None where a seed has hardly moved."""
    if not done or min(run["kl"] for run in done) < MIN_KL:
        return None
    return _interval([run["gain"] for run in done], [run["kl"] for run in done])


def _mark_frontier(points: Sequence[Row]) -> None:
    """Mark the points that no other one beats in both score and KL."""
    there = [p for p in points if p["finished"] == p["of"]]
    for p in there:
        score, kl = p["score"]["mean"], p["kl"]["mean"]
        p["on_frontier"] = not any(
            o["score"]["mean"] >= score
            and o["kl"]["mean"] <= kl
            and (o["score"]["mean"], o["kl"]["mean"]) != (score, kl)
            for o in there
        )


def _unfinished(stopped_by: str | None) -> str:
    return f"stopped by a guard: {stopped_by}" if stopped_by else "not finished"


def _metrics(run: RunFolder, iteration: int) -> dict[str, float]:
    return {k: v for manifest in run.manifests(iteration).values() for k, v in manifest.metrics.items()}
