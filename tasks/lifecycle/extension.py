"""Another number of iterations for a run that is finished or stopped: planned, recorded, and begun.

The number decides the learning rate of every iteration, so that it is part of the run's identity. Iterations before
the extension keep the identity that they were computed under: verify, replay and repair use the old number for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config, config_digest
from rlhf_core.contracts.durable import remove_file
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.run_folder import Extension, RunFolder
from rlhf_core.ops.schedules import learning_rate_at
from tasks.session.session import open_session

REPORT = ("before_after.json", "report.png")
"""What tells of the end of a run. Its page is written anew at the next end."""


@dataclass(frozen=True)
class PlannedExtension:
    """What another number of iterations means, for a person to read before it is recorded."""

    iteration: int
    """The first one under the new number."""
    config: RunConfig
    """With the new number."""
    sentences: list[str]
    """What changes: the number, and the learning rate. None where the run has that number already."""


def plan_extension(run: RunFolder, num_iterations: int) -> PlannedExtension:
    """Find out what another number of iterations changes. Writes nothing.

    Args:
        run: finished or stopped.
        num_iterations: of the whole run.
    Raises: UserError if the run has finished more already, or its config does not allow the number.
    """
    finished, before = run.num_finished(), run.config.num_iterations
    if num_iterations < finished:
        raise UserError(
            f"--iterations is {num_iterations}, and {run.path} has finished {finished} iterations already; give the "
            f"number of the whole run, {finished + 1} or more"
        )
    if num_iterations == before:
        return PlannedExtension(finished, run.config, [])
    config = build_config(run.config.model_dump(), [f"num_iterations={num_iterations}"])
    how_far = f"num_iterations: {before} -> {num_iterations}, from iteration {finished} on"
    sentences = [how_far] if finished == num_iterations else [how_far, _rate(run.config, config, finished)]
    return PlannedExtension(finished, config, sentences)


def extend_run(run_dir: str, num_iterations: int) -> list[str]:
    """Give a run another number of iterations, and record that in its ``run.json``.

    Args:
        run_dir: its folder.
        num_iterations: of the whole run.
    Returns: what has changed, one sentence each; none if the run has that number already.
    Raises: UserError as :func:`plan_extension`; RunLockedError if a process is working on it.
    """
    with RunFolder.open(Path(run_dir)).locked():
        run = RunFolder.open(Path(run_dir))
        plan = plan_extension(run, num_iterations)
        if plan.sentences:
            identity = {**run.identity, "config": config_digest(plan.config)}
            extension = Extension(
                plan.iteration,
                run.config.num_iterations,
                num_iterations,
                date.today().isoformat(),
                run.identity,
                len(run.drifts),
            )
            run.with_extension(plan.config, identity, extension)
            open_session.cache_clear()
    return plan.sentences


def drop_report_of_earlier_end(run: RunFolder) -> None:
    """Remove the result of a run that goes on beyond it. The caller holds the lock."""
    if run.num_finished() < run.config.num_iterations:
        for name in REPORT:
            if (run.path / name).is_file():
                remove_file(run.path / name)


def _rate(before: RunConfig, after: RunConfig, iteration: int) -> str:
    """The learning rate from an iteration on, and the one before it."""
    ppo, last = after.ppo, after.num_iterations - 1

    def rate(config: RunConfig, at: int) -> str:
        return "{:.3g}".format(
            learning_rate_at(
                at,
                peak=ppo.learning_rate,
                schedule=ppo.lr_schedule,
                num_iterations=config.num_iterations,
                warmup_iterations=ppo.warmup_iterations,
            )
        )

    if ppo.lr_schedule == "constant":
        return f"ppo.lr_schedule constant: the learning rate is {rate(after, iteration)}, whatever the number"
    was = f", after {rate(before, iteration - 1)} in iteration {iteration - 1}" if iteration > 0 else ""
    return (
        f"ppo.lr_schedule {ppo.lr_schedule} now falls to 0 over {after.num_iterations} iterations: the learning rate "
        f"is {rate(after, iteration)} in iteration {iteration}{was}, and {rate(after, last)} in iteration {last}"
    )
