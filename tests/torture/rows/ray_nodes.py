"""Nodes of a Ray cluster are killed under a run, one after the other: nothing is lost, and nothing differs."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from ray_nodes import AUTHENTICATION, RayNodes
from torture.battery import Effort, Outcome
from torture.runs import battery_config, fingerprint, in_child, start

from flows import ppo
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.shards import SHARDS

NAME = "nodes killed"
GOAL = "200 iterations on 2 Ray nodes, one killed every 20: all finish, same hash"
LOOK_S = 0.002


def measure(effort: Effort) -> Outcome:
    """One run by the process alone, and one by two nodes, each of which dies again and again while it has a shard."""
    iterations, every = effort.size(4, 200), effort.size(2, 20)
    wanted, found = effort.folder / "wanted", effort.folder / "found"
    if in_child(lambda: start(_config(effort, iterations, None), wanted), log=effort.folder / "log"):
        raise RuntimeError((effort.folder / "log").read_text())
    told = effort.folder / "killed.json"
    failures: list[str] = []
    if in_child(lambda: _with_kills(effort, iterations, every, found, told), log=effort.folder / "log"):
        failures.append((effort.folder / "log").read_text().strip().splitlines()[-1])
    elif fingerprint(found) != fingerprint(wanted):
        failures.append("the run with dying nodes has another hash")
    killed: list[int] = json.loads(told.read_text()) if told.is_file() else []
    if len(killed) < (due := len(range(every - 1, iterations, every))):
        failures.append(f"only {len(killed)} of {due} nodes were killed in time")
    return Outcome(
        tried=iterations,
        passed=0 if failures else iterations,
        figure=f"{iterations} iterations, {len(killed)} nodes killed with a shard at hand, "
        + ("; ".join(failures) or "same hash as without Ray"),
        goal_size=200,
        failures=failures,
        numbers={"killed_in": killed},
    )


def _config(effort: Effort, iterations: int, address: str | None) -> RunConfig:
    by_ray = {"engine": "ray", "ray": {"address": address, "patience_s": 120.0}}
    execution = {"num_shards": 2, **(by_ray if address else {"num_workers": 0})}
    return battery_config(effort.tiny, {"num_iterations": iterations, "execution": execution})


def _with_kills(effort: Effort, iterations: int, every: int, run_dir: Path, told: Path) -> None:
    """The run by Ray, in a process of its own."""
    os.environ |= AUTHENTICATION
    folder = effort.folder / "nodes"
    folder.mkdir()
    nodes = RayNodes(2, folder)
    killed: list[int] = []
    without_a_kill = ppo.train_iteration

    def kill(iteration: int) -> None:
        """The older node, as soon as there are shards."""
        while not (run_dir / SHARDS / f"{iteration:06d}").is_dir():
            time.sleep(LOOK_S)
        nodes.replace_one()
        killed.append(iteration)
        told.write_text(json.dumps(killed))
        effort.progress(iteration + 1, iterations)

    def train_iteration(run_path: str, iteration: int, *before: Any) -> Any:
        if (iteration + 1) % every == 0:
            nodes.settle()  # of two that begin at once one fails: they find each other's sockets
            threading.Thread(target=kill, args=(iteration,), daemon=True).start()
        return without_a_kill(run_path, iteration, *before)

    ppo.train_iteration = train_iteration
    try:
        start(_config(effort, iterations, nodes.address), run_dir)
    finally:
        nodes.close()
