"""Shards of a stage ahead of its task: computed by workers side by side, so that the task has only to join them.

A stage that finds no part computes it itself: nothing here decides what an artifact holds, only how soon it is there.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

from flows.calling import call_all
from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.models.devices import usable_cores
from rlhf_core.store.helping import fetch_parts
from tasks.shards.compute_shard import compute_shard
from tasks.shards.local_workers import LocalWorkers
from tasks.shards.stages import foresee_prompts, hand_out_weights
from tasks.shards.workers import Workers, using_workers, workers


def shard_workers(run: RunFolder) -> AbstractContextManager[None]:
    """The workers that a run's config asks for."""
    return using_workers(_workers(run))


def _workers(run: RunFolder) -> Workers | None:
    execution = run.config.execution
    if execution.engine == "ray":
        from tasks.ray.workers import RayWorkers

        return RayWorkers(run)
    count = execution.workers(int(run.identity["num_threads"]), usable_cores())
    return LocalWorkers(count) if count else None


def compute_ahead(run_dir: str, iteration: int, stages: dict[str, list[ArtifactRef]]) -> None:
    """Let workers compute the shards of stages that are not committed yet; nothing where there are no workers.

    Args:
        run_dir: of the run.
        iteration: from 0.
        stages: name -> the artifacts that it reads.
    """
    if workers() is None:
        return
    run = RunFolder.open(Path(run_dir))
    missing = {stage: refs for stage, refs in stages.items() if run.manifest(stage, iteration) is None}
    if "generate" in missing:
        hand_out_weights(run_dir, iteration)
    _compute(run, iteration, missing)


@contextlib.contextmanager
def answering_ahead(run_dir: str, iteration: int) -> Iterator[None]:
    """Around an iteration's update: let workers answer the next prompts, by the policy as it was before.

    Args:
        run_dir: of the run; nothing happens where its config does not ask for this, or in its last iteration.
        iteration: whose policy moves.
    """
    run, following = RunFolder.open(Path(run_dir)), iteration + 1
    if not run.config.execution.overlap or following == run.config.num_iterations:
        yield
        return
    hand_out_weights(run_dir, following)
    if workers() is None:
        yield
        return
    prompts = foresee_prompts(run_dir, following)
    context = contextvars.copy_context()  # in which Prefect finds its flow run
    with ThreadPoolExecutor(1) as beside:
        answers = beside.submit(context.run, _compute, run, following, {"generate": [prompts]})
        yield
        answers.result()


def _compute(run: RunFolder, iteration: int, stages: dict[str, list[ArtifactRef]]) -> None:
    there = workers()
    assert there is not None, "who asks has seen some"
    of = run.config.execution.num_shards
    calls = [
        (compute_shard, (stage, str(run.path), iteration, number, of, refs))
        for stage, refs in stages.items()
        for number in range(of)
    ]
    try:
        call_all(calls, at_once=there.count)
    except BaseException:
        there.close()  # or whoever waits for them would wait
        raise
    fetch_parts(run.path, iteration)
