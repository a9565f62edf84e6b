"""Charts as SVG: ticks, places, and how much is told."""

from __future__ import annotations

import re

import pytest

from tasks.reports.svg_charts import BOTTOM, HEIGHT, LEFT, MOST_HOVERS, RIGHT, TOP, WIDTH, Chart, Curve, svg, ticks


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.0, 10.0, [0, 2, 4, 6, 8, 10]),
        (-0.3, 1.1, [0, 0.5, 1]),
        (0.0, 0.05, [0, 0.01, 0.02, 0.03, 0.04, 0.05]),
        (3.0, 3.004, [3, 3.001, 3.002, 3.003, 3.004]),
        (0.0, 1e6, [0, 2e5, 4e5, 6e5, 8e5, 1e6]),
    ],
)
def test_ticks_are_round(low: float, high: float, wanted: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(wanted)


def test_a_line_runs_from_corner_to_corner() -> None:
    points = [(0.0, 0.0), (4.0, 2.0)]
    drawn = svg(Chart("t", "x", "y", [Curve(3, points, ["a", "b"])], from_zero=True))
    found = re.search(r'class="run run-3"><path class="line" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', drawn)
    assert found is not None
    x0, y0, x1, y1 = map(float, found.groups())
    assert (x0, y0, x1) == (LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT)
    assert TOP <= y1 < TOP + 0.05 * HEIGHT, "a little room above"


def test_a_long_curve_tells_only_some_of_its_numbers() -> None:
    points = [(float(i), float(i)) for i in range(1000)]
    drawn = svg(Chart("t", "x", "y", [Curve(0, points, ["&"] * 1000)]))
    assert 50 < drawn.count("<title>&amp;</title>") <= MOST_HOVERS
