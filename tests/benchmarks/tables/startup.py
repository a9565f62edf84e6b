"""How long a person waits: for the help, for the first stage, for the first iteration."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from benchmarks.figures import Figure, alternate
from benchmarks.processes import measured
from benchmarks.runs import Training, train
from benchmarks.suite import Effort, Grid, Result
from benchmarks.world import same_work

from rlhf_core.contracts.stage_graph import STAGES

NAME = "start-up"
GOAL = "`rlhf --help` within 0.5 s; the first stage and the first iteration are reported"
IMPORTS = ("torch", "transformers", "pyarrow", "prefect", "mlflow")


def measure(effort: Effort) -> Result:
    """Help, interpreter and imports several times each; runs of one iteration."""
    rlhf = str(Path(sys.executable).with_name("rlhf"))
    commands = {"rlhf --help": [rlhf, "--help"], "python": [sys.executable, "-c", "pass"]}
    commands |= {f"import {module}": [sys.executable, "-c", f"import {module}"] for module in IMPORTS}
    sides = {name: lambda turn, c=command: _seconds(effort, c) for name, command in commands.items()}
    walls = {name: statistics.median(took) for name, took in alternate(sides, effort.size(1, 5)).items()}
    effort.say(f"rlhf --help: {walls['rlhf --help']:.2f} s")
    runs = [_moments(_train(effort, turn)) for turn in range(effort.rounds)]
    moments = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return Result(
        [
            Figure("rlhf --help", walls["rlhf --help"], 0.5, "at most", "s"),
            Figure("rlhf train, to the first stage committed", moments["sample_prompts"], unit="s"),
            Figure("rlhf train, to the first iteration", moments["ppo_update"], unit="s"),
        ],
        [
            Grid("`rlhf train`, seconds since exec", ("until", "s"), [[n, f"{s:.2f}"] for n, s in moments.items()]),
            Grid("a process of its own, wall", ("", "s"), [[n, f"{s:.2f}"] for n, s in walls.items()]),
        ],
        numbers={"walls": walls, "runs": runs},
    )


def _seconds(effort: Effort, command: list[str]) -> float:
    return measured(command, threads=effort.threads, folder=effort.folder / "commands").seconds


def _train(effort: Effort, turn: int) -> Training:
    settings = same_work(effort.world, critic="separate", threads=effort.threads, small=effort.small)
    run = train(effort.folder / f"run-{turn}", settings | {"num_iterations": 1}, threads=effort.threads)
    effort.say(f"round {turn}: a run of one iteration: {run.ended.seconds:.1f} s")
    return run


def _moments(run: Training) -> dict[str, float]:
    """Seconds from exec to each commit, and to the end."""
    began = run.ended.began
    found = {"run.json": (run.run_dir / "run.json").stat().st_mtime - began}
    found |= {stage: run.committed(0, stage) - began for stage in STAGES}
    return found | {"the end": run.ended.seconds}
