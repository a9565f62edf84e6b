"""Progress of an evaluation: lines with the time left where there is no terminal, a bar where there is one."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from flows.console import Console
from flows.displays.evaluation import PartsWatcher


def shown(times: list[float], *, num_parts: int, first: int = 0) -> list[str]:
    """What a watcher prints whose parts begin at these seconds."""
    clock: Iterator[float] = iter([0.0, *times])
    out = io.StringIO()
    with PartsWatcher(Console(file=out, width=40), num_parts, lambda: next(clock)) as watcher:
        for done, _ in enumerate(times, first):
            watcher.stage_started(done, "reference")
    return out.getvalue().splitlines()


def test_a_line_at_the_start_after_the_first_part_and_every_ten_seconds() -> None:
    assert shown([0.0, 4.0, 8.0, 12.0, 16.0, 20.0], num_parts=5) == [
        "samples: 0 of 5 parts done; now reference",
        "samples: 1 of 5 parts done, about 16 s left; now reference",
        "samples: 4 of 5 parts done, about 4 s left; now reference",
        "samples: 5 of 5 parts done; now reference",
    ]


def test_parts_that_were_there_do_not_make_the_others_look_fast() -> None:
    assert shown([0.0, 0.01, 0.02, 60.02], num_parts=10)[-1] == (
        "samples: 3 of 10 parts done, about 7 min left; now reference"
    )


def test_a_terminal_gets_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    with PartsWatcher(Console(file=out, force_terminal=True), 3) as watcher:
        watcher.stage_started(1, "reference")
    assert "parts done" not in out.getvalue()
