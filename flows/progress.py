"""How a flow tells whoever is watching where it stands. Silent unless someone watches."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol


class Watcher(Protocol):
    """Someone who wants to know."""

    def stage_started(self, iteration: int, stage: str) -> None:
        """A stage begins."""

    def iteration_finished(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """An iteration is committed."""

    def guards_spoke(self, iteration: int, sentences: Sequence[str]) -> None:
        """Guards have tripped, and the run goes on."""

    def warned(self, sentence: str) -> None:
        """Something around the run is not as it should be, and the run goes on."""

    def decide(self, sentences: Sequence[str]) -> bool | None:
        """Whether a run that guards have paused shall go on; None where nobody can be asked."""


class Silent:
    """Watches nothing: a flow run by a worker."""

    def stage_started(self, iteration: int, stage: str) -> None:
        """Ignored."""

    def iteration_finished(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Ignored."""

    def guards_spoke(self, iteration: int, sentences: Sequence[str]) -> None:
        """Ignored: the flow run's log has it."""

    def warned(self, sentence: str) -> None:
        """Told to the process's log: never silent."""
        logging.getLogger("rlhf").warning(sentence)

    def decide(self, sentences: Sequence[str]) -> None:
        """Nobody is there to ask."""


_current: Watcher = Silent()


def watcher() -> Watcher:
    """Whoever watches this process."""
    return _current


@contextlib.contextmanager
def watched_by(new: Watcher) -> Iterator[None]:
    """Let someone watch the flows that run inside."""
    global _current  # noqa: PLW0603 - one terminal a process, one watcher
    before, _current = _current, new
    try:
        yield
    finally:
        _current = before
