"""Bugs that are planted on purpose, each into a forked child: what the battery must notice.

Every one is a mistake that a system of this kind has made, or could make in one careless line. ``plant`` changes our
functions in this process only; the children of a row inherit it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tiny_world import Tiny
from torture import runs
from torture.power import everywhere

from rlhf_core import identity
from rlhf_core.contracts import artifacts, durable, locking, records, run_folder
from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.loop_state import Cursor, LoopState, ScoreMoments
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.models import checkpoints, pattern_cost, untrusted
from rlhf_core.ops import randomness
from rlhf_core.rewards import foreign
from rlhf_core.sweeping import grid
from tasks.lifecycle import start as lifecycle
from tasks.tracking import outbox

disk: Any = durable
"""Its private functions are what most bugs are about."""


def nothing() -> None:
    """No bug, and no other runs than usual."""


@dataclass(frozen=True)
class Mutant:
    """A bug, and the row that must notice it."""

    bug: str
    row: str
    plant: Callable[[], None]
    healthy: Callable[[], None] = nothing
    """What else differs from the usual runs, without the bug."""


def no_fsync_of_files() -> None:
    def write_new(path: Path, data: bytes) -> None:
        descriptor = disk._disk.create(path)
        disk._disk.write(descriptor, memoryview(data))
        disk._disk.close(descriptor)

    real = durable.sync
    everywhere(disk._write_new, write_new)
    everywhere(real, lambda path: real(path) if path.is_dir() else None)


def no_fsync_of_folders() -> None:
    real = durable.sync
    everywhere(real, lambda path: None if path.is_dir() else real(path))


def nothing_settled_on_resume() -> None:
    everywhere(durable.settle, lambda folder, **_: None)


def no_temporary_file() -> None:
    def write_file(path: Path, data: bytes) -> str:
        durable.make_folder(path.parent)
        if path.exists():
            disk._disk.unlink(path)
        disk._write_new(path, data)
        durable.sync(path.parent)
        return hashlib.sha256(data).hexdigest()

    everywhere(durable.write_file, write_file)


def renamed_before_it_is_written() -> None:
    def write_file(path: Path, data: bytes) -> str:
        durable.make_folder(path.parent)
        temporary = disk._temporary_name(path)
        descriptor = disk._disk.create(temporary)
        disk._disk.rename(temporary, path)
        disk._disk.write(descriptor, memoryview(data))
        disk._disk.close(descriptor)
        durable.sync(path)
        durable.sync(path.parent)
        return hashlib.sha256(data).hexdigest()

    everywhere(durable.write_file, write_file)


def manifest_before_its_artifact() -> None:
    """The artifact waits until its manifest is written."""
    write_file, write_record, waiting = artifacts.write_file, artifacts.write_record, dict[Path, bytes]()

    def later(path: Path, data: bytes) -> str:
        waiting[path] = data
        return hashlib.sha256(data).hexdigest()

    def manifest(path: Path, values: Mapping[str, Any]) -> str:
        digest = write_record(path, values)
        artifact = path.with_suffix(".arrow")
        # as the battery's recorder has replaced it in the meantime, if it has
        (durable.write_file if artifacts.write_file is later else write_file)(artifact, waiting.pop(artifact))
        return digest

    changed: Any = artifacts
    changed.write_file, changed.write_record = later, manifest


def old_checkpoint_removed_first() -> None:
    real = lifecycle.save_state

    def save(kept: Any, iteration: int) -> None:
        for old in kept.run.checkpoints():
            durable.remove_folder(kept.run.checkpoint_path(old))
        real(kept, iteration)

    everywhere(real, save)


def _forgotten(**reset: Callable[[RunFolder], Any]) -> None:
    """The first iteration of a process that resumes starts from a state with something forgotten."""
    real, first = RunFolder.state_before, dict[int, int]()

    def state_before(run: RunFolder, iteration: int) -> LoopState:
        state = real(run, iteration)
        if iteration != first.setdefault(os.getpid(), iteration):
            return state
        return dataclasses.replace(state, **{name: value(run) for name, value in reset.items()})

    changed: Any = RunFolder
    changed.state_before = state_before


def beta_forgotten() -> None:
    _forgotten(kl_coef=lambda run: run.config.kl.coef)


def cursor_forgotten() -> None:
    _forgotten(cursor=lambda _: Cursor())


def moments_forgotten() -> None:
    """In runs that normalise scores by them; the row is met for these without the bug."""
    running_scores()
    _forgotten(moments=lambda _: ScoreMoments())


def running_scores() -> None:
    """No bug: scores divided by their running deviation, in every run of the battery."""
    real = runs.battery_config

    def config(tiny: Tiny, changes: Mapping[str, Any] | None = None) -> RunConfig:
        return build_config(real(tiny, changes).model_dump(), ["shaping.score_normalization=running"])

    everywhere(real, config)


def optimizer_forgotten() -> None:
    everywhere(vars(checkpoints)["_restore_optimizer"], lambda trainer, tensors: None)


def one_generator_for_everything() -> None:
    """Draws depend on how many were made before in this process, as torch's own generator does."""
    shared = np.random.Generator(np.random.Philox(key=7))
    everywhere(randomness.seeded_generator, lambda seed, *purpose: shared)


