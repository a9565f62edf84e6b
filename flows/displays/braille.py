"""Curves drawn with braille dots: each character holds two columns and four rows of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rich.text import Text

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of each dot of a character, by row and column."""
BLANK = 0x2800
Points = Sequence[tuple[float, float]]


def braille_plot(curves: Sequence[tuple[str, Points]], *, width: int, height: int, axes: tuple[str, str]) -> list[Text]:
    """Curves over each other, lines of text from the top down, with the ends of both axes written beside them.

    Args:
        curves: a style and the points of each; where two share a character, the later one gives its color.
        width: in characters, without the labels.
        height: in lines, without the labels; at least 2.
        axes: names of x and y.
    """
    points = [point for _, curve in curves for point in curve]
    (left, right), (bottom, top) = (_range([p[axis] for p in points]) for axis in (0, 1))
    bits = [[0] * width for _ in range(height)]
    styles = [[""] * width for _ in range(height)]
    for style, curve in curves:
        dots = [
            (round((x - left) / (right - left) * (2 * width - 1)), round((top - y) / (top - bottom) * (4 * height - 1)))
            for x, y in curve
        ]
        for column, row in _joined(dots):
            bits[row // 4][column // 2] |= DOTS[row % 4][column % 2]
            styles[row // 4][column // 2] = style
    low, high = ends(bottom, top)
    labels = [high, *[""] * (height - 2), low]
    margin = max(map(len, labels))
    lines = [Text(f"{'':{margin}} {axes[1]}", style="dim")]
    for label, row, style in zip(labels, bits, styles, strict=True):
        line = Text.assemble((f"{label:>{margin}} ┤" if label else f"{'':{margin}} │", "dim"))
        for bit, of in zip(row, style, strict=True):
            line.append(chr(BLANK + bit), style=of or None)
        lines.append(line)
    begin, end = ends(left, right)
    lines.append(Text(f"{'':{margin}} └{'─' * width}", style="dim"))
    between = axes[0].center(max(0, width - len(begin) - len(end)))
    lines.append(Text(f"{'':{margin}}  {begin}{between}{end}", style="dim"))
    return lines


def ends(low: float, high: float) -> tuple[str, str]:
    """How the ends of an axis are written; what is next to nothing beside its length is 0."""
    first, last = (f"{0.0 if abs(value) < 1e-3 * (high - low) else value:.3g}" for value in (low, high))
    return first, last


def _range(values: Sequence[float]) -> tuple[float, float]:
    """From the smallest to the largest, a little apart where they are one."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _joined(dots: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The dots, and those on straight lines between neighbours."""
    found = list(dots[:1])
    for (x0, y0), (x1, y1) in pairwise(dots):
        steps = max(abs(x1 - x0), abs(y1 - y0), 1)
        found += [(x0 + round((x1 - x0) * i / steps), y0 + round((y1 - y0) * i / steps)) for i in range(1, steps + 1)]
    return found
