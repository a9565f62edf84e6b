"""The evaluation flow: samples of the reference and of each policy, part by part; then the numbers and the picture."""

from __future__ import annotations

from prefect import flow

from flows.calling import call, flow_body
from flows.progress import watcher
from rlhf_core.contracts.config import RunConfig
from rlhf_core.evaluation.request import Request
from tasks.evaluate import draw_samples, start_evaluation, write_evaluation
from tasks.evaluation_log import log_evaluation


@flow(name="evaluate", flow_run_name="evaluate", persist_result=False, result_serializer="json")
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
) -> str:
    """Evaluate checkpoints of a run, or a bare model, against the reference.

    Args:
        target: a run folder, or a model folder or hub id.
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
    Returns: the folder of the results.
    """
    request = Request(
        target, prompts, column, checkpoint, num_prompts, samples, frontier_samples, seed, out, blend
    )  # fmt: skip
    with flow_body() as ended_with:
        planned = start_evaluation(request, config)
        for done, (policy, part, size) in enumerate(planned.parts):
            watcher().stage_started(done, policy)
            call(draw_samples, planned.folder, policy, planned.policies[policy], part, size)
        watcher().stage_started(len(planned.parts), "numbers and picture")
        call(write_evaluation, planned)
        log_evaluation(planned.folder)
        return ended_with(planned.folder)
