"""A sweep before its runs begin, and after they have ended: checks, folder, results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import config_digest
from rlhf_core.contracts.errors import IntegrityError, UserError
from rlhf_core.contracts.places import place_of
from rlhf_core.contracts.trust import accept_config, check_recorded
from rlhf_core.disk_use import free_bytes, predict_disk_use
from rlhf_core.models.devices import resolve_num_threads
from rlhf_core.preflight import preflight
from rlhf_core.preflight.pins import pinned
from rlhf_core.sweeping.folder import SweepFolder, SweepRecord, check_folder, read_sweep, runs_of
from rlhf_core.sweeping.grid import MAX_RUNS, SweepRun, point_label, together, with_values
from rlhf_core.sweeping.summary import criterion_of, summarize
from tasks.sweep.figure import draw_sweep
from tasks.tracking.outbox import Ledger


@dataclass(frozen=True)
class SweepRequest:
    """What a user asks to sweep, beside the config.

    Example: ``SweepRequest("runs/beta-sweep", {"kl.coef": [0.02, 0.05]}, [0, 1, 2])``
    """

    folder: str
    grid: dict[str, list[Any]] = field(default_factory=dict[str, list[Any]])
    """Dotted key -> values."""
    seeds: list[int] | None = None
    """None: the config's own."""
    jobs: int = 1
    """Runs at a time."""
    at_kl: float | None = None
    """The best point may have at most so many nats."""
    price: float | None = None
    """Score that a nat must buy, where ``at_kl`` is not given; None: the config's kl.coef."""
    max_runs: int = MAX_RUNS


@dataclass(frozen=True)
class PlannedSweep:
    """What a sweep consists of, for a person to read before it begins."""

    folder: str
    num_points: int
    num_seeds: int
    num_runs: int
    num_finished: int
    """Runs that are finished already."""
    num_begun: int
    """Runs that were stopped, and go on."""
    iterations: int
    """Of all runs."""
    episodes: int
    num_threads: int
    jobs: int
    disk_bytes: int
    """At most; of all runs."""
    free_bytes: int


def check_sweep(request: SweepRequest, config: RunConfig) -> PlannedSweep:
    """What would be run. Writes nothing.

    Args:
        request: what the user asks.
        config: what all runs share.
    Raises: UserError with every problem of every combination.
    """
    return _plan(request, config)[0]


def start_sweep(request: SweepRequest, config: RunConfig) -> SweepFolder:
    """Check everything, then create the folder, or find it again. Nothing is written if anything is wrong.

    Raises:
        UserError: with every problem of every combination.
        RunLockedError: another process works on one of its runs.
    """
    there = SweepFolder.create(Path(request.folder), _plan(request, config)[1])
    there.check_runs()
    return there


def is_done(there: SweepFolder, run: SweepRun) -> bool:
    """Whether a run is finished, and nothing of it is missing in the tracker."""
    standing = there.standing(run)
    if not standing.is_finished:
        return False
    if not run.config.tracking.enabled:
        return True
    try:
        return Ledger.of(there.run_path(run)).sent >= min(standing.finished, standing.of)
    except IntegrityError:  # resuming the run tells about it
        return False


@task(task_run_name="write_sweep", cache_policy=NO_CACHE, persist_result=False, result_serializer="json")
def write_sweep(folder: str, failures: Mapping[str, str], at_kl: float | None, price: float | None) -> None:
    """Write summary.json, sweep.png and best.yaml of what has finished.

    Args:
        folder: of the sweep.
        failures: name of a run that has failed -> why.
        at_kl: nats that the best point may have at most.
        price: score for a nat; None: the config's kl.coef.
    """
    there = SweepFolder.open(Path(folder))
    summary = summarize(there, criterion_of(there.config.kl.coef, at_kl, price), failures)
    best = summary["best"]["point"]
    config = None if best is None else with_values(there.config, there.points[best])
    there.write_results(summary, draw_sweep(summary, there.path.resolve().name), config)


_disk_bytes: dict[str, int] = {}
"""Digest of a config that has passed its pre-flight in this process -> its disk use: command line and flow both ask."""


def _plan(request: SweepRequest, config: RunConfig) -> tuple[PlannedSweep, SweepRecord]:
    path, problems = Path(request.folder), list[str]()
    if request.jobs < 1:
        problems.append(f"--jobs is {request.jobs}; give how many runs are made at a time, 1 or more")
    try:
        criterion_of(config.kl.coef, request.at_kl, request.price)
    except UserError as error:
        problems += error.problems
    seeds = [config.seed] if request.seeds is None else request.seeds
    before = read_sweep(path)
    threads = before.num_threads if before and config.num_threads is None else _threads(request, config)
    held = pinned(config, leave={place_of(key) for key in request.grid}) if before is None else None
    unpinned = {} if held is None else held.before
    record = SweepRecord.of(config if held is None else held.config, request.grid, seeds, threads, unpinned)
    try:
        check_folder(path, record)
        runs = runs_of(record, max_runs=request.max_runs)
        for run in runs:
            accept_config(run.config)
        if before is not None:
            runs = runs_of(before, max_runs=request.max_runs)
            for run in runs:
                check_recorded(run.config, path)
    except UserError as error:
        raise UserError(*problems, *error.problems) from None
    disk_bytes, bad = _preflight(runs)
    if problems or bad:
        raise UserError(*problems, *bad)
    there = [] if before is None else [SweepFolder.open(path).standing(run) for run in runs]
    plan = PlannedSweep(
        folder=request.folder,
        num_points=len({run.point for run in runs}),
        num_seeds=len(seeds),
        num_runs=len(runs),
        num_finished=sum(standing.is_finished for standing in there),
        num_begun=sum(standing.is_begun and not standing.is_finished for standing in there),
        iterations=sum(run.config.num_iterations for run in runs),
        episodes=sum(run.config.num_iterations * run.config.prompts.batch_size for run in runs),
        num_threads=threads,
        jobs=min(request.jobs, len(runs)),
        disk_bytes=disk_bytes,
        free_bytes=free_bytes(path),
    )
    return plan, before or record


def _preflight(runs: list[SweepRun]) -> tuple[int, list[str]]:
    """Check every point against its files and models. Returns: the disk use of all runs, and every problem."""
    found: list[tuple[str, list[str]]] = []
    disk_bytes = 0
    first_seed = [run for run in runs if run.seed == runs[0].seed]
    for run in first_seed:
        digest, problems = config_digest(run.config), list[str]()
        try:
            if digest not in _disk_bytes:
                _disk_bytes[digest] = predict_disk_use(run.config, preflight(run.config)).run
            disk_bytes += _disk_bytes[digest] * len(runs) // len(first_seed)
        except UserError as error:
            problems += error.problems
        found.append((point_label(run.values), problems))
    return disk_bytes, together(found)


def _threads(request: SweepRequest, config: RunConfig) -> int:
    """CPU threads of a run: the config's, or its share of the cores at hand."""
    if config.num_threads is not None:
        return config.num_threads
    num_runs = math.prod(len(values) for values in request.grid.values()) * len(request.seeds or [config.seed])
    return max(1, resolve_num_threads(None) // max(1, min(request.jobs, num_runs)))