def seed_without_the_iteration() -> None:
    """The dice of a process that resumes begin again as those of iteration 0 did."""
    real, first = randomness.seeded_generator, dict[int, int]()

    def seeded(seed: int, *purpose: str | int) -> np.random.Generator:
        if purpose[0] == "generate":
            start = first.setdefault(os.getpid(), int(purpose[1]))
            purpose = (purpose[0], int(purpose[1]) - start, *purpose[2:])
        return real(seed, *purpose)

    everywhere(randomness.seeded_generator, seeded)


def digests_not_compared() -> None:
    def read_artifact(run_dir: Path, ref: ArtifactRef) -> pa.Table:
        return pa.ipc.open_file(pa.BufferReader((run_dir / ref.path).read_bytes())).read_all()

    everywhere(artifacts.read_artifact, read_artifact)


def seals_not_compared() -> None:
    def unseal(data: bytes, *, origin: str) -> dict[str, Any]:
        values = records.read_json(data, origin=origin)
        values.pop("seal", None)
        return values

    everywhere(records.unseal, unseal)


def identity_not_compared() -> None:
    changed: Any = RunFolder
    changed.manifest = lambda run, stage, iteration: run_folder.read_manifest(run.path, stage, iteration)


def failed_fsync_tried_again() -> None:
    """The second fsync of a file says that all is well, though its pages are lost."""
    real = durable.sync

    def write_new(path: Path, data: bytes) -> None:
        descriptor, rest = disk._disk.create(path), memoryview(data)
        while rest:
            rest = rest[disk._disk.write(descriptor, rest) :]
        try:
            disk._disk.fsync(descriptor)
        except OSError:
            disk._disk.fsync(descriptor)
        disk._disk.close(descriptor)

    def sync(path: Path) -> None:
        try:
            real(path)
        except OSError:
            real(path)

    everywhere(disk._write_new, write_new)
    everywhere(real, sync)


def short_write_taken_for_whole() -> None:
    def write_new(path: Path, data: bytes) -> None:
        descriptor = disk._disk.create(path)
        disk._disk.write(descriptor, memoryview(data))
        disk._disk.fsync(descriptor)
        disk._disk.close(descriptor)

    everywhere(disk._write_new, write_new)


def errors_of_the_disk_untold() -> None:
    @contextlib.contextmanager
    def told(*_: object) -> Iterator[None]:
        yield

    everywhere(disk._told, told)


def lock_not_taken() -> None:
    @contextlib.contextmanager
    def locked(run: RunFolder) -> Iterator[None]:
        durable.make_folder(run.path)
        yield

    changed: Any = RunFolder
    changed.locked = locked


def patterns_not_estimated() -> None:
    everywhere(pattern_cost.searches_long, lambda pattern: False)


def headers_taken_at_their_word() -> None:
    """Names and shapes are read without a look at where the tensors are said to lie."""

    def read_header(file: Path, named: str) -> dict[str, tuple[int, ...]]:
        with file.open("rb") as opened:
            told: dict[str, Any] = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        return {key: tuple(tensor["shape"]) for key, tensor in told.items() if key != "__metadata__"}

    everywhere(untrusted.read_header, read_header)


