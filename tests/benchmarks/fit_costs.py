"""Fits the cost model's coefficients to the points of rlhf_core/costs/points.json, and tells the held-out error.

    python -m benchmarks.fit_costs [--points FILE] [--dry]

For each kind of device: minimise Σ (predicted / measured - 1)² over the rows that are not held out, with coefficients
of at least 0 (Lawson & Hanson 1974, NNLS). What no point of a kind can tell is given, with its reason. Memory of a
CPU's process has two fitted numbers, what libraries take and a share of all that is counted; a GPU's has none.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from rlhf_core.costs.calibration import CALIBRATED_AS, FOLDER, Calibration, Deviation, Point, Row
from rlhf_core.costs.hardware import KINDS, parse_hardware
from rlhf_core.costs.memory import Overhead, device_memory
from rlhf_core.costs.seconds import seconds_of

ASSUMED = {"collectives": 1 / 0.8, "files": 1.0}
"""Never measured: collectives at 80 % of the published bandwidth, nothing of them overlapped; files at 1 GB/s."""
GIVEN: dict[str, dict[str, float]] = {
    "CPU2": ASSUMED | {"start": 0.0},
    "H200": ASSUMED | {"traffic": 1.0, "logits": 1.0, "optimizer": 1.0, "calls": 0.0, "digest": 1.0, "stage": 0.02},
}
"""Kind -> coefficients that its points cannot tell: at the published bandwidth; of what the host does, as on CPU2."""


NO_OVERHEAD = Overhead(0, 0)
"""Of a GPU: its one point is held out."""


def fit(kind: str, points: Sequence[Point]) -> Calibration:
    """The coefficients of a kind."""
    mine = [point for point in points if parse_hardware(point.hardware).kind_name == kind]
    given = GIVEN[kind]
    rows = [(point, row) for point in mine for row in point.rows if not row.held_out]
    unknown = sorted({name for point, row in rows for name in point.terms(row)} - set(given))
    left = np.array([[point.terms(row).get(name, 0.0) / row.seconds for name in unknown] for point, row in rows])
    right = np.array([1 - _given_seconds(point, row, given) / row.seconds for point, row in rows])
    found, _ = nnls(left, right)
    return Calibration(
        kind=kind,
        coefficients=given | {name: float(f"{value:.6g}") for name, value in zip(unknown, found, strict=True)},
        overhead=_overhead(mine) if KINDS[kind].is_cpu else NO_OVERHEAD,
        dtype=mine[0].workload.policy.dtype,
        fitted_rows=len(rows),
        source="; ".join(sorted({point.source for point in mine})),
    )


def _given_seconds(point: Point, row: Row, given: dict[str, float]) -> float:
    return sum(given[name] * ideal for name, ideal in point.terms(row).items() if name in given)


def _overhead(points: Sequence[Point]) -> Overhead:
    """What a process takes beside the counted parts: a constant, and a share of them."""
    seen = [(p.peak_bytes, _counted(p)) for p in points if p.peak_bytes and not p.memory_held_out]
    left = np.array([[1e6 / peak, counted / peak] for peak, counted in seen])
    megabytes, factor = nnls(left, np.ones(len(seen)))[0]
    return Overhead(round(megabytes * 1e6), float(f"{max(factor, 1) - 1:.3g}"))


def _counted(point: Point) -> float:
    return device_memory(point.workload, parse_hardware(point.hardware), NO_OVERHEAD).peak_bytes


def told(what: str, deviation: Deviation) -> str:
    """In words."""
    if not deviation.count:
        return f"{what}: nothing was held out"
    return f"{what}: median {deviation.median:.0%}, worst {deviation.worst:.0%} over {deviation.count}"


def report(found: Calibration, points: Sequence[Point]) -> None:
    """Every point, predicted against measured."""
    print(
        f"\n{found.kind}: {found.fitted_rows} rows fitted; "
        + ", ".join(f"{k} {v:.4g}" for k, v in found.coefficients.items())
    )
    for point in points:
        hardware = parse_hardware(point.hardware)
        if hardware.kind_name != found.kind:
            continue
        shown = [
            f"{row.stage}{'' if row.terms is None else '/' + '+'.join(row.terms)} {row.seconds:.4g} s "
            f"{seconds_of(point.terms(row), found.coefficients) / row.seconds - 1:+.0%}{' (held out)' * row.held_out}"
            for row in point.rows
        ]
        if point.peak_bytes:
            predicted = device_memory(point.workload, hardware, found.overhead).peak_bytes
            mark = " (held out)" * point.memory_held_out
            shown.append(f"memory {point.peak_bytes / 1e6:,.0f} MB {predicted / point.peak_bytes - 1:+.0%}{mark}")
        print(f"  {point.name}: " + ", ".join(shown))
    seconds, memory = found.deviations(points)
    print(f"  held-out error of {told('seconds', seconds)}; of {told('memory', memory)}")


def main() -> None:
    """Fit, report, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=Path, default=FOLDER / "points.json")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    given = parser.parse_args()
    points = [Point.from_json(tree) for tree in json.loads(given.points.read_text())]
    fitted: dict[str, Any] = {}
    for kind in sorted(set(CALIBRATED_AS.values())):
        found = fit(kind, points)
        report(found, points)
        fitted[kind] = {name: value for name, value in asdict(found).items() if name != "kind"}
    if not given.dry:
        (FOLDER / "coefficients.json").write_text(json.dumps(fitted, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
