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


class Both:
    """Two watchers, told the same; the second is asked where the first has no answer."""

    def __init__(self, first: Watcher, second: Watcher) -> None:
        self._each = (first, second)

    def stage_started(self, iteration: int, stage: str) -> None:
        """Passed on."""
        for each in self._each:
            each.stage_started(iteration, stage)

    def iteration_finished(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Passed on."""
        for each in self._each:
            each.iteration_finished(iteration, metrics)

    def guards_spoke(self, iteration: int, sentences: Sequence[str]) -> None:
        """Passed on."""
        for each in self._each:
            each.guards_spoke(iteration, sentences)

    def warned(self, sentence: str) -> None:
        """Passed on."""
        for each in self._each:
            each.warned(sentence)

    def decide(self, sentences: Sequence[str]) -> bool | None:
        """The first answer that is one."""
        for each in self._each:
            if (answer := each.decide(sentences)) is not None:
                return answer
        return None


_current: Watcher = Silent()


def watcher() -> Watcher:
    """Whoever watches this process."""
    return _current


@contextlib.contextmanager
def also_watched_by(another: Watcher) -> Iterator[None]:
    """Let someone watch the flows that run inside, beside whoever watches already."""
    with watched_by(Both(_current, another)):
        yield


@contextlib.contextmanager
def watched_by(new: Watcher) -> Iterator[None]:
    """Let someone watch the flows that run inside."""
    global _current  # noqa: PLW0603 - one terminal a process, one watcher
    before, _current = _current, new
    try:
        yield
    finally:
        _current = before
