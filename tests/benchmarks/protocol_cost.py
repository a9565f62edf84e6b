"""What durability costs: the same iterations with the protocol, its checks and the outbox, and without.

    python -m benchmarks.protocol_cost --config deployments/configs/reviews.yaml --set policy.model=… [--json FILE]

Two runs of one config go forward in turns, a block of iterations each, in one process. *On* is what `rlhf train` does
to its files. *Off* writes the same files and nothing more: no fsync, no digest of files or weights, no check of what
is read, of values or of finiteness, no seal, no tracker. Prefect is in neither (its own cost is another benchmark).
A block ends when MLflow has everything; medians over blocks, wall and CPU seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from flows.calling import call, without_prefect
from flows.commands.options import prepare_environment
from flows.ppo import train_iteration
from rlhf_core.contracts import artifacts, durable, records
from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.config_io import load_config
from rlhf_core.contracts.durable import Disk, using_disk
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.models.checkpoints import Trainer
from tasks import stage
from tasks.lifecycle.guards import Guards
from tasks.lifecycle.start import save_due_checkpoint, start_run
from tasks.session import session
from tasks.tracking.tracker import Tracker

GOAL = 0.03


class Careless(Disk):
    """Leaves it to the operating system when anything becomes durable."""

    def fsync(self, descriptor: int) -> None:
        """Nothing."""


class NoDigest:
    """A sha256 that does not look at the bytes."""

    def __init__(self, _data: bytes = b"") -> None: ...

    def update(self, data: Any) -> None:
        """Nothing."""

    def hexdigest(self) -> str:
        """Always the same."""
        return "0" * 64


def plain_read(run_dir: Path, ref: ArtifactRef) -> pa.Table:
    """Open an artifact as anyone would."""
    return pa.ipc.open_file((run_dir / ref.path).read_bytes()).read_all()


@contextlib.contextmanager
def protocol_off() -> Iterator[None]:
    """Files are written, and that is all."""
    careless: Any = SimpleNamespace(sha256=NoDigest, file_digest=lambda _file, _kind: NoDigest())
    with contextlib.ExitStack() as stack:
        stack.enter_context(using_disk(Careless()))
        for module in (durable, artifacts, records):
            if hasattr(module, "hashlib"):
                stack.enter_context(patch.object(module, "hashlib", careless))
        for module in (session, stage):
            stack.enter_context(patch.object(module, "read_artifact", plain_read))
        stack.enter_context(patch.object(Trainer, "digest", lambda _self: "0" * 64))
        stack.enter_context(patch.object(Trainer, "check_finite", lambda _self: None))
        stack.enter_context(patch.object(artifacts, "_refuse_nulls", lambda _array, _name: None))
        stack.enter_context(patch.object(artifacts, "wrong_values", lambda _table, _stage: None))
        yield


class Side:
    """One of the two runs."""

    def __init__(self, name: str, run_dir: Path) -> None:
        self.name, self.run_dir = name, str(run_dir)
        self.done = 0
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def block(self, num_iterations: int, tracker: Tracker | None) -> None:
        """Some iterations, until the tracker has them; and the seconds of one of them."""
        run = RunFolder.open(Path(self.run_dir))
        guards = Guards(run)
        started = time.perf_counter(), time.process_time()
        for iteration in range(self.done, self.done + num_iterations):
            call(save_due_checkpoint, self.run_dir, iteration)
            train_iteration(self.run_dir, iteration)
            if tracker:
                guards.check(iteration)
                tracker.iteration_done(iteration)
        self.done += num_iterations
        while tracker and (tracker._outbox._num_arrived()) < self.done:  # the ledger says so only with the next batch
            time.sleep(0.002)
        self.wall.append((time.perf_counter() - started[0]) / num_iterations)
        self.cpu.append((time.process_time() - started[1]) / num_iterations)


def main() -> int:
    """Run both in turns; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--block", type=int, default=5, help="iterations of a block")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk that shall be measured")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    prepare_environment()
    total = (given.blocks + 1) * given.block
    length = f"num_iterations={total}"
    on = load_config(given.config, [*given.overrides, length])
    off = load_config(given.config, [*given.overrides, length, "tracking.enabled=false"])
    with tempfile.TemporaryDirectory(dir=given.folder) as folder, without_prefect():
        sides = Side("on", Path(folder) / "on"), Side("off", Path(folder) / "off")
        start_run(on, sides[0].run_dir)
        with protocol_off():
            start_run(off, sides[1].run_dir)
        with Tracker(RunFolder.open(Path(folder) / "on"), {}) as tracker:
            take_turns(sides, tracker, given.blocks, given.block)
    return report(sides, given.json)


def take_turns(sides: tuple[Side, Side], tracker: Tracker, blocks: int, block: int) -> None:
    """Let both go forward in turns; who begins changes each time."""
    for turn in range(blocks + 1):
        for side in reversed(sides) if turn % 2 else sides:  # the tracker is idle while the other side goes on
            with protocol_off() if side.name == "off" else contextlib.nullcontext():
                side.block(block, tracker if side.name == "on" else None)
        print(f"block {turn}: " + ", ".join(f"{s.name} {s.wall[-1]:.3f} s" for s in sides), file=sys.stderr)


def report(sides: tuple[Side, Side], path: Path | None) -> int:
    """Print medians, the first block left out: it loads and warms up."""
    on, off = sides
    found: dict[str, Any] = {"goal": GOAL}
    table = Table("seconds an iteration", "on", "off", "cost", title=f"durability; goal: at most {GOAL:.0%}")
    for clock in ("wall", "cpu"):
        pairs = list(zip(getattr(on, clock)[1:], getattr(off, clock)[1:], strict=True))
        medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
        cost = statistics.median(a / b - 1 for a, b in pairs)
        found[clock] = {"on": medians[0], "off": medians[1], "cost": cost, "blocks": pairs}
        table.add_row(clock, f"{medians[0]:.3f}", f"{medians[1]:.3f}", f"{cost:+.1%}")
    Console().print(table)
    if path is not None:
        path.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
