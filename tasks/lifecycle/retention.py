"""What of a run is kept: the newest checkpoints, the best and the last good one; old iterations in the archive."""

from __future__ import annotations

import logging
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import MissingContextError

from rlhf_core.contracts.archive import find_segment, segment_path
from rlhf_core.contracts.cleaned import Cleaned
from rlhf_core.contracts.compaction import loose_iterations, remove_archived, write_segment
from rlhf_core.contracts.durable import remove_folder, remove_leftovers
from rlhf_core.contracts.errors import IntegrityError, UserError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.shards import SHARDS, drop_shards
from tasks.session.session import open_session

ROOMS = ("iterations", "checkpoints", "archive", SHARDS)
"""Folders of a run that only the holder of its lock writes. Evaluations beside them have no lock."""


def compaction_is_due(run: RunFolder, num_finished: int) -> bool:
    """Whether ``artifacts.keep_iterations`` more iterations are finished, and twice as many at least."""
    keep = run.config.artifacts.keep_iterations
    return keep is not None and num_finished >= 2 * keep and num_finished % keep == 0


@task(task_run_name="compact-{num_finished}", cache_policy=NO_CACHE, persist_result=False)
def compact(run_dir: str, num_finished: int) -> list[str]:
    """Put iterations older than the newest ``artifacts.keep_iterations`` into the archive, as many at a time.

    Each iteration is read twice, written once and read back once, in its whole life; the run waits for it once in
    keep_iterations iterations. A killed compaction is finished by the next one, which comes before the next iteration.

    Returns: a sentence for each iteration that stays loose, or whose loose folder stays.
    """
    run = open_session(run_dir).run
    keep = run.config.artifacts.keep_iterations
    assert keep is not None
    cleaned = Cleaned.of(run.path)
    loose = {iteration for iteration in loose_iterations(run.path) if not cleaned.lacks(iteration)}
    told: list[str] = []
    for first in range(0, num_finished - 2 * keep + 1, keep):
        there = sorted(loose.intersection(range(first, first + keep)))
        if there:
            told += _compact(run.path, first, first + keep - 1, there)
    for sentence in told:
        _warn(sentence)
    return told


def _compact(run_dir: Path, first: int, last: int, loose: list[int]) -> list[str]:
    told: list[str] = []
    try:
        if not segment_path(run_dir, first, last).exists():
            told = write_segment(run_dir, first, last)
        for iteration in loose:
            if find_segment(run_dir, iteration) is not None:
                remove_archived(run_dir, iteration)
    except IntegrityError as error:
        told.append(f"iterations {first} to {last} stay loose: {error}; `rlhf verify {run_dir}` says what is damaged")
    return told


def remove_run_leftovers(run: RunFolder) -> list[Path]:
    """Take away the temporary names that killed processes left in a run. The caller holds its lock.

    Its evaluations are left alone: they have no lock, so that one may be writing just now.
    """
    found = [path for room in ROOMS if (run.path / room).is_dir() for path in remove_leftovers(run.path / room)]
    return found + remove_leftovers(run.path, deep=False)


def drop_finished_shards(run: RunFolder) -> None:
    """Remove what workers needed and made, of iterations that are finished. The caller holds the lock."""
    folder = run.path / SHARDS
    for name in sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []:
        if name.isdecimal() and int(name) < run.num_finished():
            drop_shards(run.path, int(name))


def _warn(sentence: str) -> None:
    try:
        get_run_logger().warning(sentence)
    except MissingContextError:  # called as task.fn(), outside a flow
        logging.getLogger(__name__).warning(sentence)


def drop_expired_checkpoints(run: RunFolder) -> None:
    """Remove the checkpoints that retention lets go. The caller holds the lock, and a newer one is durable."""
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