def headers_of_any_length() -> None:
    everywhere(vars(untrusted)["_check_header_size"], lambda file: None)


def names_compared_by_case() -> None:
    def names(points: Any, seeds: Any) -> dict[tuple[int, int], str]:
        fit = vars(grid)["_fit"]
        heads = ["_".join(f"{key}={fit(grid.value_text(value))}" for key, value in point.items()) for point in points]
        if len(set(heads)) < len(heads):
            heads = [f"point={i:03d}" for i in range(len(points))]
        return {(i, seed): f"{head}_seed={seed}" for i, head in enumerate(heads) for seed in seeds}

    everywhere(vars(grid)["_names"], names)


def functions_not_compared() -> None:
    everywhere(foreign.changed_functions, lambda config, identity, path: [])
    everywhere(identity.identity_drift, lambda *arguments, **named: [])


def fence_not_looked_at() -> None:
    everywhere(locking.fenced, lambda folder, check: contextlib.nullcontext())


def metrics_sent_twice() -> None:
    """What has arrived is neither written down nor asked for: a resume sends it again."""
    from tasks.tracking import tracker as tracking

    real = outbox.Ledger.change
    forgetful: Any = tracking
    forgetful._Sender._num_arrived = lambda delivery: delivery.ledger.sent

    def change(ledger: Any, run_dir: Path, **changes: Any) -> Any:
        real(ledger, run_dir, **(changes | {"sent": 0, "sending": None}))
        return dataclasses.replace(ledger, **changes)

    changed: Any = outbox.Ledger
    changed.change = change


POWER, FAULTS, KILLS, ROT, AROUND = "power_loss", "disk_faults", "kill_every_operation", "bit_rot", "surroundings"
MUTANTS = (
    Mutant("no fsync of a file", POWER, no_fsync_of_files),
    Mutant("no fsync of a folder", POWER, no_fsync_of_folders),
    Mutant("no temporary file", POWER, no_temporary_file),
    Mutant("renamed before it is written", POWER, renamed_before_it_is_written),
    Mutant("manifest before its artifact", POWER, manifest_before_its_artifact),
    Mutant("the old checkpoint is removed first", POWER, old_checkpoint_removed_first),
    Mutant("what a killed process left is not made durable", POWER, nothing_settled_on_resume),
    Mutant("β is forgotten on resume", KILLS, beta_forgotten),
    Mutant("the prompt cursor is forgotten on resume", KILLS, cursor_forgotten),
    Mutant("the score moments are forgotten on resume", KILLS, moments_forgotten, healthy=running_scores),
    Mutant("the optimizer is forgotten on resume", KILLS, optimizer_forgotten),
    Mutant("one generator for everything", KILLS, one_generator_for_everything),
    Mutant("dice that begin again on resume", KILLS, seed_without_the_iteration),
    Mutant("digests of artifacts are not compared", ROT, digests_not_compared),
    Mutant("seals of records are not compared", ROT, seals_not_compared),
    Mutant("manifests of another run are taken", ROT, identity_not_compared),
    Mutant("a failed fsync is tried again", FAULTS, failed_fsync_tried_again),
    Mutant("a short write is taken for whole", FAULTS, short_write_taken_for_whole),
    Mutant("errors of the disk are not told", FAULTS, errors_of_the_disk_untold),
    Mutant("the lock is not taken", "races", lock_not_taken),
    Mutant("the name beside the lock is not looked at", AROUND, fence_not_looked_at),
    Mutant("what a tokenizer's pattern may cost is not estimated", AROUND, patterns_not_estimated),
    Mutant("headers of weights are taken at their word", AROUND, headers_taken_at_their_word),
    Mutant("headers of weights may have any length", AROUND, headers_of_any_length),
    Mutant("names of a sweep are compared by case", AROUND, names_compared_by_case),
    Mutant("a reward function's file is not compared on resume", AROUND, functions_not_compared),
    Mutant("what was sent to the tracker is neither written down nor asked for", "mlflow_outages", metrics_sent_twice),
)
