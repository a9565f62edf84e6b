"""Tables for a terminal of 80 columns: numbers are never broken, names are shortened in the middle to make room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.table import Table
from rich.text import Text

DOTS: Final = "…"
GAP: Final = 2
"""Columns between two of a table's."""
SHORTEST: Final = 8
"""To which a name is shortened, at most."""


@dataclass(frozen=True)
class Column:
    """One column: its heading, its cells, and whether they are names, which may be shortened."""

    heading: str
    cells: Sequence[str]
    is_name: bool = False
    styles: Mapping[str, str] | None = None
    """Cell -> its color."""

    @property
    def width(self) -> int:
        """Characters that all of it needs."""
        return max(cell_len(line) for text in (self.heading, *self.cells) for line in text.split("\n"))


def middle(text: str, width: int) -> str:
    """A text of at most so many columns: its beginning and its end, which tells most names apart.

    >>> middle("ppo.learning_rate=0.001_kl.coef=0.05_seed=1", 24)
    'ppo.learnin….05_seed=1'
    """
    if cell_len(text) <= width:
        return text
    if width <= 1:
        return DOTS[:width]
    head = chop_cells(text, (width - 1) // 2)[0] if width > 2 else ""
    tail = chop_cells(text[::-1], width - 1 - cell_len(head))[0][::-1]
    return f"{head}{DOTS}{tail}"


def fitted(columns: Sequence[Column], width: int) -> list[int]:
    """Widths of columns that stand in so many characters: names give way, the longest first; numbers never do."""
    widths = [column.width for column in columns]
    room = width - GAP * (len(columns) - 1)
    while sum(widths) > room:
        names = [i for i, column in enumerate(columns) if column.is_name and widths[i] > SHORTEST]
        if not names:
            break
        widths[max(names, key=lambda i: widths[i])] -= 1
    return widths


def print_columns(console: Console, columns: Sequence[Column], title: str | None = None) -> None:
    """Print a table in the width of the console. Columns of numbers that do not fit beside each other follow below."""
    for part in _beside(columns, console.width):
        table = Table(
            title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False,
            collapse_padding=True, padding=(0, GAP // 2),
        )  # fmt: skip
        for column, width in zip(part, fitted(part, console.width), strict=True):
            justify = "left" if column.is_name else "right"
            heading = Text(middle(column.heading, width) if column.is_name else column.heading)
            table.add_column(heading, justify=justify, no_wrap=True, min_width=width, overflow="ignore")
        widths = fitted(part, console.width)
        for row in range(len(part[0].cells)):
            table.add_row(*(_cell(column, row, width) for column, width in zip(part, widths, strict=True)))
        console.print(table)
        title = None


def _beside(columns: Sequence[Column], width: int) -> list[list[Column]]:
    """Columns, as many beside each other as fit; the first one again before those that follow below."""
    parts: list[list[Column]] = [[columns[0]]]
    for column in columns[1:]:
        smallest = [min(c.width, SHORTEST) if c.is_name else c.width for c in (*parts[-1], column)]
        if len(parts[-1]) > 1 and sum(smallest) + GAP * (len(smallest) - 1) > width:
            parts.append([columns[0]])
        parts[-1].append(column)
    return parts


def _cell(column: Column, row: int, width: int) -> Text:
    cell = column.cells[row]
    return Text(middle(cell, width) if column.is_name else cell, (column.styles or {}).get(cell, ""))
