"""Who computes shards beside the process of a run: processes of this machine, or actors of a Ray cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

MAX_DEATHS = 3
"""Workers that may die of one call: more often than that, it is the call."""


class Workers(Protocol):
    """Who does calls, each with models of its own that it keeps; one that dies is replaced, its call done again."""

    @property
    def count(self) -> int:
        """Calls that are done at a time, at most."""
        ...

    def call(self, stage: str, what: str, function: Callable[..., None], *arguments: Any) -> None:
        """Let the next idle worker do something; returns when it is done.

        Args:
            stage: that it is part of.
            what: in words, for a message.
            function: importable, as are its arguments' types.
            arguments: plain values.
        Raises: what the function raises; WorkerError if it has ended one worker after the other.
        """
        ...

    def close(self) -> None:
        """End all of them now; what they were doing is lost."""
        ...


_current: Workers | None = None


def workers() -> Workers | None:
    """Those of this process; None where it computes everything itself."""
    return _current


@contextlib.contextmanager
def using_workers(there: Workers | None) -> Iterator[None]:
    """Have these workers, or none, and end them afterwards."""
    global _current  # noqa: PLW0603 - one run a process
    before, _current = _current, there
    try:
        yield
    finally:
        if there is not None:
            there.close()
        _current = before
