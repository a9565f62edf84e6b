"""What `rlhf compare` prints: configs, results and curves of several runs; and the picture or page that it writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from flows.console import Console
from flows.displays.braille import braille_plot, ends
from flows.displays.narrow import WIDE, Column, apart, print_columns
from flows.displays.terminal import BARS
from flows.visible import write_json
from rlhf_core.comparing.comparison import Comparison, compare
from rlhf_core.comparing.outcome import smoothed
from rlhf_core.comparing.presentation import CURVES, Line, difference_lines, group_lines, result_lines, to_json
from rlhf_core.contracts.durable import write_file
from rlhf_core.contracts.errors import UserError
from rlhf_core.inspection import Row
from rlhf_core.store.address import shown

STYLES = ("dodger_blue1", "dark_orange", "green3", "medium_orchid", "gold3", "deep_pink3", "turquoise2", "grey62")
"""Of the runs, in order, again from the first after the last."""
CELL, LABEL, NAME = 18, 32, 21
"""Characters of a column of a run, of the labels before it, and of a run's name in a narrow terminal."""
PLOT_HEIGHT = 10
WIDEST_PLOT = 72
STANDINGS = {"working": "yellow", "stopped": "red", "finished": "green"}


def compare_and_show(console: Console, paths: Sequence[Path], *, last: int, out: Path | None, as_json: bool) -> None:
    """Compare runs; print it, or as JSON; write it to ``out``. Raises UserError, and has written nothing then."""
    draw = None if out is None else _drawing(out)
    compared = compare(paths, last)
    if out is not None and draw is not None:
        write_file(out, draw(compared))
    if as_json:
        write_json(to_json(compared))
        return
    show_comparison(console, compared)
    if out is not None:
        console.print(Text.assemble(("written: ", "bold"), str(out)), soft_wrap=True)


def show_comparison(console: Console, compared: Comparison) -> None:
    """Print it."""
    short = apart([each.name for each in compared.outcomes], NAME if console.width < WIDE else LABEL)
    names = [Text(name, style=style_of(i)) for i, name in enumerate(short)]
    differences = difference_lines(compared)
    if differences:
        _print_lines(console, "Configs: what differs", names, differences)
    else:
        _print_title(console, "Configs: all the same\n")
    _print_lines(console, f"Results: means of the last {compared.last} iterations ± std", names, result_lines(compared))
    if compared.groups:
        heads = [Text(name) for name in apart([group.name for group in compared.groups], LABEL)]
        _print_lines(console, "Across seeds: mean ± std over runs", heads, group_lines(compared))
    _print_sparklines(console, compared, names)
    _print_score_against_kl(console, compared)
    for note in compared.notes:
        console.print(Text.assemble(("note: ", "yellow"), shown(note)), soft_wrap=True)


def style_of(run: int) -> str:
    """The color of a run, wherever it is shown."""
    return STYLES[run % len(STYLES)]


def _drawing(out: Path) -> Callable[[Comparison], bytes]:
    """What draws a file of that name. Raises UserError."""
    if out.suffix == ".png":
        from tasks.reports.comparison_figure import draw_comparison

        return draw_comparison
    if out.suffix == ".html":
        from tasks.reports.comparison_page import comparison_page

        return comparison_page
    raise UserError(f"--out {out} ends in {out.suffix or 'nothing'}; name a FILE.png or a FILE.html")


def _print_title(console: Console, title: str) -> None:
    console.print(title, style="italic", highlight=False)


def _print_lines(console: Console, title: str, names: Sequence[Text], lines: Sequence[Line]) -> None:
    """A table with a column a run; as many beside each other as the terminal is wide, then the rest below."""
    _print_title(console, title)
    columns = [Column("", [label for label, _ in lines], is_name=True)]
    for i, name in enumerate(names):
        cells = [cells[i] for _, cells in lines]
        columns.append(
            Column(str(name), cells, is_name=True, is_left=False, styles=STANDINGS, heading_style=str(name.style))
        )
    fit = max(1, (console.width - LABEL) // CELL)
    for start in range(1, len(columns), fit):
        print_columns(console, [columns[0], *columns[start : start + fit]])


def _print_sparklines(console: Console, compared: Comparison, names: Sequence[Text]) -> None:
    """A line of bars for each run and quantity, all of one quantity on one scale."""
    longest = max(len(each.rows) for each in compared.outcomes)
    room = (console.width - max(name.cell_len for name in names) - 4) // len(CURVES) - 2
    width = min(longest, max(8, room), 40)
    _print_title(console, f"Curves: iterations 0 to {longest - 1}, each quantity on one scale")
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    scales: dict[str, tuple[float, float]] = {}
    for column, label in CURVES.items():
        values = [row[column] for each in compared.outcomes for row in each.rows]
        scales[column] = min(values), max(values)
        table.add_column(f"{label}\n{' to '.join(ends(*scales[column]))}", no_wrap=True)
    for i, (each, name) in enumerate(zip(compared.outcomes, names, strict=True)):
        lines = [
            Text(_bars([row[column] for row in each.rows], scales[column], width, longest), style=style_of(i))
            for column in CURVES
        ]
        table.add_row(name, *lines)
    console.print(table)


def _bars(values: Sequence[float], scale: tuple[float, float], width: int, longest: int) -> str:
    """Bars of a run as long as its share of the longest one: each the mean of the iterations that fall into it."""
    low, high = scale
    bars = ""
    for i in range(width):
        part = values[i * longest // width : max((i + 1) * longest // width, i * longest // width + 1)]
        if not part:
            break
        mean = sum(part) / len(part)
        bars += BARS[round((mean - low) / (high - low) * (len(BARS) - 1))] if high > low else BARS[0]
    return bars


def _print_score_against_kl(console: Console, compared: Comparison) -> None:
    """What each run paid in KL for its score, smoothed, over what is attainable where it was evaluated."""
    curves = [(style_of(i), _path_of(each.rows, compared.last)) for i, each in enumerate(compared.outcomes)]
    reach = max(kl for _, path in curves for kl, _ in path)
    short = apart([each.name for each in compared.outcomes], LABEL)
    names = [(f"{name}   ", style) for name, (style, _) in zip(short, curves, strict=True)]
    attainable = next((each.evaluated.frontier for each in compared.outcomes if each.evaluated), None)
    if attainable is not None:
        curves.insert(0, ("bold", [(kl, score) for kl, score in attainable if kl <= reach]))
        names.append(("attainable", "bold"))
    width = max(20, min(WIDEST_PLOT, console.width - 14))
    _print_title(console, f"Score against KL, means of {compared.last} iterations")
    for line in braille_plot(curves, width=width, height=PLOT_HEIGHT, axes=("KL to the reference, nats", "score")):
        console.print(line, no_wrap=True)
    console.print(Text.assemble("  ", *(part for name, style in names for part in (("━ ", style), name))))
    console.print()


def _path_of(rows: Sequence[Row], window: int) -> list[tuple[float, float]]:
    """(KL, score) of each iteration, smoothed."""
    kl, score = (smoothed([row[column] for row in rows], window) for column in ("kl", "score"))
    return list(zip(kl, score, strict=True))
