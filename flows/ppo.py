"""The training flow: an iteration is six tasks, in the order of the algorithm.

prompts -> rollouts -> scores ─┐
                 └-> ref log-probs ─┴-> experience -> update statistics + next policy
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows.artifacts import RunPage
from flows.calling import call, call_both, flow_body
from flows.guarding import announce, obey
from flows.links import link_to_tracker, own_run_dir, run_name, take_over, tell_all, this_flow_run, was_begun_here
from flows.progress import also_watched_by, watcher
from flows.sharding import answering_ahead, compute_ahead, shard_workers
from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.trust import accept_config
from rlhf_core.store.opening import writing
from tasks.generate import generate
from tasks.lifecycle.extension import drop_report_of_earlier_end, extend_run
from tasks.lifecycle.guards import Guards, accept_tripped, change_guards
from tasks.lifecycle.retention import compact, compaction_is_due, drop_finished_shards, remove_run_leftovers
from tasks.lifecycle.start import check_resumable, consent, record_drift, save_due_checkpoint, start_run
from tasks.ppo_update import ppo_update
from tasks.ranks.group import ranks_end
from tasks.reference_logprobs import reference_logprobs
from tasks.reports.report import write_report
from tasks.sample_prompts import sample_prompts
from tasks.score_rewards import score_rewards
from tasks.shape_rewards import shape_rewards
from tasks.tracking.metrics import iteration_metrics
from tasks.tracking.tracker import Tracker

SIDE_BY_SIDE: Any = ThreadPoolTaskRunner(max_workers=2)
"""score_rewards and reference_logprobs run at the same time."""


@flow(
    name="ppo",
    flow_run_name=run_name("ppo", "run_dir"),
    task_runner=SIDE_BY_SIDE,
    persist_result=False,
    result_serializer="json",
)
def train(config: RunConfig, run_dir: str | None = None) -> str:
    """Train a policy with PPO.

    Args:
        config: every knob of the run.
        run_dir: a new folder, or s3://bucket/prefix; default: ``runs/ppo-<date>-<time>``.
    Returns: the same.
    """
    with flow_body() as ended_with:
        run_dir = run_dir or own_run_dir()
        with writing(run_dir) as folder:
            begin(config, str(folder))
            iterate(str(folder))
        return ended_with(run_dir)


def begin(config: RunConfig, run_dir: str) -> None:
    """Start a run. One that this very flow run has begun, and that was retried or suspended, goes on instead."""
    if was_begun_here(run_dir):
        accept_config(config)
        check_resumable(run_dir, accept_drift=False)
    else:
        start_run(config, run_dir)


@flow(
    name="ppo-resume",
    flow_run_name=run_name("ppo resume", "run_dir"),
    task_runner=SIDE_BY_SIDE,
    persist_result=False,
    result_serializer="json",
)
def resume(
    run_dir: str,
    accept_drift: bool = False,
    accept_guards: bool = False,
    set_guards: list[str] | None = None,
    set_update: list[str] | None = None,
    trust: list[str] | None = None,
    vllm_python: str | None = None,
    num_iterations: int | None = None,
) -> str:
    """Continue a stopped run from its last committed stage, or a finished one to another number of iterations.

    Args:
        run_dir: its folder, or s3://bucket/prefix.
        accept_drift: go on although machine, libraries, models or prompts differ.
        accept_guards: go on although a guard has stopped it, until that guard's number is back within its threshold.
        set_guards: changes of its guards, as ``guards.kl_ceiling.threshold=20``.
        set_update: changes of who makes its updates, as ``execution.update.nproc_per_node=2``; a drift, most of them.
        trust: programs, functions and addresses that the run names and somebody else may have recorded.
        vllm_python: interpreter of an environment with vLLM, in the place of the recorded one.
        num_iterations: of the whole run from now on: more for a run that is finished. Default: as it is.
    Returns: the same place.
    """
    with flow_body() as ended_with:
        with writing(run_dir, new=False) as path:
            folder = str(path)
            consent(folder, trust or (), vllm_python)
            check_resumable(folder, accept_drift=accept_drift)
            if accept_drift or set_update:
                record_drift(folder, set_update or (), accepted=accept_drift)
            if set_guards:
                change_guards(folder, set_guards)
            if accept_guards:
                accept_tripped(folder)
            if num_iterations is not None:
                tell_all(extend_run(folder, num_iterations))
            iterate(folder)
        return ended_with(run_dir)


def iterate(run_dir: str) -> str:
    """Run the iterations that are missing."""
    run = RunFolder.open(Path(run_dir))
    with run.locked():
        run = RunFolder.open(Path(run_dir))  # again: nobody else can change or remove it now
        remove_run_leftovers(run)
        drop_report_of_earlier_end(run)
        take_over(run)
        guards = Guards(run)
        with (
            ranks_end(),
            shard_workers(run),
            RunPage(run) as page,
            also_watched_by(page),
            Tracker(run, this_flow_run()) as tracker,
        ):
            page.tracker = tracker
            drop_finished_shards(run)  # of a process that was killed before it did
            update = None
            for iteration in range(run.num_finished(), run.config.num_iterations):
                obey(guards, iteration - 1)
                call(save_due_checkpoint, run_dir, iteration)
                if compaction_is_due(run, iteration):
                    call(compact, run_dir, iteration)
                update = train_iteration(run_dir, iteration, update)
                drop_finished_shards(run)
                announce(run, guards.check(iteration))
                tracker.iteration_done(iteration)
                watcher().iteration_finished(iteration, iteration_metrics(run, iteration))
            obey(guards, run.config.num_iterations - 1)
            call(save_due_checkpoint, run_dir, run.config.num_iterations)
            call(write_report, run_dir)
        link_to_tracker(tracker.page, tracker.uri, tracker.run_id)
    return run_dir


def train_iteration(run_dir: str, iteration: int, before: ArtifactRef | None = None) -> ArtifactRef:
    """One iteration: six tasks; the two that do not depend on each other run side by side.

    Args:
        run_dir: of the run.
        iteration: from 0.
        before: the update before it, whose policy and prompt cursor are in the run folder; None: of another flow run.
    Returns: its own update.
    """
    saw = watcher().stage_started
    saw(iteration, "sample_prompts")
    prompts = call(sample_prompts, run_dir, iteration, after=before)
    saw(iteration, "generate")
    compute_ahead(run_dir, iteration, {"generate": [prompts]})
    rollouts = call(generate, run_dir, iteration, prompts, after=before)
    saw(iteration, "score_rewards")
    read = [prompts, rollouts]
    compute_ahead(run_dir, iteration, {"score_rewards": read, "reference_logprobs": read})
    responses = (run_dir, iteration, *read)
    scores, ref_logprobs = call_both((score_rewards, responses), (reference_logprobs, responses))
    saw(iteration, "shape_rewards")
    experience = call(shape_rewards, run_dir, iteration, prompts, rollouts, scores, ref_logprobs)
    saw(iteration, "ppo_update")
    with answering_ahead(run_dir, iteration):
        return call(ppo_update, run_dir, iteration, prompts, rollouts, experience)
