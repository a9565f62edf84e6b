"""What all six tasks share: the key of a stage, skipping what is committed, timing, committing.

A stage that is committed under the same key, with an intact artifact, is not computed again: this is how a
stopped run resumes inside an iteration. The files decide, not Prefect's result store, whose writes are
neither atomic nor synced.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import pyarrow as pa
import torch
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import MissingContextError
from prefect.tasks import Task

from rlhf_core.contracts.artifacts import ArtifactRef, Manifest, commit_stage, read_artifact, stage_key
from rlhf_core.contracts.batches import StageResult
from rlhf_core.contracts.errors import IntegrityError, StorageError
from rlhf_core.memory import peak_resident_bytes, resident_bytes
from rlhf_core.models.devices import using_threads
from tasks.resources import Resources

Batch = TypeVar("Batch")


def retry_io_errors(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Retry what another try may cure (a full or flaky disk), never a mistake or a number."""
    return isinstance(state.result(raise_on_failure=False), OSError | StorageError)


FILES_DECIDE: Any = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "result_serializer": "json",
    "retries": 1,
    "retry_delay_seconds": 1,
    "retry_condition_fn": retry_io_errors,
    "log_prints": False,
}
"""Options of a task whose work is found on disk: retried once on I/O errors, never cached by Prefect."""


def stage_task(function: Callable[..., ArtifactRef]) -> Task[..., ArtifactRef]:
    """The Prefect task of a stage: named alike, retried once on I/O errors, never cached by Prefect."""
    named = {"name": function.__name__, "task_run_name": f"{function.__name__}-{{iteration}}"}
    return task(**named, **FILES_DECIDE)(function)


def run_stage(
    resources: Resources,
    stage: str,
    iteration: int,
    inputs: Mapping[str, str],
    compute: Callable[[], StageResult[Batch]],
    to_table: Callable[[Batch], pa.Table],
    *,
    state: Callable[[StageResult[Batch]], Mapping[str, Any]] | None = None,
    outputs: Callable[[], Mapping[str, str]] | None = None,
    num_threads: int | None = None,
) -> ArtifactRef:
    """Return the committed artifact of a stage, computing and committing it if need be.

    Args:
        resources: of the run.
        stage: its name.
        iteration: from 0.
        inputs: name -> digest of everything it reads that changes from iteration to iteration.
        compute: the stage itself.
        to_table: from its batch to Arrow.
        state: what it adds to the loop state; default: the result's own.
        outputs: digests of results that are not in the artifact, recorded beside the inputs.
        num_threads: default: the run's.
    """
    identity = resources.run.identity_digest_at(iteration)
    key = stage_key(stage, iteration, identity, inputs)
    committed = _committed(resources, stage, iteration)
    if committed is not None and committed.key == key and _is_intact(resources, committed):
        return committed.artifact
    started, cpu_started = time.perf_counter(), time.process_time()
    with using_threads(num_threads or resources.num_threads):
        try:
            result = compute()
        finally:
            resources.stage_done(stage)
        computed = time.perf_counter()
        recorded = dict(inputs) | dict(outputs() if outputs else {})
    manifest = commit_stage(
        resources.run.path,
        stage,
        iteration,
        to_table(result.batch),
        key=key,
        inputs=recorded,
        seed=resources.run.config.seed,
        identity=identity,
        metrics=result.metrics,
        state=state(result) if state else result.state,
        timing={
            "compute_s": computed - started + result.worker_s,
            "total_s": time.perf_counter() - started + result.worker_s,
        }
        | _taken(resources, time.process_time() - cpu_started),
    )
    return manifest.artifact


def _taken(resources: Resources, cpu_s: float) -> dict[str, float]:
    """What the whole process has taken of the machine, in this stage and so far."""
    now = resident_bytes()
    taken = {"cpu_s": cpu_s, "memory_bytes": now, "peak_memory_bytes": max(now, peak_resident_bytes())}
    if resources.device.type == "cuda":
        taken["peak_gpu_memory_bytes"] = float(torch.cuda.max_memory_allocated(resources.device))
    return taken


def _committed(resources: Resources, stage: str, iteration: int) -> Manifest | None:
    try:
        return resources.run.manifest(stage, iteration)
    except IntegrityError as error:
        _warn(f"{error}; computing it again")
        return None


def _is_intact(resources: Resources, manifest: Manifest) -> bool:
    try:
        read_artifact(resources.run.path, manifest.artifact)
    except IntegrityError as error:
        _warn(f"{error}; computing it again")
        return False
    return True


def _warn(message: str) -> None:
    try:
        get_run_logger().warning(message)
    except MissingContextError:  # called as task.fn(), outside a flow
        import logging

        logging.getLogger(__name__).warning(message)
