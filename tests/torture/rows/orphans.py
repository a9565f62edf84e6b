"""kill -9 of a run with all that it starts: Prefect's temporary server, workers, torchrun and its ranks, vLLM.

Every process of a run bears a mark in its environment; five seconds after the kill, no living process may bear it.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import lives
from torture.battery import Effort, Outcome
from torture.runs import battery_config
from vllm_python import vllm_python

from rlhf_core.contracts.config_io import build_config, canonical_json

NAME = "nothing outlives a killed run"
GOAL = "60 kills, at named and at random moments: no process of the run is left after 5 s"
WITHIN_S = 5.0
START_S = 120.0
MARK = "RLHF_TORTURE_MARK"
COMMAND = [sys.executable, "-P", "-c", "from flows.cli import main; main()"]
RANKS = ("execution.update.launcher=torchrun", "execution.update.nproc_per_node=2", "execution.num_workers=2")
SHARDS = ("execution.num_shards=2",)


@dataclass(frozen=True)
class Case:
    """When a run is killed."""

    name: str
    settings: tuple[str, ...] = (*SHARDS, *RANKS)
    seen: tuple[str, ...] = ()
    """Parts of command lines; the kill comes once a process of the run has each of them."""
    after_s: float = 0.0
    """Seconds since that moment, or since the start."""


def measure(effort: Effort) -> Outcome:
    """Every case, each a run of its own."""
    cases, failures, most = _cases(effort), list[str](), 0
    for done, case in enumerate(cases):
        problem, seen = _kill(effort, case, effort.folder / f"{done}")
        failures += [f"{case.name}: {problem}"] if problem else []
        most = max(most, seen)
        effort.progress(done + 1, len(cases))
    return Outcome(
        tried=len(cases),
        passed=len(cases) - len(failures),
        figure=f"{len(cases)} kills of runs of up to {most} processes: none is left after {WITHIN_S:.0f} s"
        if not failures else f"{len(failures)} kills left processes behind",
        goal_size=60,
        failures=failures[:20],
        numbers={"most_processes": most},
    )  # fmt: skip


def _cases(effort: Effort) -> list[Case]:
    ranks = Case("when both ranks are there", seen=("uvicorn", "torch.distributed.run", "tasks.ranks.process", "spawn"))
    if not effort.full:
        return [ranks]
    vllm = ("generation.engine=vllm", f"generation.vllm.python={vllm_python(effort.folder / 'vllm')}")
    pick = random.Random(9)
    return [
        ranks,
        Case("when the server starts", seen=("uvicorn",)),
        Case("when torchrun starts", seen=("torch.distributed.run",)),
        Case("when vLLM is there", vllm, seen=("vllm_process",), after_s=1.0),
        *(Case(f"after {s:.1f} s", after_s=s) for s in (pick.uniform(1, 25) for _ in range(46))),
        *(Case(f"with vLLM, after {s:.1f} s", vllm, after_s=s) for s in (pick.uniform(1, 20) for _ in range(10))),
    ]


def _kill(effort: Effort, case: Case, folder: Path) -> tuple[str, int]:
    """What is wrong, and how many processes the run had."""
    folder.mkdir()
    tree = battery_config(effort.tiny).model_dump()
    config = build_config(tree, [*case.settings, "num_iterations=500"])
    (folder / "run.yaml").write_bytes(canonical_json(config.model_dump()))
    mark = uuid.uuid4().hex
    environment: dict[str, str] = {**os.environ, MARK: mark, "PREFECT_HOME": str(folder / "prefect")}
    environment.pop("PREFECT_API_URL", None)
    with (folder / "log").open("wb") as log:
        run: subprocess.Popen[Any] = subprocess.Popen(
            [*COMMAND, "train", "--config", str(folder / "run.yaml"), "--run-dir", str(folder / "run")],
            env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    problem = _wait(case, mark, run)
    seen = len(_marked(mark))
    run.send_signal(signal.SIGKILL)
    run.wait()
    until = time.monotonic() + WITHIN_S
    while (left := _marked(mark)) and time.monotonic() < until:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    if problem:
        return f"{problem}: {(folder / 'log').read_text(errors='replace')[-500:]}", seen
    return f"{len(left)} processes are left: {'; '.join(line[-120:] for line in left.values())}" if left else "", seen


def _wait(case: Case, mark: str, run: subprocess.Popen[Any]) -> str:
    """Wait for the moment; what is wrong if it does not come."""
    until = time.monotonic() + START_S
    while not all(any(part in line for line in _marked(mark).values()) for part in case.seen):
        if time.monotonic() > until or run.poll() is not None:
            return f"the run (exit code {run.poll()}) never had all of {', '.join(case.seen)}"
        time.sleep(0.05)
    time.sleep(case.after_s)
    return "" if run.poll() is None else f"the run ended by itself with code {run.poll()}"


def _marked(mark: str) -> dict[int, str]:
    """Living processes with the mark: PID -> command line."""
    found: dict[int, str] = {}
    wanted = f"{MARK}={mark}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in path.read_bytes().split(b"\0") and lives(int(path.parent.name)):
                line = (path.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(path.parent.name)] = line
        except OSError:  # it has ended meanwhile
            continue
    return found
