"""The number that a text ends with: worked by hand, row by row."""

from __future__ import annotations

import pytest

from rlhf_core.rewards.numbers import last_number

READ = [
    # fractions
    ("1/2", 0.5),
    ("3 / 4", 0.75),
    ("-1/2", -0.5),
    ("the rest is 3/4 cup", 0.75),
    ("1 1/2", 1.5),
    ("-1 1/2", -1.5),
    ("½", 0.5),
    ("1½", 1.5),
    (r"\frac{1}{2}", 0.5),
    (r"\dfrac{3}{4}", 0.75),
    (r"\tfrac12", 0.5),
    (r"\frac 1 2", 0.5),
    (r"-\frac{1}{4}", -0.25),
    (r"\frac{-1}{4}", -0.25),
    (r"\frac{1,000}{4}", 250.0),
    (r"2\frac{1}{2}", 2.5),
    (r"\boxed{\frac{3}{8}}", 0.375),
    # marks of the answer
    (r"so \boxed{72}", 72.0),
    (r"\boxed{72}, since 70 + 2 is that", 72.0),
    (r"\boxed{3} no, \boxed{x = 4}", 4.0),
    (r"\boxed{1 + 2 = 3}", 3.0),
    ("48/2 = <<48/2=24>>24 and 24 + 48 = 72\n#### 72", 72.0),
    ("#### 1,200", 1200.0),
    ("#### -3/4", -0.75),
    # thousands, decimals, powers of ten
    ("1,072", 1072.0),
    ("1,234,567.8", 1234567.8),
    (r"7{,}200", 7200.0),
    (r"10,\!000", 10000.0),
    (r"1\,200", 1200.0),
    ("7\u202f200", 7200.0),
    ("7'200", 7200.0),
    (".5", 0.5),
    ("12.", 12.0),
    ("6e3", 6000.0),
    ("6.02 × 10^23", 6.02e23),
    (r"3 \times 10^{-2}", 0.03),
    ("10^{5}", 1e5),
    # signs, units, per cent, digits of others
    ("-3", -3.0),
    ("(−3)", -3.0),
    ("x - 3", 3.0),
    ("5-3", 3.0),
    ("50 %", 50.0),
    (r"72\%", 72.0),
    ("$72.00", 72.0),
    (r"\$72", 72.0),
    ("72 km/h", 72.0),
    (r"72^{\circ}", 72.0),
    (r"72\text{ cm}^2", 72.0),
    ("72 cm^2", 72.0),
    ("٧٢", 72.0),
    ("in 2024, 5", 5.0),
]
"""Text -> its number."""
UNREAD = [
    "",
    "two",
    r"\boxed{}",
    r"\boxed{(3, 4)}",
    r"\boxed{3 \text{ or } 4}",
    "7 or 3,5",
    "1,2345",
    "1.2.3",
    "12:30",
    "3:4",
    "1/2/2024",
    "5/0",
    r"\frac{5}{0}",
    r"\sqrt{3}",
    r"2\sqrt{3}",
    "3 + √2",
    r"\frac{\sqrt{3}}{2}",
    r"\frac{\pi}{2}",
    r"\frac{x}{2}",
    r"5\pi",
    "3x",
    "x^2",
    "x_2",
    "2^{10}",
    "± 3",
    "9" * 400,
]
"""Texts that have none, or none that is certain."""


@pytest.mark.parametrize(("text", "number"), READ)
def test_read(text: str, number: float) -> None:
    assert last_number(text) == pytest.approx(number, rel=1e-12)
    if "boxed" not in text and "####" not in text:
        assert last_number(f"7 and then {text}") == pytest.approx(number, rel=1e-12)
        assert last_number(f"{text} it is") == pytest.approx(number, rel=1e-12)


@pytest.mark.parametrize("text", UNREAD)
def test_not_read(text: str) -> None:
    assert last_number(text) is None
    if any(c.isdigit() or c in "√\\" for c in text):
        assert last_number(f"7 and then {text}") is None, "not an earlier one instead"
