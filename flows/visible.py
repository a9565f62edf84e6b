r"""Text of others in a terminal: what would act on the terminal, or hide, is written out.

Prompts, responses, file names and messages of libraries may hold escape sequences (a title, a link, a cleared
screen), bidirectional overrides and characters without width. :func:`visible` writes them as Python does (``\x1b``,
``\u202e``); :func:`plain` then writes what the terminal's encoding does not have. Line ends and tabs stay.
"""

from __future__ import annotations

import codecs
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

from rlhf_core.store.address import shown

_ACTING: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but for tab and line feed, DEL, C1 with NEL
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\u3164\ufeff\uffa0\ufff9-\ufffb"  # without width, bidirectional, line separators
    "\ud800-\udfff"  # of names that are no UTF-8
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"  # tags: ASCII that nobody sees
    # joiners shape emoji, Persian and Indic scripts; beside ASCII they only hide
    "|(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])"
)
_PLAIN: Final[Mapping[str, str]] = {
    "β": "beta", "π": "pi", "σ": "sigma", "γ": "gamma", "λ": "lambda", "Δ": "Delta", "→": "->", "←": "<-", "…": "...",
    "≈": "~", "≤": "<=", "≥": ">=", "−": "-", "√": "sqrt", "—": "-", "–": "-", "×": "x", "±": "+-", "·": ".",
    "⏎": "\\n", "‘": "'", "’": "'", "“": '"', "”": '"', "━": "-", "─": "-", "│": "|", "█": "#", "░": ".",
    "▒": ":", "▓": "%", "▁": "_", "▂": ".", "▃": ",", "▄": "-", "▅": "=", "▆": "+", "▇": "*",
    "╸": "-", "╺": "-", "✓": "yes", "✗": "no", "┤": "|", "├": "|", "└": "+", "┴": "+", "┬": "+",
    "\u2800": " ",
}  # fmt: skip
"""What this program writes -> the same in ASCII."""
_BRAILLE: Final = range(0x2800, 0x2900)
HANDLER: Final = "rlhf.plain"
"""Error handler of the standard streams: they write in any encoding."""


def visible(text: str) -> str:
    """The text with everything that would act on a terminal, or hide in it, written out."""
    return _ACTING.sub(lambda found: _written_out(found[0]), text)


def pieces(text: str, encoding: str) -> list[str]:
    """What stands for each character of a text after :func:`visible` and :func:`plain`."""
    chars = list(text)
    for found in _ACTING.finditer(text):
        chars[found.start()] = _written_out(found[0])
    return [plain(char, encoding) for char in chars]


def plain(text: str, encoding: str) -> str:
    """The text in an encoding: what it lacks is written in ASCII."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.encode(encoding, HANDLER).decode(encoding)
    return text


def write_json(values: object) -> None:
    """Print values as JSON, and nothing else: a terminal is safe from it, a parser gets the values as they are."""
    write_json_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_json_line(values: object) -> None:
    """The same on one line."""
    write_json_text(json.dumps(values, ensure_ascii=False) + "\n")


def write_json_text(text: str) -> None:
    """Print text that is JSON already, or YAML whose strings are written as JSON writes them."""
    encoding = sys.stdout.encoding or "utf-8"
    text = _ACTING.sub(lambda found: json.dumps(found[0])[1:-1], shown(text))
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = "".join(c if c.isascii() else json.dumps(c)[1:-1] for c in text)
    sys.stdout.write(text)


def settle_streams() -> None:
    """Let the standard streams of this process write in any encoding; one that is closed goes nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - the process ends it
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=HANDLER)


@contextmanager
def visible_messages() -> Iterator[None]:
    """Let log records and warnings of every library say what they quote in :func:`visible` text."""
    record, warning = logging.getLogRecordFactory(), warnings.formatwarning

    def formatted(*arguments: Any, **named: Any) -> str:
        return visible(warning(*arguments, **named))

    def made(*arguments: Any, **named: Any) -> logging.LogRecord:
        found = record(*arguments, **named)
        said = found.getMessage
        found.getMessage = lambda: visible(said())
        return found

    logging.setLogRecordFactory(made)
    warnings.formatwarning = cast("Any", formatted)
    try:
        yield
    finally:
        logging.setLogRecordFactory(record)
        warnings.formatwarning = warning


def _written_out(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or ("*" if ord(c) in _BRAILLE else _written_out(c)) for c in lacking), error.end


codecs.register_error(HANDLER, _in_ascii)
