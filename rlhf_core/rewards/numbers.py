r"""The number that a text ends with, as mathematics, data sets and people write numbers.

What cannot be read with certainty is no number: ``\sqrt{3}`` is not 3, ``x_2`` not 2, ``3,5`` neither 5 nor 3.5.
"""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from typing import Final

NUMBER: Final = re.compile(
    r"(?:(?<![\w.)\]])[-+])?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
)
"""A sign only where it is no minus between two terms; thousands may have commas."""
_UNREADABLE: Final = "\ue000"
"""Stands for a root, or a fraction of something other than numbers."""
_BOXED: Final = re.compile(r"\\(?:boxed|fbox)\s*\{")
_MARK: Final = "####"
_PLAIN: Final = (
    (re.compile(r"\\[!;: ]|\\(?:left|right|displaystyle)(?![a-zA-Z])"), ""),
    (re.compile(r"\\(?:text|textbf|mathrm|mbox|mathbf)\s*\{([^{}]*)\}(\^\{?[0-9]\}?)?"), r" \1 "),
    (re.compile(r"\s*\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])"), ""),
    (re.compile(r"\b(mm|cm|dm|m|km|in|ft|yd|mi|inches|feet|meters|units)\s*\^\s*\{?\s*[23]\s*\}?"), r"\1"),
    (re.compile(r"(?<=[0-9])(?:\{,\}|\\,|,?[\u00a0\u2009\u202f'’])(?=[0-9]{3}(?![0-9]))"), ","),
    (re.compile(r"\\([$%])"), r"\1"),
)
_ARGUMENT: Final = r"\s*(?:\{([^{}]*)\}|([0-9]))"
_FRACTION: Final = re.compile(rf"((?<![\w.)\]}}])[-+]\s*)?((?<![\w.,])[0-9]+\s*)?\\[dtc]?frac{_ARGUMENT}{_ARGUMENT}")
_ROOT: Final = re.compile(r"\\sqrt\s*(?:\[[^\]]*\])?\s*(?:\{[^{}]*\}|[0-9a-zA-Z])|√\s*[0-9a-zA-Z]*")
_POWER: Final = re.compile(r"[\^_]\s*\{?\s*$")
_POWER_OF_TEN: Final = re.compile(r"(?<![0-9.,^_])10\s*\^\s*\{?\s*$")
_TIMES: Final = re.compile(r"\s*(?:\\times|\\cdot|×|·|\*)\s*10\s*\^\s*\{?\s*")
_NOT_ALONE: Final = re.compile(r"\s*(?:\\pi(?![a-zA-Z])|π|\\sqrt|\^)|[xyz](?![a-zA-Z])")
_PLUS_MINUS: Final = re.compile(r"(?:±|\\pm)\s*$")
_GLUE: Final = frozenset({",", ".", ":"})
"""Between two numbers without a space: a decimal comma or a list, a version, a time or a ratio."""


def last_number(text: str) -> float | None:
    r"""The number that a text ends with.

    The content of the last ``\boxed{…}`` counts alone, if there is one, and must hold one number; else what follows
    the last ``####``, if there is one; else the whole text.

    Args:
        text: any.
    Returns: None without a number, or where the last one cannot be read with certainty or is beyond a float.
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        value, start = _last(_readable(boxed.rpartition("=")[2]))
        return value if start == 0 else None
    return _last(_readable(text.rpartition(_MARK)[2]))[0]


def _last_boxed(text: str) -> str | None:
    found = list(_BOXED.finditer(text))
    if not found:
        return None
    depth, start = 1, found[-1].end()
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at]
    return text[start:]


def _readable(text: str) -> str:
    """The text with ASCII digits, without LaTeX around numbers, and with its LaTeX fractions as decimals."""
    text = "".join(c if c.isascii() else _ascii(c) for c in text)
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    before = None
    while before != text:
        before = text
        text = _ROOT.sub(f" {_UNREADABLE} ", text)
        text = _FRACTION.sub(_decimal, text)
    return re.sub(r"\\[dtc]?frac|\\sqrt", _UNREADABLE, text)


def _ascii(character: str) -> str:
    if character == "−":
        return "-"
    if unicodedata.category(character) == "No" and "FRACTION" in unicodedata.name(character, ""):
        return f" {unicodedata.normalize('NFKC', character).replace('⁄', '/')} "
    return str(unicodedata.decimal(character)) if character.isdecimal() else character


def _decimal(match: re.Match[str]) -> str:
    sign, whole, *arguments = match.groups()
    over, under = (_plain_number(a or b or "") for a, b in (arguments[:2], arguments[2:]))
    if over is None or not under:
        return f" {_UNREADABLE} "
    value = over / under
    if whole is not None:
        if not 0 <= value < 1:
            return f" {_UNREADABLE} "
        value += float(whole)
    return f" {-value if sign and sign[0] == '-' else value!r} "


def _plain_number(text: str) -> float | None:
    match = NUMBER.fullmatch(text.strip())
    return None if match is None else float(match[0].replace(",", ""))


def _last(text: str) -> tuple[float | None, int]:
    """The last number of a readable text, and how many numbers stand before it."""
    found = list(NUMBER.finditer(text))
    if not found or _UNREADABLE in text[found[-1].end() :]:
        return None, 0
    last = found[-1]
    value: float | None = float(last[0].replace(",", ""))
    between = [text[a.end() : b.start()] for a, b in itertools.pairwise(found)]
    used = 1
    if between and between[-1].strip() == "/":
        value, used = _quotient(found, between)
    elif _POWER.search(text[: last.start()]):
        value, used = _power(text, found, between, value)
    elif between and between[-1] in _GLUE:
        value = None
    if used < len(found) and used <= len(between) and between[-used] in _GLUE:
        value = None
    first = found[-used]
    if _NOT_ALONE.match(text, last.end()) or _PLUS_MINUS.search(text[: first.start()]):
        value = None
    return value if value is not None and math.isfinite(value) else None, len(found) - used


def _quotient(found: list[re.Match[str]], between: list[str]) -> tuple[float | None, int]:
    """a/b, or the mixed number c a/b; a chain of slashes is a date."""
    over, under = (float(m[0].replace(",", "")) for m in found[-2:])
    if under == 0 or (len(between) > 1 and between[-2].strip() == "/"):
        return None, 2
    if len(between) > 1 and re.fullmatch(r"\s+", between[-2]) and found[-3][0].lstrip("+-").isdigit():
        whole = float(found[-3][0])
        if 0 <= over < under and found[-2][0].isdigit():
            return math.copysign(abs(whole) + over / under, -1 if found[-3][0].startswith("-") else 1), 3
    return over / under, 2


def _power(text: str, found: list[re.Match[str]], between: list[str], exponent: float) -> tuple[float | None, int]:
    """Read a x 10^n and 10^n; any other power or index is not read."""
    ten = _POWER_OF_TEN.search(text[: found[-1].start()])
    if ten is None or abs(exponent) > 300 or not exponent.is_integer():
        return None, 1
    if len(found) > 2 and _TIMES.fullmatch(text, found[-3].end(), found[-1].start()):
        return float(f"{found[-3][0].replace(',', '')}e{int(exponent)}"), 3
    alone = len(found) < 3 or not between[-2].strip().endswith(("×", "·", "*", "\\times", "\\cdot"))
    return (float(f"1e{int(exponent)}") if alone else None), 2
