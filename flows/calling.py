"""How a flow calls its tasks: through Prefect, or as plain functions where there is no Prefect.

A task's work is the same either way, and so is what it writes: Prefect shows and retries, the files decide.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

from prefect.tasks import Task

Result = TypeVar("Result")

_without_prefect = False


def call(task: Task[..., Result], *arguments: Any) -> Result:
    """Run a task and return its result."""
    return task.fn(*arguments) if _without_prefect else task(*arguments)


def call_both(
    first: tuple[Task[..., Result], tuple[Any, ...]], second: tuple[Task[..., Result], tuple[Any, ...]]
) -> tuple[Result, Result]:
    """Run two tasks that do not depend on each other, side by side where Prefect runs them; both results."""
    if _without_prefect:
        return call(first[0], *first[1]), call(second[0], *second[1])
    running = [task.submit(*arguments) for task, arguments in (first, second)]
    return running[0].result(), running[1].result()


@contextlib.contextmanager
def without_prefect() -> Iterator[None]:
    """Let flows call their tasks as plain functions: no server, no state, no retry."""
    global _without_prefect  # noqa: PLW0603 - one orchestrator a process
    before, _without_prefect = _without_prefect, True
    try:
        yield
    finally:
        _without_prefect = before
