"""What all six tasks share: the key of a stage, skipping what is committed, timing, committing.

A stage that is committed under the same key, with an intact artifact, is not computed again: this is how a
stopped run resumes inside an iteration. The files decide, not Prefect's result store, whose writes are
neither atomic nor synced.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import MissingContextError
from prefect.tasks import Task

from rlhf_core.contracts.artifacts import ArtifactRef, Manifest, commit_stage, read_artifact, stage_key
from rlhf_core.contracts.batches import StageResult
from rlhf_core.contracts.errors import IntegrityError, StorageError
from rlhf_core.contracts.stage_graph import StageSpec
from rlhf_core.memory import peak_resident_bytes, resident_bytes
from rlhf_core.models.devices import using_threads
from tasks.session.session import Session

Refs = Sequence[ArtifactRef]


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
    session: Session,
    spec: StageSpec,
    iteration: int,
    refs: Refs,
    compute: Callable[[int, Refs], StageResult[Any]],
) -> ArtifactRef:
    """Return the committed artifact of a stage, computing and committing it if need be.

    Args:
        session: of the run.
        spec: the stage's row in the stage graph.
        iteration: from 0.
        refs: the artifacts that it reads, in the order of ``spec.reads``.
        compute: the stage itself, called with iteration and refs where no intact artifact of the same key is there.
    """
    identity = session.run.identity_digest_at(iteration)
    inputs = session.input_digests(spec, iteration, refs)
    key = stage_key(spec.name, iteration, identity, inputs)
    committed = _committed(session, spec.name, iteration)
    if committed is not None and committed.key == key and _is_intact(session, committed):
        return committed.artifact
    started, cpu_started = time.perf_counter(), time.process_time()
    with using_threads(session.threads_of(spec.name)):
        try:
            result = compute(iteration, refs)
        finally:
            session.models.stage_done(spec.name)
    computed = time.perf_counter()
    manifest = commit_stage(
        session.run.path,
        spec.name,
        iteration,
        result.batch.to_table(),
        key=key,
        inputs=inputs | dict(result.outputs),
        seed=session.run.config.seed,
        identity=identity,
        metrics=result.metrics,
        state=result.state,
        timing={
            "compute_s": computed - started + result.worker_s,
            "total_s": time.perf_counter() - started + result.worker_s,
        }
        | _taken(session, time.process_time() - cpu_started),
    )
    return manifest.artifact


def _taken(session: Session, cpu_s: float) -> dict[str, float]:
    """What the whole process has taken of the machine, in this stage and so far."""
    now = resident_bytes()
    taken = {"cpu_s": cpu_s, "memory_bytes": now, "peak_memory_bytes": max(now, peak_resident_bytes())}
    if session.device.type == "cuda":
        taken["peak_gpu_memory_bytes"] = float(torch.cuda.max_memory_allocated(session.device))
    return taken


def _committed(session: Session, stage: str, iteration: int) -> Manifest | None:
    try:
        return session.run.manifest(stage, iteration)
    except IntegrityError as error:
        _warn(f"{error}; computing it again")
        return None


def _is_intact(session: Session, manifest: Manifest) -> bool:
    try:
        read_artifact(session.run.path, manifest.artifact)
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
