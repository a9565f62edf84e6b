"""Curves of braille dots: small ones, drawn by hand."""

from __future__ import annotations

from flows.displays.braille import braille_plot, ends


def drawn(*curves: list[tuple[float, float]], width: int = 4, height: int = 2) -> list[str]:
    lines = braille_plot([("", curve) for curve in curves], width=width, height=height, axes=("x", "y"))
    return [line.plain for line in lines]


def test_a_rising_line_and_its_axes() -> None:
    lines = drawn([(0.0, 0.0), (7.0, 7.0)])
    assert lines == ["  y", "7 ┤⠀⠀⡠⠊", "0 ┤⡠⠊⠀⠀", "  └────", "   0x 7"]


def test_one_point_and_a_flat_line_have_a_place() -> None:
    assert any("⠁" <= c <= "⣿" for line in drawn([(1.0, 5.0)]) for c in line)
    assert len({len(line) for line in drawn([(0.0, 2.0), (3.0, 2.0)])[1:3]}) == 1


def test_the_later_curve_colors_what_they_share() -> None:
    line = [(0.0, 0.0), (1.0, 1.0)]
    lines = braille_plot([("red", line), ("blue", line)], width=2, height=2, axes=("x", "y"))
    assert {str(span.style) for span in lines[1].spans} == {"dim", "blue"}


def test_ends_of_an_axis_are_short() -> None:
    assert ends(-8.3e-08, 3.7123) == ("0", "3.71")
    assert ends(0.1, 0.1) == ("0.1", "0.1")
    assert ends(-0.0852, 2.54) == ("-0.0852", "2.54")
