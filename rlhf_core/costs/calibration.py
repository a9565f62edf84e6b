"""Measured points, and the coefficients that were fitted to some of them; the others tell how far off they are.

``points.json`` is measured by ``python -m benchmarks.cost_points`` (or written down from this repository's tables, with
their place); ``coefficients.json`` is written by ``python -m benchmarks.fit_costs``, never by hand.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rlhf_core.costs.hardware import parse_hardware
from rlhf_core.costs.memory import Overhead, device_memory
from rlhf_core.costs.seconds import seconds_of, stage_terms
from rlhf_core.costs.workload import Workload

FOLDER: Final = Path(__file__).parent
CALIBRATED_AS: Final = {"CPU2": "CPU2", "A100": "H200", "H100": "H200", "H200": "H200"}
"""Kind -> the kind whose points its coefficients come from."""


@dataclass(frozen=True)
class Row:
    """One measured number of seconds: of a stage, or of some terms of it."""

    stage: str
    seconds: float
    terms: tuple[str, ...] | None
    """None: all of the stage."""
    held_out: bool


@dataclass(frozen=True)
class Point:
    """One measured workload."""

    name: str
    hardware: str
    threads: int
    workload: Workload
    rows: tuple[Row, ...]
    peak_bytes: float | None
    memory_held_out: bool
    source: str

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Point:
        """As it stands in points.json."""
        rows = tuple(
            Row(row["stage"], row["seconds"], tuple(row["terms"]) if "terms" in row else None, row["held_out"])
            for row in tree["rows"]
        )
        return cls(
            name=tree["name"],
            hardware=tree["hardware"],
            threads=tree["threads"],
            workload=Workload.from_json(tree["workload"]),
            rows=rows,
            peak_bytes=tree["peak_bytes"],
            memory_held_out=tree["memory_held_out"],
            source=tree["source"],
        )

    def terms(self, row: Row) -> dict[str, float]:
        """Term -> ideal seconds, of what a row measured."""
        hardware = parse_hardware(self.hardware)
        all_terms = stage_terms(self.workload, hardware, self.threads)[row.stage]
        return {name: ideal for name, ideal in all_terms.items() if row.terms is None or name in row.terms}


@dataclass(frozen=True)
class Deviation:
    """How far predictions are from what was measured, relative; of points that the fit has not seen."""

    values: tuple[float, ...]

    @property
    def count(self) -> int:
        """Of measured numbers."""
        return len(self.values)

    @property
    def median(self) -> float:
        """Of the sizes."""
        return statistics.median(map(abs, self.values))

    @property
    def worst(self) -> float:
        """The largest size."""
        return max(map(abs, self.values))


@dataclass(frozen=True)
class Calibration:
    """Of one kind of device."""

    kind: str
    coefficients: Mapping[str, float]
    overhead: Overhead
    dtype: str
    """Of the computation that was measured."""
    fitted_rows: int
    """Measured seconds that the coefficients were fitted to."""
    source: str

    def deviations(self, points: Sequence[Point]) -> tuple[Deviation, Deviation]:
        """(of seconds, of memory), over the held-out numbers of this kind's points."""
        of_seconds: list[float] = []
        of_memory: list[float] = []
        for point in points:
            if parse_hardware(point.hardware).kind_name != self.kind:
                continue
            held_out = [row for row in point.rows if row.held_out]
            of_seconds += [seconds_of(point.terms(row), self.coefficients) / row.seconds - 1 for row in held_out]
            if point.peak_bytes and point.memory_held_out:
                memory = device_memory(point.workload, parse_hardware(point.hardware), self.overhead)
                of_memory.append(memory.peak_bytes / point.peak_bytes - 1)
        return Deviation(tuple(of_seconds)), Deviation(tuple(of_memory))


@functools.cache
def points() -> tuple[Point, ...]:
    """All that were measured."""
    return tuple(Point.from_json(tree) for tree in json.loads((FOLDER / "points.json").read_text()))


@functools.cache
def calibration(kind: str) -> Calibration:
    """Of a kind of device, or of the one that stands in for it."""
    tree = json.loads((FOLDER / "coefficients.json").read_text())[CALIBRATED_AS[kind]]
    return Calibration(kind=CALIBRATED_AS[kind], **{**tree, "overhead": Overhead(**tree["overhead"])})
