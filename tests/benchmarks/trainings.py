"""The peer's trainings, each in a process of its own."""

from __future__ import annotations

import importlib.util
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import Ended, measured, python
from benchmarks.runs import WARM_UP
from benchmarks.world import World

NO_TRL = 'TRL is not installed: pip install -e ".[bench]"'


@dataclass(frozen=True)
class PeerTraining:
    """What the peer recorded."""

    updates: list[dict[str, float]]
    reached: bool
    """Whether it came to the score it ran for."""
    peak_bytes: int
    ended: Ended

    def seconds(self) -> list[float]:
        """Of each update, those of the warm-up left out."""
        clock = [update["seconds"] for update in self.updates]
        return [after - before for before, after in itertools.pairwise(clock)][WARM_UP - 1 :]


def has_trl() -> bool:
    """Whether the peer can run here."""
    return importlib.util.find_spec("trl") is not None


def train_peer(folder: Path, world: World, *, threads: int, **options: Any) -> PeerTraining:
    """Run :mod:`benchmarks.peer_trl`. ``options``: its own, as ``updates=10``."""
    folder.mkdir(parents=True)
    out = folder / "trl.json"
    told = [str(part) for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    command = python("benchmarks.peer_trl", world.root, out, "--threads", threads, *told)
    ended = measured(command, threads=threads, folder=folder)
    found = json.loads(out.read_text())
    return PeerTraining(found["updates"], found["reached"], found["peak_bytes"], ended)
