"""Task that builds the real chat model's world for the quickstart."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import MissingContextError

from rlhf_core.chatworld import ChatWorld, build_chat_world


def prepare_chat_world(
    folder: Path, reviews: Path | None, on_progress: Callable[[str, int, int], None]
) -> tuple[ChatWorld, str]:
    """Build the model, its prompts and, with reviews, its reward model once; reuse them afterwards.

    Returns: the world, and a sentence on what it is.
    """
    world = build_chat_world(folder, reviews=reviews, on_progress=on_progress)
    said = f"chat model in {world.policy}, requests in {world.prompts}"
    if world.reward_accuracy is not None:
        said += (
            f"; a reward model in {world.reward}, right on {world.reward_accuracy:.0%} of {world.reward_held_out} "
            f"held-out pairs, and on {world.reward_whole_accuracy:.1%} of whole sentences against the same cut short"
        )
    return world, said


@task(task_run_name="build_chat_world", cache_policy=NO_CACHE, persist_result=False, result_serializer="json")
def chat_world(folder: str, reviews: str = "") -> ChatWorld:
    """Build it for a worker's flow, with its phases as lines of the flow run's log.

    Args:
        folder: where the world is kept.
        reviews: folder of sentences for a reward model; empty: none is made.
    """
    try:
        say: Callable[[str], None] = get_run_logger().info
    except MissingContextError:  # called as task.fn(), outside a flow
        say = logging.getLogger(__name__).info
    begun: set[str] = set()

    def tell(phase: str, _done: int, total: int) -> None:
        if phase not in begun:
            begun.add(phase)
            say(f"chat world: {phase}, {total} steps")

    world, said = prepare_chat_world(Path(folder), Path(reviews) if reviews else None, tell)
    say(said)
    return world
