"""The evaluation flows: samples of the reference and of each policy, part by part; then the numbers and the picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from prefect import flow

from flows.artifacts import key_of
from flows.calling import call, flow_body
from flows.links import leave_note, run_name
from flows.markdown import evaluation_page
from flows.progress import watcher
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.evaluation.folder import EVALUATIONS, EvaluationFolder
from rlhf_core.evaluation.request import Request, accept_of_run
from rlhf_core.store.address import on_disk
from rlhf_core.store.opening import adding, local
from tasks.evaluation.evaluate import draw_samples, start_evaluation, write_evaluation
from tasks.tracking.evaluation import log_evaluation

SHOWN = 5
"""Responses on Prefect's page of an evaluation."""


@flow(
    name="evaluate",
    flow_run_name=run_name("evaluate", "target", "checkpoint"),
    persist_result=False,
    result_serializer="json",
)
def evaluate(
    target: str,
    prompts: str | None = None,
    column: str | None = None,
    checkpoint: str = Request.checkpoint,
    num_prompts: int = Request.num_prompts,
    samples: int = Request.samples,
    frontier_samples: int = Request.frontier_samples,
    seed: int = Request.seed,
    out: str | None = None,
    blend: tuple[float, ...] = Request.blend,
    config: RunConfig | None = None,
    trust: list[str] | None = None,
) -> str:
    """Evaluate checkpoints of a run, or a bare model, against the reference.

    Args:
        target: a run folder or s3://bucket/prefix, or a model folder or hub id.
        prompts: source of held-out prompts; default: the run's own.
        column: of the prompts; default: the run's.
        checkpoint: newest, best, last_good, all, or an iteration.
        num_prompts: at most so many, drawn by the seed.
        samples: responses of each policy to each prompt.
        frontier_samples: responses of the reference to each prompt.
        seed: of the evaluation's draws.
        out: folder of the results; default: in the run, or ``evaluations/`` for a bare model.
        blend: shares of the way from the reference to each policy, evaluated beside it.
        config: of a bare model; for a run, its own one with changes.
        trust: programs, functions and addresses that the run names and somebody else may have recorded.
    Returns: the folder of the results.
    """
    request = Request(
        target, prompts, column, checkpoint, num_prompts, samples, frontier_samples, seed, out, blend
    )  # fmt: skip
    with flow_body() as ended_with, adding(target, EVALUATIONS):
        accept_of_run(local(target), trust)
        return ended_with(measure(replace(request, target=local(target)), config))


@flow(
    name="evaluate-newest",
    flow_run_name=run_name("evaluate newest", "runs"),
    persist_result=False,
    result_serializer="json",
)
def evaluate_newest(
    runs: str = "runs",
    prompts: str | None = None,
    column: str | None = None,
    num_prompts: int = Request.num_prompts,
    samples: int = Request.samples,
    frontier_samples: int = Request.frontier_samples,
    seed: int = Request.seed,
) -> str:
    """Evaluate the newest checkpoint of the run in a folder that has saved one last.

    Args:
        runs: folder of run folders.
        prompts: source of held-out prompts; default: the run's own.
        column: of the prompts; default: the run's.
        num_prompts: at most so many, drawn by the seed.
        samples: responses of each policy to each prompt.
        frontier_samples: responses of the reference to each prompt.
        seed: of the evaluation's draws.
    Returns: the folder of the results.
    """
    with flow_body() as ended_with:
        target = str(newest_run(on_disk(runs, "runs")).path)
        request = Request(target, prompts, column, "newest", num_prompts, samples, frontier_samples, seed)
        return ended_with(measure(request, None))


def measure(request: Request, config: RunConfig | None) -> str:
    """Do an evaluation, or go on with it from the samples that are there. Returns: the folder of the results."""
    planned = start_evaluation(request, config)
    for done, (policy, part, size) in enumerate(planned.parts):
        watcher().stage_started(done, policy)
        call(draw_samples, planned.folder, policy, planned.policies[policy], part, size)
    watcher().stage_started(len(planned.parts), "numbers and picture")
    call(write_evaluation, planned)
    there = EvaluationFolder.open(Path(planned.folder))
    of = key_of(there.run_dir or Path(request.target))
    leave_note(
        f"{of}-evaluation",
        evaluation_page(planned.folder, there.summary(), there.side_by_side(SHOWN)),
        f"Evaluation of {of}",
    )
    log_evaluation(planned.folder)
    return planned.folder


def newest_run(runs: Path) -> RunFolder:
    """The run in a folder whose newest checkpoint was written last. Raises UserError if there is none."""
    found = [path for path in runs.glob("*/checkpoints/*/manifest.json") if path.parent.name.isdecimal()]
    found = [path for path in found if (path.parents[2] / "run.json").is_file()]
    if not found:
        raise UserError(f"runs is {runs}, which holds no run folder with a checkpoint; give a folder of run folders")
    newest = max(found, key=lambda path: (path.stat().st_mtime_ns, path))
    return RunFolder.open(newest.parents[2])
