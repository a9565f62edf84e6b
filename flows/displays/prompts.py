"""Prompts token by token, in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from rich.cells import cell_len, chop_cells
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from flows.console import Console

if TYPE_CHECKING:
    from rlhf_core.contracts.config import RunConfig
    from rlhf_core.preflight import Plan
    from rlhf_core.preflight.readings import Reading
    from rlhf_core.prompts.pieces import Piece

WIDTH: Final = 80
INDENT: Final = "  "
MAX_PIECES: Final = 480
"""Tokens of a text that are shown: half of them from its beginning, half from its end."""
SPECIAL: Final = "bold magenta"
SEPARATOR: Final = "│"


@contextmanager
def checking(console: Console, doing: str) -> Iterator[Callable[[int, int], None]]:
    """A spinner, and a progress bar while the pre-flight reads many prompts.

    Yields: a function of the prompts read so far and the number of all.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn())
    with console.status(doing) as status:
        bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        task = bar.add_task("reading the prompts")

        def read(done: int, total: int) -> None:
            if not bar.live.is_started:
                if done == total or not console.is_terminal:  # few prompts, or nobody watches
                    return
                status.stop()
                bar.start()
            bar.update(task, completed=done, total=total)
            if done == total:
                bar.stop()
                status.start()

        try:
            yield read
        finally:
            bar.stop()


def show_prompts(console: Console, config: RunConfig, plan: Plan, count: int) -> None:
    """Print the first prompts of a run as the models read them."""
    from rlhf_core.preflight.readings import RESPONSE, first_prompts, prompt_readings, reward_readings

    prompts = first_prompts(config, plan, count)
    console.print(
        Text(f"\nWhat the policy reads: {SEPARATOR} between tokens, · blank, ⏎ line end, ", style="dim")
        + Text("special token", style=SPECIAL)
    )
    for reading in prompt_readings(plan, prompts):
        show_reading(console, reading)
    if readings := reward_readings(config, plan, prompts):
        console.print(Text(f"\nWhat reward components read of the first of them and {RESPONSE!r}", style="dim"))
        for reading in readings:
            show_reading(console, reading)


def show_reading(console: Console, reading: Reading) -> None:
    """Print one text token by token, in at most 80 columns."""
    console.print()
    console.print(Text(reading.title, style="bold") + Text(f"  {reading.about}", style="dim"))
    for line in token_lines(reading.pieces, min(console.width, WIDTH) - len(INDENT)):
        console.print(Text(INDENT) + line, soft_wrap=True)
    special = {piece.text: piece.token for piece in reading.pieces if piece.is_special}
    if special:
        named = ", ".join(f"{text} {token}" for text, token in special.items())
        console.print(Text(f"{INDENT}special tokens: {named}", style="dim"), width=min(console.width, WIDTH))


def token_lines(pieces: Sequence[Piece], width: int) -> list[Text]:
    """The lines of a text, broken between tokens and behind its own line ends."""
    lines = [Text()]
    half = MAX_PIECES // 2
    hidden = len(pieces) - 2 * half
    for index, piece in enumerate(pieces):
        if hidden > 0 and half <= index < half + hidden:
            if index == half:
                lines += [Text(f"… {hidden} tokens …", style="dim"), Text()]
            continue
        _append(lines, piece, width)
    return lines if lines[-1] else lines[:-1]


def _append(lines: list[Text], piece: Piece, width: int) -> None:
    line = lines[-1]
    width -= 1  # room for the bar at the end
    if line and line.cell_len + 1 + cell_len(piece.text) > width:
        line.append(SEPARATOR, style="dim")
        lines.append(Text())
    elif line:
        line.append(SEPARATOR, style="dim")
    style = SPECIAL if piece.is_special else ""
    first, *rest = chop_cells(piece.text, width) or [""]
    lines[-1].append(first, style=style)
    lines += [Text(part, style=style) for part in rest]
    if piece.ends_line:
        lines.append(Text())
