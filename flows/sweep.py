"""The sweep flow: ordinary training runs as processes of their own, a few at a time; then what they say together."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from typing import Any

from prefect import flow
from prefect.settings import PREFECT_API_URL

from flows.calling import call, flow_body
from flows.child_processes import RLHF, Child, end
from flows.links import leave_note, link_to_tracker, take_over, this_flow_run
from flows.progress import watcher
from flows.stopping import received
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.store.address import on_disk
from rlhf_core.sweeping.folder import SweepFolder
from rlhf_core.sweeping.grid import MAX_RUNS, SweepRun
from tasks.sweep.log import SweepTracker, note
from tasks.sweep.runs import SweepRequest, is_done, start_sweep, write_sweep

POLL_S = 0.5
"""Between two looks at the processes."""


@flow(name="sweep", flow_run_name="sweep", persist_result=False, result_serializer="json")
def sweep(
    config: RunConfig,
    folder: str,
    grid: dict[str, list[Any]],
    seeds: list[int] | None = None,
    jobs: int = 1,
    at_kl: float | None = None,
    price: float | None = None,
    max_runs: int = MAX_RUNS,
) -> str:
    """Train every combination of a grid with every seed, or go on with it; find the best.

    Args:
        config: what all runs share.
        folder: of the sweep; a new one, or one that was begun with the same config, grid and seeds.
        grid: dotted key -> its values: {"kl.coef": [0.02, 0.05]}.
        seeds: one run of each combination for each; default: the config's own.
        jobs: runs at a time; each has its share of the cores.
        at_kl: the best combination may have at most so many nats.
        price: score that a nat of KL must buy, where at_kl is not given; default: kl.coef of the config.
        max_runs: more are refused.
    Returns: the folder.
    """
    on_disk(folder, "folder")
    request = SweepRequest(folder, grid, seeds, jobs, at_kl, price, max_runs)
    with flow_body() as ended_with:
        there = start_sweep(request, config)
        with there.locked(), SweepTracker(there, this_flow_run()) as tracker:
            take_over(RunFolder(there.path, there.config, {}))
            failures = train_all(there, jobs, tracker)
            watcher().stage_started(len(there.runs), "numbers and picture")
            call(write_sweep, folder, failures, at_kl, price)
        leave_note("sweep", note(there.summary()), "The sweep's result")
        link_to_tracker(tracker.page, tracker.uri, tracker.run_id)
        return ended_with(folder)


def train_all(there: SweepFolder, jobs: int, tracker: SweepTracker) -> dict[str, str]:
    """Start, or go on with, every run that is not finished. One that fails ends itself alone.

    Returns: name of a run that has failed -> why.
    """
    waiting = [run for run in there.runs if not is_done(there, run)]
    running: dict[str, tuple[SweepRun, Child]] = {}
    failures: dict[str, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[run.name] = run, start(there, run)
                watcher().stage_started(_num_ended(there, waiting, running), run.name)
            time.sleep(POLL_S)
            for name, (run, child) in list(running.items()):
                tracker.look(run)
                code = child.poll()
                if code is None:
                    continue
                del running[name]
                end([child], grace_s=0)  # whatever it has left behind
                tracker.look(run)
                if code:
                    failures[name] = why(child, code)
                    watcher().warned(f"{name} has failed: {failures[name]}")
                watcher().stage_started(_num_ended(there, waiting, running), "")
    finally:
        end([child for _, child in running.values()], received() or signal.SIGTERM)
    return failures


def start(there: SweepFolder, run: SweepRun) -> Child:
    """Start the process of a run: what a person would type, in the same folder."""
    path = str(there.run_path(run))
    is_begun = (there.run_path(run) / "run.json").is_file()
    train = ("train", "--config", str(there.config_path(run)), "--run-dir", path)
    return Child([*RLHF, *(("resume", path) if is_begun else train)], there.log_path(run), environment(run))


def environment(run: SweepRun) -> Mapping[str, str]:
    """Of a run's process: its threads; and Prefect's server, if there is one that outlives this command.

    A temporary server of each process would take ten seconds and 240 MB, and show the run to nobody.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT__")}
    api = PREFECT_API_URL.value()
    prefect = {"PREFECT_SERVER_EPHEMERAL_ENABLED": "false"} if api is None else {"PREFECT_API_URL": api}
    return inherited | prefect | {"OMP_NUM_THREADS": str(run.config.num_threads)}


def why(child: Child, code: int) -> str:
    """Why a run's process has ended with this exit code, in a line."""
    said = child.last_lines(20)
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    reason = errors[0] if errors else said[-1] if said else "it has said nothing"
    ended = f"ended by signal {code - 128}" if code > 128 else f"exit code {code}"
    return f"{reason} ({ended})"


def _num_ended(there: SweepFolder, waiting: list[SweepRun], running: Mapping[str, object]) -> int:
    return len(there.runs) - len(waiting) - len(running)
