"""The committed coefficients are what the committed points give; points they have not seen tell their error."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from benchmarks.fit_costs import GIVEN, fit
from small_workload import WORK

from rlhf_core.costs.calibration import FOLDER, Calibration, Point, Row, calibration, points
from rlhf_core.costs.hardware import KINDS, parse_hardware
from rlhf_core.costs.memory import Overhead, device_memory
from rlhf_core.costs.seconds import seconds_of

MEASURED = ("CPU2", "H200")


def of(kind: str) -> list[Point]:
    return [point for point in points() if parse_hardware(point.hardware).kind_name == kind]


@pytest.mark.parametrize("kind", MEASURED)
def test_the_coefficients_are_fitted_to_the_points(kind: str) -> None:
    """Run `python -m benchmarks.fit_costs` after points have changed."""
    found, kept = fit(kind, points()), calibration(kind)
    assert found.coefficients == pytest.approx(dict(kept.coefficients), rel=1e-3, abs=1e-9)
    assert found.overhead.process_bytes == pytest.approx(kept.overhead.process_bytes, rel=1e-6)
    assert (found.fitted_rows, found.dtype, found.source) == (kept.fitted_rows, kept.dtype, kept.source)


@pytest.mark.parametrize("kind", MEASURED)
def test_held_out_points_are_not_fitted(kind: str) -> None:
    def spoilt(*, held_out: bool) -> list[Point]:
        return [
            replace(p, rows=tuple(replace(r, seconds=3 * r.seconds) if r.held_out is held_out else r for r in p.rows))
            for p in points()
        ]

    assert fit(kind, spoilt(held_out=True)).coefficients == fit(kind, points()).coefficients
    assert fit(kind, spoilt(held_out=False)).coefficients != fit(kind, points()).coefficients


@pytest.mark.parametrize("kind", MEASURED)
def test_the_error_is_of_held_out_numbers_alone(kind: str) -> None:
    kept = calibration(kind)
    of_seconds, of_memory = kept.deviations(points())
    held_out = [row for point in of(kind) for row in point.rows if row.held_out]
    assert of_seconds.count == len(held_out) > 0
    assert of_memory.count == sum(point.memory_held_out for point in of(kind)) > 0
    worse = replace(kept, coefficients={name: 2 * value for name, value in kept.coefficients.items()})
    assert worse.deviations(points())[0].values == pytest.approx([2 * (1 + v) - 1 for v in of_seconds.values])


def test_memory_is_predicted_within_a_seventh() -> None:
    """Peaks do not depend on what else a machine does."""
    for kind in MEASURED:
        assert calibration(kind).deviations(points())[1].worst < 0.15, kind


def test_a_known_machine_is_found_again() -> None:
    """Points of a made-up machine, to the last coefficient."""
    true = {name: 1.5 + i for i, name in enumerate(calibration("CPU2").coefficients)} | GIVEN["CPU2"]
    works = [
        replace(p.workload, policy=replace(p.workload.policy, dtype="float32"))
        for p in of("CPU2")
        if not p.memory_held_out
    ]
    made: list[Point] = []
    for number, work in enumerate(works):
        blank = Point(str(number), "1xCPU2", 2, work, (), None, False, "made up")
        rows = [
            Row(stage, 1.0, None, False) for stage in ("generate", "score_rewards", "reference_logprobs", "ppo_update")
        ]
        told = tuple(replace(row, seconds=seconds_of(blank.terms(row), true)) for row in rows)
        memory = device_memory(work, parse_hardware("CPU2"), Overhead(500_000_000, 0.4)).peak_bytes
        made.append(replace(blank, rows=told, peak_bytes=memory))
    found = fit("CPU2", made)
    assert found.overhead.process_bytes == pytest.approx(5e8, rel=1e-3)
    assert found.overhead.share == pytest.approx(0.4, rel=1e-2)
    for point in made:
        for row in point.rows:
            assert seconds_of(point.terms(row), found.coefficients) == pytest.approx(row.seconds, rel=1e-3)


def test_every_kind_has_a_coefficient_for_every_term() -> None:
    from rlhf_core.costs.seconds import stage_terms

    assert [kind for kind in KINDS if calibration(kind).kind == kind] == list(MEASURED)
    for kind in KINDS:
        fitted: Calibration = calibration(kind)
        dtype = fitted.dtype
        model = replace(WORK.policy, dtype=dtype)
        work = replace(WORK, policy=model, reference=model, critic=model, rewards=(model,)).on(
            8 if kind != "CPU2" else 1
        )
        hardware = parse_hardware(kind if kind == "CPU2" else f"8x{kind}")
        for terms in stage_terms(work, hardware, 2).values():
            assert seconds_of(terms, fitted.coefficients) >= 0


def test_points_say_where_they_come_from() -> None:
    tree = json.loads((FOLDER / "points.json").read_text())
    assert all(point["source"] and point["rows"] for point in tree)
    assert len({(point["hardware"], point["name"]) for point in tree}) == len(tree)
