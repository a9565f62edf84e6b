"""Shards of a stage ahead of its task: computed by workers side by side, so that the task has only to join them.

A stage that finds no part computes it itself: nothing here decides what an artifact holds, only how soon it is there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from flows.calling import call_all
from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.models.devices import usable_cores
from tasks.compute_shard import compute_shard
from tasks.local_workers import LocalWorkers
from tasks.shards import hand_out_weights
from tasks.workers import Workers, using_workers, workers


def shard_workers(run: RunFolder) -> AbstractContextManager[None]:
    """The workers that a run's config asks for."""
    return using_workers(_workers(run))


def _workers(run: RunFolder) -> Workers | None:
    execution = run.config.execution
    if execution.engine == "ray":
        from tasks.ray_workers import RayWorkers

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
    there = workers()
    if there is None:
        return
    run = RunFolder.open(Path(run_dir))
    missing = {stage: refs for stage, refs in stages.items() if run.manifest(stage, iteration) is None}
    if "generate" in missing:
        hand_out_weights(run_dir, iteration)
    of = run.config.execution.num_shards
    calls = [
        (compute_shard, (stage, run_dir, iteration, number, of, refs))
        for stage, refs in missing.items()
        for number in range(of)
    ]
    try:
        call_all(calls, at_once=there.count)
    except BaseException:
        there.close()  # or whoever waits for them would wait
        raise
