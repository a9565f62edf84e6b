"""The beginning of a run, its checkpoints, and what is kept of them."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.durable import remove_folder
from rlhf_core.contracts.errors import DriftError, UserError
from rlhf_core.contracts.run_folder import RunFolder, check_vacant
from rlhf_core.identity import identity_drift, run_identity
from rlhf_core.models.checkpoints import save_checkpoint
from rlhf_core.models.devices import using_threads
from rlhf_core.preflight import preflight
from tasks.resources import Resources, resources


def start_run(config: RunConfig, run_dir: str) -> None:
    """Check everything, then create the run folder. Nothing is written if anything is wrong.

    Raises: UserError with every problem found.
    """
    check_vacant(Path(run_dir))
    plan = preflight(config)
    RunFolder.create(Path(run_dir), config, run_identity(config, plan.prompt_set))
    resources(run_dir).keep_plan(plan)


def check_resumable(run_dir: str, *, accept_drift: bool) -> RunConfig:
    """The config of a stopped run, if resuming it here would give the same run.

    Raises:
        UserError: no run there, or its models or prompts are gone.
        DriftError: machine, libraries, models, prompts or source differ, and the drift is not accepted.
    """
    run = RunFolder.open(Path(run_dir))
    drift = identity_drift(run.identity, run_identity(run.config, preflight(run.config).prompt_set))
    if drift and not accept_drift:
        raise DriftError(
            f"{run_dir} was started under other conditions, so that resuming it would not give the same run:\n  "
            + "\n  ".join(drift)
            + "\nresume it where it was started, or pass --accept-drift to go on all the same"
        )
    return run.config


@task(task_run_name="save_checkpoint-{iteration}", cache_policy=NO_CACHE, persist_result=False)
def save_due_checkpoint(run_dir: str, iteration: int) -> str | None:
    """Save the state before ``iteration`` if it is due and not saved yet, then drop what retention lets go.

    Returns: the checkpoint's folder if one was written now.
    """
    kept = resources(run_dir)
    config, run = kept.run.config, kept.run
    is_due = iteration % config.checkpoint.every == 0 or iteration == config.num_iterations
    if iteration == 0 or not is_due or iteration in run.checkpoints():
        return None
    _save(kept, iteration)
    _drop_expired(run)
    return str(run.checkpoint_path(iteration))


@task(task_run_name="keep_last_good-{iteration}", cache_policy=NO_CACHE, persist_result=False)
def keep_last_good(run_dir: str, iteration: int) -> None:
    """Keep the state before ``iteration`` as ``RUN/checkpoints/last_good``, out of reach of retention."""
    kept = resources(run_dir)
    if iteration not in kept.run.checkpoints():
        _save(kept, iteration)
    kept.run.keep_as_last_good(iteration)
    _drop_expired(kept.run)


def _save(kept: Resources, iteration: int) -> None:
    with using_threads(kept.num_threads):
        save_checkpoint(
            kept.run.checkpoint_path(iteration),
            kept.trainer(iteration),
            kept.tokenizer.tokenizer,
            kept.run.state_before(iteration),
            identity=kept.identity,
            merge_adapter=kept.run.config.policy.lora.save == "merged",
        )


def _drop_expired(run: RunFolder) -> None:
    for old in expired_checkpoints(run):
        remove_folder(run.checkpoint_path(old))


def checkpoint_value(run: RunFolder, iteration: int) -> float:
    """How good a checkpoint is: score - kl.coef x KL, a mean over the iterations since the one before it."""
    since = max(0, iteration - run.config.checkpoint.every)
    values: list[float] = []
    for i in range(since, iteration):
        manifest = run.manifest("shape_rewards", i)
        if manifest is not None:
            metrics = manifest.metrics
            values.append(metrics["objective/scores"] - run.config.kl.coef * metrics["objective/kl"])
    return sum(values) / len(values) if values else float("-inf")


def best_checkpoint(run: RunFolder) -> int | None:
    """The iteration of the best checkpoint on disk; the later one of equals."""
    return max(run.checkpoints(), key=lambda i: (checkpoint_value(run, i), i), default=None)


def named_checkpoints(run: RunFolder, name: str) -> list[int]:
    """The checkpoints that a command line names, ascending.

    Args:
        run: that has them.
        name: newest, best, last_good, all, or an iteration.
    Raises: UserError if there is none of it.
    """
    saved = run.checkpoints()
    if not saved:
        raise UserError(
            f"{run.path} has no checkpoint yet: the first comes after {run.config.checkpoint.every} iterations "
            "(checkpoint.every)"
        )
    best, last_good = best_checkpoint(run), run.last_good
    assert best is not None
    if name == "last_good" and last_good is None:
        raise UserError(f"--checkpoint is last_good, but no guard has stopped {run.path}; choose newest, best or all")
    chosen = {"newest": saved[-1:], "best": [best], "all": saved, "last_good": [last_good or 0]}.get(name)
    if chosen is None:
        if not name.isdecimal():
            raise UserError(f"--checkpoint is {name!r}; choose newest, best, last_good, all or an iteration")
        chosen = [int(name)]
        if chosen[0] not in saved:
            raise UserError(f"--checkpoint {name} is not kept in {run.path}; there are: {', '.join(map(str, saved))}")
    return chosen


def expired_checkpoints(run: RunFolder) -> list[int]:
    """Checkpoints that are neither among the newest ``keep_last`` nor the best nor the last good one.

    Where a guard may stop the run, at least the newest two are kept: the newest is not proved good yet.
    """
    saved = run.checkpoints()
    kept = set(saved[-max(run.config.checkpoint.keep_last, 1 + run.config.guards.may_stop) :])
    if run.last_good is not None:
        kept.add(run.last_good)
    if run.config.checkpoint.keep_best and (best := best_checkpoint(run)) is not None:
        kept.add(best)
    return [i for i in saved if i not in kept]
