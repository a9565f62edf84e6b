"""Line charts as SVG text for a page: no script, colors from the page's style sheet, numbers on hover.

A curve is a group of class ``run run-3``: the page says what color that is, and what happens while it is pointed at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 42
"""Margins."""
MOST_HOVERS: Final = 120
"""Places of a curve that tell their numbers."""
Point = tuple[float, float]
Mark = tuple[int, Point, Point, Point, str]
"""A measured point of a run: its number, the point, lows, highs, and what is told there."""


@dataclass(frozen=True)
class Curve:
    """One run's line."""

    run: int
    points: Sequence[Point]
    tips: Sequence[str]
    """What is told at each point."""
    faint: Sequence[Point] = ()
    """Drawn thin beneath it."""


@dataclass(frozen=True)
class Chart:
    """A panel: curves, and what stands between them."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    levels: Sequence[tuple[float, str, str]] = ()
    """Horizontal lines: (y, label, classes)."""
    backdrops: Sequence[tuple[str, Sequence[Point]]] = ()
    """Lines behind the curves: (label, points)."""
    marks: Sequence[Mark] = ()
    from_zero: bool = False
    ends: bool = False
    """Whether the end of each curve is marked."""


def svg(chart: Chart) -> str:
    """The chart as an ``<svg>`` element."""
    place = _Place.of(chart)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">',
        *_axes(chart, place),
    ]
    for level, label, classes in chart.levels:
        y = place.y(level)
        parts.append(f'<line class="level {classes}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="level-label {classes}" x="{WIDTH - RIGHT}" y="{y - 4:.1f}">{escape(label)}</text>')
    for label, points in chart.backdrops:
        parts.append(f'<path class="backdrop" d="{place.path(points)}"/>')
        x, y = place.xy(points[-1])
        parts.append(f'<text class="backdrop-label" x="{x - 4:.1f}" y="{y - 6:.1f}">{escape(label)}</text>')
    parts += [_curve(curve, place, ends=chart.ends) for curve in chart.curves]
    for run, at, low, high, tip in chart.marks:
        (x, y), (x0, y0), (x1, y1) = place.xy(at), place.xy(low), place.xy(high)
        parts.append(
            f'<g class="run run-{run}"><title>{escape(tip)}</title>'
            f'<path class="bar" d="M{x0:.1f} {y:.1f}H{x1:.1f}M{x:.1f} {y0:.1f}V{y1:.1f}"/>'
            f'<path class="mark" d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z"/></g>'
        )
    return "\n".join([*parts, "</svg>"])


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two, about so many: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(step * k, 12) + 0.0 for k in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class _Place:
    """From numbers to places on the panel."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]

    @classmethod
    def of(cls, chart: Chart) -> _Place:
        points = [p for curve in chart.curves for p in (*curve.points, *curve.faint)]
        points += [p for _, line in chart.backdrops for p in line]
        points += [p for _, _, low, high, _ in chart.marks for p in (low, high)]
        ys = [y for _, y in points] + [level for level, _, _ in chart.levels]
        return cls(_padded([x for x, _ in points], 0.0), _padded(ys, 0.04, from_zero=chart.from_zero))

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def xy(self, point: Point) -> Point:
        return self.x(point[0]), self.y(point[1])

    def path(self, points: Sequence[Point]) -> str:
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in map(self.xy, points))


def _padded(values: Sequence[float], share: float, *, from_zero: bool = False) -> tuple[float, float]:
    low, high = min(values), max(values)
    low = min(low, 0.0) if from_zero else low
    if high <= low:
        return low - 0.5, high + 0.5
    pad = share * (high - low)
    return (low if from_zero and low == 0 else low - pad), high + pad


def _axes(chart: Chart, place: _Place) -> list[str]:
    parts: list[str] = []
    for value in ticks(*place.y_range):
        y = place.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{value:g}</text>')
    for value in ticks(*place.x_range, about=7):
        x = place.x(value)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{value:g}</text>')
    floor = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="name" x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(chart.x)}</text>')
    return parts


def _curve(curve: Curve, place: _Place, *, ends: bool) -> str:
    parts = [f'<g class="run run-{curve.run}">']
    if curve.faint:
        parts.append(f'<path class="faint" d="{place.path(curve.faint)}"/>')
    parts.append(f'<path class="line" d="{place.path(curve.points)}"/>')
    if ends or len(curve.points) == 1:
        x, y = place.xy(curve.points[-1])
        parts.append(f'<circle class="end" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
    step = -(-len(curve.points) // MOST_HOVERS)
    for i in range(0, len(curve.points), step):
        x, y = place.xy(curve.points[i])
        tip = f"<title>{escape(curve.tips[i])}</title>"
        parts.append(f'<circle class="hover" cx="{x:.1f}" cy="{y:.1f}" r="7">{tip}</circle>')
    return "".join([*parts, "</g>"])
