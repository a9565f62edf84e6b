"""What came out of one run, in the numbers by which runs are compared. Works while the run is going."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.records import read_record
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.evaluation.folder import EvaluationFolder
from rlhf_core.inspection import Row, iteration_rows

LAST: Final = 5
"""Iterations that are averaged at the end of a run, and wherever its best is looked for."""
AVERAGED: Final = ("score", "kl", "beta", "entropy", "length", "clip_fraction")
"""Columns of ``iteration_rows`` that are averaged at the end."""
EVALUATED: Final = ("score", "kl", "win_rate", "share_of_attainable")
"""Numbers that are taken from an evaluation."""
MIN_KL: Final = 0.01
"""Nats below which a gain is not divided by them."""
Standing = Literal["working", "stopped", "finished"]


@dataclass(frozen=True)
class Spread:
    """A mean and the standard deviation around it; None of a single number."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Mean and sample standard deviation of at least one number."""
        mean = math.fsum(values) / len(values)
        if len(values) == 1:
            return cls(mean, None)
        return cls(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)))


@dataclass(frozen=True)
class Evaluated:
    """The newest evaluation of a run: of its newest policy, not blended."""

    folder: str
    policy: str
    numbers: Mapping[str, Any]
    """``EVALUATED``, each as {mean, low, high}; the share may be None."""
    reference_score: float
    frontier: Sequence[tuple[float, float]]
    """(KL, score) of what is attainable, as far as its samples can be trusted."""


@dataclass(frozen=True)
class Outcome:
    """One run, summed up."""

    run: RunFolder
    name: str
    """By which it is told from the others."""
    standing: Standing
    rows: Sequence[Row]
    """One a finished iteration: see ``iteration_rows``."""
    num_averaged: int
    end: Mapping[str, Spread]
    """Over the last ``num_averaged`` iterations: see ``AVERAGED``."""
    gain_per_nat: float | None
    """Score above that of the first batch, by the KL it took; None where that batch is not the reference's."""
    best_score: float
    """The best mean over ``num_averaged`` iterations in a row."""
    best_kl: float
    """The mean KL of these iterations."""
    best_until: int
    """The last of these iterations."""
    seconds: float
    """Of all stages together."""
    evaluated: Evaluated | None

    @property
    def seconds_per_iteration(self) -> float:
        """A mean over all iterations."""
        return self.seconds / len(self.rows)

    @property
    def kl_target(self) -> float | None:
        """The KL that its controller holds."""
        return self.run.config.kl.held_at


def outcome(run: RunFolder, name: str, last: int = LAST, evaluated: Evaluated | None = None) -> Outcome:
    """Sum up a run of at least one finished iteration.

    Args:
        run: its folder.
        name: by which it is told from others.
        last: iterations averaged at the end; all, where there are fewer.
        evaluated: its newest evaluation.
    """
    rows = iteration_rows(run)
    num = min(last, len(rows))
    end = {column: Spread.of([row[column] for row in rows[-num:]]) for column in AVERAGED}
    windows = [rows[i : i + num] for i in range(len(rows) - num + 1)]
    best = max(windows, key=lambda window: _mean(window, "score"))
    return Outcome(
        run=run,
        name=name,
        standing=_standing(run, len(rows)),
        rows=rows,
        num_averaged=num,
        end=end,
        gain_per_nat=_gain_per_nat(run, rows, end),
        best_score=_mean(best, "score"),
        best_kl=_mean(best, "kl"),
        best_until=best[-1]["iteration"],
        seconds=math.fsum(row["seconds"] for row in rows),
        evaluated=evaluated,
    )


def smoothed(values: Sequence[float], window: int = LAST) -> list[float]:
    """Each value's mean with those before it, ``window`` in all, fewer at the beginning."""
    found: list[float] = []
    for i in range(len(values)):
        part = values[max(0, i + 1 - window) : i + 1]
        found.append(math.fsum(part) / len(part))
    return found


def newest_evaluation(run: RunFolder) -> Evaluated | None:
    """The finished evaluation inside the run folder that was written last; of its checkpoints, the newest.

    Raises: IntegrityError if it is damaged, or of another form than this release writes.
    """
    summaries = (run.path / "evaluations").glob("*/summary.json")
    newest = max(summaries, key=lambda path: path.stat().st_mtime_ns, default=None)
    if newest is None:
        return None
    there = EvaluationFolder.open(newest.parent)
    summary, frontier = there.summary(), there.frontier()
    try:
        policy = max(name for name, numbers in summary["policies"].items() if numbers["blend"] == 1)
        numbers = {name: summary["policies"][policy][name] for name in EVALUATED}
        reference_score = summary["reference"]["score"]["mean"]
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{newest} is not a summary as this release writes it ({error!r}); remove {newest.parent}, or evaluate "
            "again"
        ) from None
    attainable = [(row["kl"], row["score"]) for row in frontier if row["trusted"]]
    return Evaluated(str(newest.parent), policy, numbers, reference_score, attainable)


def _mean(rows: Sequence[Row], column: str) -> float:
    return math.fsum(row[column] for row in rows) / len(rows)


def _gain_per_nat(run: RunFolder, rows: Sequence[Row], end: Mapping[str, Spread]) -> float | None:
    kl = end["kl"].mean
    if not run.config.starts_at_reference or len(rows) < 2 or kl < MIN_KL:
        return None
    return (end["score"].mean - rows[0]["score"]) / kl


def _standing(run: RunFolder, finished: int) -> Standing:
    if run.is_locked():
        return "working"
    guards = run.path / "guards.json"
    stopped = guards.is_file() and read_record(guards).get("stopped")
    is_whole = finished == run.config.num_iterations and (run.path / "before_after.json").is_file()
    return "finished" if is_whole and not stopped else "stopped"
