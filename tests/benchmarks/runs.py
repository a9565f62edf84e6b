"""Runs of `rlhf train` in a process of their own, read afterwards from what they wrote."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import Ended, measured, python

from rlhf_core.contracts.stage_graph import FILE_STEMS

WARM_UP = 2
"""First iterations that no median counts."""


@dataclass(frozen=True)
class Training:
    """A finished run."""

    run_dir: Path
    ended: Ended

    def committed(self, iteration: int, stage: str) -> float:
        """Clock time at which a stage was committed: its manifest's."""
        return self._manifest(iteration, stage).stat().st_mtime_ns / 1e9

    def manifest(self, iteration: int, stage: str) -> dict[str, Any]:
        """The commit record of a stage."""
        return json.loads(self._manifest(iteration, stage).read_text())

    @property
    def num_iterations(self) -> int:
        """Iterations whose update is committed."""
        return len(list(self.run_dir.glob(f"iterations/*/{FILE_STEMS['ppo_update']}.json")))

    @property
    def began(self) -> float:
        """Clock time at which its first iteration began."""
        first = self.manifest(0, "sample_prompts")
        return self.committed(0, "sample_prompts") - float(first["timing"]["total_s"])

    def seconds(self, warm_up: int = WARM_UP) -> list[float]:
        """Of each iteration, from update to update, those of the warm-up left out."""
        ends = [self.committed(i, "ppo_update") for i in range(self.num_iterations)]
        return [after - before for before, after in itertools.pairwise(ends)][max(warm_up, 1) - 1 :]

    def _manifest(self, iteration: int, stage: str) -> Path:
        return self.run_dir / "iterations" / f"{iteration:06d}" / f"{FILE_STEMS[stage]}.json"


def overrides(settings: Mapping[str, object]) -> list[str]:
    """As options of the command line."""
    return [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]


def train(folder: Path, settings: Mapping[str, object], *, threads: int, config: Path | None = None) -> Training:
    """`rlhf train`: Prefect on a temporary server, Arrow files, MLflow in an sqlite file beside the run.

    Args:
        folder: new; of this run alone.
        settings: overrides, by dotted name.
        threads: CPU threads.
        config: the file they override; default: one with a reward model and nothing else.
    """
    command = [str(Path(sys.executable).with_name("rlhf")), "train", "--config", str(config or _bare_config(folder))]
    command += [*overrides(settings), "--run-dir", str(folder / "run")]
    return Training(folder / "run", measured(command, threads=threads, folder=folder))


def train_bare(folder: Path, settings: Mapping[str, object], *, threads: int) -> Training:
    """The same stages and files in a bare loop: :mod:`benchmarks.bare_loop`."""
    options = ["--config", _bare_config(folder), *overrides(settings), "--run-dir", folder / "run"]
    ended = measured(python("benchmarks.bare_loop", *options), threads=threads, folder=folder)
    return Training(folder / "run", ended)


def _bare_config(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("reward: {components: [{kind: model}]}\n")
    return folder / "config.yaml"
