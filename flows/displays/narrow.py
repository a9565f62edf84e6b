"""Tables for a terminal of 80 columns: numbers are never broken, names are shortened in the middle to make room."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len, chop_cells
from rich.table import Table
from rich.text import Text

from flows.console import Console
from flows.visible import plain, visible

DOTS: Final = "…"
GAP: Final = 2
"""Columns between two of a table's."""
EDGES: Final = 2
"""Columns at the sides of a table."""
SHORTEST: Final = 8
"""To which a name is shortened, at most."""
WIDE: Final = 100
"""Columns of a terminal that has room for everything."""
LONGEST_NUMBER: Final = 40
_NUMBER: Final = re.compile(r"[-+±×x=≈→,.:/\[\]()0-9eE%∞ ]*(?:inf|nan|of [0-9]+|[kMGT]?B|s|min|h|d)?")


@dataclass(frozen=True)
class Column:
    """One column: its heading, its cells, and whether they are names, which may be shortened."""

    heading: str
    cells: Sequence[str | Text]
    is_name: bool = False
    styles: Mapping[str, str] | None = None
    """Cell -> its color."""
    heading_style: str = ""
    is_left: bool | None = None
    """Default: names are."""

    @property
    def width(self) -> int:
        """Characters that all of it needs."""
        return max(cell_len(line) for text in (self.heading, *map(str, self.cells)) for line in text.split("\n"))

    @property
    def smallest(self) -> int:
        """Characters that it needs at least: names give way, numbers among them do not."""
        if not self.is_name:
            return self.width
        return max(min(self.width, SHORTEST), *(cell_len(t) for cell in self.cells if is_number(t := str(cell))), 1)


def is_number(text: str) -> bool:
    """Whether a cell holds nothing but numbers and signs, as ``2.889 ± 0.031``, ``3 of 40`` or ``1.2 GB``."""
    return len(text) <= LONGEST_NUMBER and any(c.isdigit() for c in text) and bool(_NUMBER.fullmatch(text))


def middle(text: str, width: int) -> str:
    """A text of at most so many columns: its beginning and its end, which tells most names apart.

    >>> middle("ppo.learning_rate=0.001_kl.coef=0.05_seed=1", 22)
    'ppo.learni…0.05_seed=1'
    """
    if cell_len(text) <= width:
        return text
    if width <= 1:
        return DOTS[:width]
    head = chop_cells(text, (width - 1) // 2)[0] if width > 2 else ""
    tail = chop_cells(text[::-1], width - 1 - cell_len(head))[0][::-1]
    return f"{head}{DOTS}{tail}"


def apart(names: Sequence[str], width: int) -> list[str]:
    """Names of at most so many columns each: those that would look alike are cut where they begin to differ.

    >>> apart(["a-long-name-one-of-the-first-kind", "a-long-name-two-of-the-first-kind", "other"], 15)
    ['…one-of…st-kind', '…two-of…st-kind', 'other']
    """
    short = {name: middle(name, width) for name in names}
    for shown in set(short.values()):
        alike = [name for name in short if short[name] == shown]
        if len(alike) > 1:
            same = next((i for i, letters in enumerate(zip(*alike, strict=False)) if len(set(letters)) > 1), 0)
            short |= {name: middle(DOTS + name[same:], width) for name in alike}
    return [short[name] for name in names]


def fitted(columns: Sequence[Column], width: int) -> list[int]:
    """Widths of columns that stand in so many characters: names give way, the longest first; numbers never do."""
    widths, smallest = [column.width for column in columns], [column.smallest for column in columns]
    room = width - EDGES - GAP * (len(columns) - 1)
    while sum(widths) > room:
        names = [i for i in range(len(columns)) if widths[i] > smallest[i]]
        if not names:
            break
        widths[max(names, key=lambda i: widths[i])] -= 1
    return widths


def print_columns(console: Console, columns: Sequence[Column], title: str | None = None) -> None:
    """Print a table in the width of the console. Columns of numbers that do not fit beside each other follow below."""
    for part in _beside([_written_out(column, console.encoding) for column in columns], console.width):
        table = Table(
            title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False,
            collapse_padding=True, padding=(0, GAP // 2),
        )  # fmt: skip
        widths = fitted(part, console.width)
        for column, width in zip(part, widths, strict=True):
            heading = middle(column.heading, width) if column.is_name else column.heading
            lines = "\n".join(_padded(line, width, column) for line in heading.split("\n"))
            table.add_column(Text(lines, column.heading_style), no_wrap=True, min_width=width, overflow="ignore")
        cells = [_cells(column, width) for column, width in zip(part, widths, strict=True)]
        for row in zip(*cells, strict=True):
            table.add_row(*row)
        console.print(table)
        title = None


def _beside(columns: Sequence[Column], width: int) -> list[list[Column]]:
    """Columns, as many beside each other as fit; the first one again before those that follow below."""
    parts: list[list[Column]] = [[columns[0]]]
    for column in columns[1:]:
        smallest = [each.smallest for each in (*parts[-1], column)]
        if len(parts[-1]) > 1 and sum(smallest) + GAP * (len(smallest) - 1) > width - EDGES:
            parts.append([columns[0]])
        parts[-1].append(column)
    return parts


def _written_out(column: Column, encoding: str) -> Column:
    """The column as the terminal will show it, so that its width is the one that is measured."""

    def shown(text: str) -> str:
        return plain(visible(text), encoding)

    cells = [Text(shown(c.plain), c.style) if isinstance(c, Text) else shown(c) for c in column.cells]
    styles = {shown(cell): style for cell, style in (column.styles or {}).items()}
    return replace(column, heading=shown(column.heading), cells=cells, styles=styles)


def _cells(column: Column, width: int) -> list[Text]:
    texts = [str(cell) for cell in column.cells]
    short = apart(texts, width) if column.is_name else texts
    styles = [cell.style if isinstance(cell, Text) else (column.styles or {}).get(cell, "") for cell in column.cells]
    return [Text(_padded(text, width, column), style) for text, style in zip(short, styles, strict=True)]


def _padded(text: str, width: int, column: Column) -> str:
    """Numbers stand at the right; rich would not move a text that may not be cut."""
    is_left = column.is_name if column.is_left is None else column.is_left
    room = " " * max(0, width - cell_len(text))
    return text + room if is_left else room + text


def print_rows(console: Console, rows: Sequence[Mapping[str, Any]], title: str | None = None) -> None:
    """Print rows as a table in the width of the console: numbers whole, texts shortened in the middle."""
    names = list(rows[0]) if rows else []
    columns = [_column(name, [row[name] for row in rows]) for name in names]
    if sum(c.width for c in columns) + GAP * (len(columns) - 1) > console.width - EDGES:  # headings take two lines
        columns = [replace(c, heading=c.heading.replace(" ", "\n")) for c in columns]
    if columns:
        print_columns(console, columns, title)


def cell_text(value: Any) -> str:
    """A value as it stands in a cell: numbers short, long texts on one line, lists as their length (x their mean)."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, float):
        return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.1e}"
    if isinstance(value, list) and value and all(isinstance(item, int | float) for item in value):
        numbers: list[Any] = value
        whole = f"{len(numbers)}"
        return f"{whole} x {cell_text(sum(numbers) / len(numbers))}" if isinstance(numbers[0], float) else whole
    return " ".join(str(value).split())


def _column(name: str, values: Sequence[Any]) -> Column:
    is_number_column = all(isinstance(value, int | float | None) for value in values) and len(values) > 0
    return Column(name.replace("_", " "), [cell_text(value) for value in values], is_name=not is_number_column)
