"""Task that builds the embedded world of the quickstart."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import MissingContextError

from rlhf_core.textworld import TextWorld, build_text_world


def prepare_text_world(folder: Path, on_progress: Callable[[str, int, int], None]) -> TextWorld:
    """The world's policy, reward model and prompts, built once and used again while its recipe stays."""
    return build_text_world(folder, on_progress=on_progress)


@task(task_run_name="build_text_world", cache_policy=NO_CACHE, persist_result=False, result_serializer="json")
def text_world(folder: str) -> TextWorld:
    """The same for a flow of a worker: its phases are lines of the flow run's log."""
    told: set[str] = set()

    def tell(phase: str, _done: int, total: int) -> None:
        if phase not in told:
            told.add(phase)
            _say(f"text world: {phase}, {total} steps")

    return prepare_text_world(Path(folder), tell)


def _say(text: str) -> None:
    try:
        get_run_logger().info(text)
    except MissingContextError:  # called as task.fn(), outside a flow
        logging.getLogger(__name__).info(text)
