"""What others wrote reaches a terminal as text: no escape acts, nothing hides, and any encoding can print it."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.columns import Columns
from rich.console import Group
from rich.live import Live
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from flows.console import Console
from flows.displays.narrow import print_rows
from flows.displays.terminal import print_records, print_warning, side_by_side
from flows.visible import plain, visible, visible_messages, write_json

ACTING = [
    "\x1b]8;;http://evil\x1b\\here\x1b]8;;\x1b\\", "\x1b[2J", "\x9b31m", "\x85", "\x07", "\x7f", "a\u202eb", "\u2066",
    "\u2028", "a\u200bb", "a\u200db", "\ufeff", "\u00ad", "\U000e0041", "\udcff", "\u061c",
]  # fmt: skip
HIDING = "\u061c\u200b\u200e\u202a\u202e\u2028\u2029\u2066\u2069\ufeff\u00ad\U000e0041\udcff"
EVIL = "".join(ACTING) + " [bold]x[/bold] [link=http://evil]y[/link] z[/b]"


def is_text(printed: str) -> bool:
    return not any((ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 or c in HIDING for c in printed)


@pytest.mark.parametrize("text", ACTING)
def test_what_acts_or_hides_is_written_out(text: str) -> None:
    assert is_text(visible(text))
    assert visible(text) != text


@pytest.mark.parametrize("text", ["Zwölf Boxkämpfer", "日本語\tb\n", "👩\u200d👩\u200d👧", "می\u200cخواهم", "β → ±…│"])
def test_what_people_write_stays(text: str) -> None:
    assert visible(text) == text


def table(cell: Any) -> Table:
    made = Table(title=cell if isinstance(cell, str) else None, caption="x")
    made.add_column(cell)
    made.add_row(cell)
    return made


@pytest.mark.parametrize(
    "shown",
    [
        EVIL,
        Text(EVIL, "red"),
        Text.assemble(("a", "bold"), (EVIL, "green"), "b"),
        table(EVIL),
        table(Text(EVIL)),
        Group(EVIL, Text(EVIL)),
        Columns([EVIL, table(EVIL)]),
        side_by_side(EVIL, ("a", "b"), [(EVIL, EVIL, 1.0, EVIL, 2.0)]),
    ],
)
@pytest.mark.parametrize("is_terminal", [False, True])
def test_whatever_is_printed_is_text(shown: Any, *, is_terminal: bool) -> None:
    out = io.StringIO()
    Console(file=out, width=200, force_terminal=is_terminal, color_system=None).print(shown)
    assert is_text(out.getvalue())
    assert "evil" in out.getvalue()


def test_markup_in_data_is_text_and_makes_no_link() -> None:
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=True, color_system="truecolor")
    print_warning(console, EVIL)
    print_records(console, [{str(i): EVIL for i in range(12)}], EVIL)
    print_rows(console, [{EVIL[:30]: 1, "text": EVIL}], EVIL)
    console.print(EVIL)
    assert "[link=http://evil]y[/link] z[/b]" in out.getvalue()
    assert "\x1b]" not in out.getvalue()


def test_live_displays_are_text_too() -> None:
    out = io.StringIO()
    console = Console(file=out, width=300, force_terminal=True, color_system=None)
    bar = Progress(TextColumn("{task.fields[what]}", markup=False), console=console)
    bar.add_task("x", what=EVIL)
    with Live(Group(bar, table(EVIL)), console=console, refresh_per_second=1):
        pass
    assert "\x1b]8" not in out.getvalue()
    assert "evil" in out.getvalue()
    assert not any(c in out.getvalue() for c in "\u202e\x9b\u200b")


def test_styles_stay_where_they_were() -> None:
    out = io.StringIO()
    Console(file=out, width=80, force_terminal=True, color_system="standard").print(
        Text.assemble("a\x1bb", ("c\u202ed", "red"), "e")
    )
    assert out.getvalue() == "a\\x1bb\x1b[31mc\\u202ed\x1b[0me\n"


def test_json_is_safe_to_look_at_and_the_same_to_a_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"text": EVIL, "β": ["日本", 1.5]}
    for encoding in ("utf-8", "latin-1", "ascii"):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", out)
        write_json(values)
        out.seek(0)
        text = out.read()
        assert json.loads(text) == values
        assert is_text(text)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_any_encoding_prints_tables_and_greek(encoding: str) -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(file=out, width=60)
    rows = [
        {"name": "β → π", "bars": "▁▂█", "curve": "⠀⡇", "other": "日"},
        {"name": "", "bars": "", "curve": "", "other": "x"},
    ]
    print_rows(console, rows, "Σ π")
    out.flush()
    printed = raw.getvalue().decode(encoding)
    assert "beta -> pi" in printed
    assert len({len(line.rstrip("\n")) for line in printed.splitlines()[1:]}) == 1, "the table keeps its form"
    assert plain("日", encoding) == "\\u65e5"


def test_log_records_and_warnings_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("test_visible")
    logger.addHandler(handler)
    try:
        with visible_messages():
            logger.warning("the model %s", EVIL.replace("\udcff", ""))
            assert is_text(warnings.formatwarning(UserWarning(EVIL), UserWarning, "f.py", 1))
    finally:
        logger.removeHandler(handler)
    assert is_text(said := capsys.readouterr().err)
    assert "evil" in said


def test_nobody_prints_past_the_door() -> None:
    root = Path(__file__).parents[2]
    past = re.compile(
        r"from rich\.console import [^\n]*\bConsole\b|\bprint\(|sys\.stdout\.write|Console\(\)\.|typer\.echo"
    )
    allowed = {
        "console.py": 0,
        "visible.py": 1,  # JSON
        "training.py": 1,  # our own template of a config
        "cli.py": 1,  # the version
        "terminal.py": 2,  # commands that are shown
    }
    found: dict[str, int] = {}
    for path in sorted((root / "flows").rglob("*.py")):
        text = "\n".join(line for line in path.read_text().splitlines() if ".print(" not in line and "def " not in line)
        if count := len(past.findall(text)):
            found[path.name] = count
    assert found == {name: count for name, count in allowed.items() if count}
