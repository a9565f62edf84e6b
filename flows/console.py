"""The one door to the terminal: every table, line and message is printed by a :class:`Console` of this file.

Text is data unless it says otherwise: ``[bold]`` is printed as it stands, and style is given by ``Text`` objects.
What data may hold (:mod:`flows.visible`) is written out before the layout, and once more as lines leave for the
terminal. Only styles that this program chose get there; a link of them is one of ``flows.ui``.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from rich import console as rich_console
from rich.columns import Columns
from rich.segment import Segment
from rich.table import Table
from rich.text import Span, Text

from flows.visible import pieces, plain, visible
from rlhf_core.store.address import shown

EXIT_PIPE = 141
"""Whoever read the output has gone: 128 + SIGPIPE, as other programs end."""


class Console(rich_console.Console):
    """Prints data as text, and a run in an object store by its address, not by the folder of its copy."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render_str(self, text: str, **style: Any) -> Text:
        """A text as it is printed."""
        return super().render_str(self._safe(shown(text)), **style)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print objects; what they hold is written out before they are laid out."""
        super().print(*(self._laid_out(each) for each in objects), **options)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """The last door: nothing but our own styles and what :func:`visible` leaves reaches the terminal."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(self._safe(segment.text), segment.style)

    def on_broken_pipe(self) -> NoReturn:
        """End quietly: nobody reads any more."""
        self.quiet = True
        silence()
        raise SystemExit(EXIT_PIPE)

    def _safe(self, text: str) -> str:
        return text if text.isascii() and text.isprintable() else plain(visible(text), self.encoding)

    def _laid_out(self, each: Any) -> Any:
        if isinstance(each, Text):
            return self._text(each)
        if isinstance(each, Table):
            each.title, each.caption = self._laid_out(each.title), self._laid_out(each.caption)
            for column in each.columns:
                column.header, column.footer = self._laid_out(column.header), self._laid_out(column.footer)
                column._cells[:] = map(self._laid_out, column._cells)
        elif isinstance(each, rich_console.Group | Columns):
            each.renderables[:] = map(self._laid_out, each.renderables)
        return self._safe(each) if isinstance(each, str) else each

    def _text(self, text: Text) -> Text:
        """The text written out, its styles where they were."""
        if self._safe(text.plain) == text.plain:
            return text
        chars = pieces(text.plain, self.encoding)
        ends = [0, *itertools.accumulate(map(len, chars))]
        last = len(chars)
        found = text.blank_copy("".join(chars))
        found.spans = [Span(ends[min(s.start, last)], ends[min(s.end, last)], s.style) for s in text.spans]
        return found


def silence() -> None:
    """Let what is still to be written to the standard output go nowhere, at the end of the process too."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):  # no output at all
        return
