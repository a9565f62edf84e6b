"""The folder of a run: its layout, its lock, and where its loop stands.

    RUN/run.json                        the config and the identity of the run
    RUN/iterations/000007/01_….arrow    six artifacts, each with its manifest 01_….json
    RUN/checkpoints/000010/             policy/, critic/, optimizer.safetensors, state.json, manifest.json
    RUN/checkpoints/last_good           link to the newest good one, where a guard has stopped the run
    RUN/lock                            flock: one process at a time

``checkpoints/000010`` is the state *before* iteration 10, that is after ten updates.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from rlhf_core.contracts.artifacts import Manifest, read_manifest
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.durable import make_folder, write_link
from rlhf_core.contracts.errors import IntegrityError, RunLockedError, UserError
from rlhf_core.contracts.guard_config import GuardsConfig
from rlhf_core.contracts.loop_state import LoopState
from rlhf_core.contracts.records import read_record, write_record
from rlhf_core.contracts.schemas import STAGES


@dataclass(frozen=True)
class RunFolder:
    """A run on disk: a reference that every task is given."""

    path: Path
    config: RunConfig
    identity: Mapping[str, Any]

    @classmethod
    def create(cls, path: Path, config: RunConfig, identity: Mapping[str, Any]) -> RunFolder:
        """Start a run in a new or empty folder. Raises UserError if the folder holds anything."""
        check_vacant(path)
        run = cls(path, config, dict(identity))
        with run.locked():
            check_vacant(path)  # of two that begin at once, the second sees the first
            run._write_record()
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run. Raises UserError if the folder holds none, IntegrityError if its record is damaged."""
        record = path / "run.json"
        if not record.is_file():
            raise UserError(f"{path} is not a run folder: it has no run.json")
        values = read_record(record)
        if values.keys() != {"config", "identity"}:
            raise IntegrityError(f"{record} is not the record of a run")
        config = build_config(cast("dict[str, Any]", values["config"]))
        return cls(path, config, cast("dict[str, Any]", values["identity"]))

    def manifest(self, stage: str, iteration: int) -> Manifest | None:
        """The commit record of a stage, or None."""
        return read_manifest(self.path, stage, iteration)

    def manifests(self, iteration: int) -> dict[str, Manifest]:
        """The commit records of an iteration, in flow order."""
        found = {stage: self.manifest(stage, iteration) for stage in STAGES}
        return {stage: manifest for stage, manifest in found.items() if manifest is not None}

    def num_finished(self) -> int:
        """Iterations whose update is committed."""
        folder = self.path / "iterations"
        names = (
            sorted((p.name for p in folder.iterdir() if p.name.isdecimal()), reverse=True) if folder.is_dir() else []
        )
        for name in names:
            if self.manifest("ppo_update", int(name)) is not None:
                return int(name) + 1
        return 0

    def state_before(self, iteration: int) -> LoopState:
        """The loop state that an iteration starts from. Raises IntegrityError if its predecessor is not done."""
        if iteration == 0:
            return LoopState(iteration=0, kl_coef=self.config.kl.coef)
        manifest = self.manifest("ppo_update", iteration - 1)
        if manifest is None:
            raise IntegrityError(f"iteration {iteration - 1} of {self.path} is not committed")
        return LoopState.from_json(manifest.state)

    def checkpoint_path(self, iteration: int) -> Path:
        """Folder of the checkpoint taken before an iteration."""
        return self.path / "checkpoints" / f"{iteration:06d}"

    def checkpoints(self) -> list[int]:
        """Iterations that have a committed checkpoint, ascending."""
        folder = self.path / "checkpoints"
        paths = folder.iterdir() if folder.is_dir() else []
        return sorted(int(p.name) for p in paths if p.name.isdecimal() and (p / "manifest.json").is_file())

    @property
    def last_good(self) -> int | None:
        """The iteration of the checkpoint that is kept under the alias ``last_good``."""
        link = self.path / "checkpoints" / "last_good"
        return int(link.readlink().name) if link.is_symlink() else None

    def keep_as_last_good(self, iteration: int) -> None:
        """Give a committed checkpoint the alias ``last_good``."""
        write_link(self.path / "checkpoints" / "last_good", self.checkpoint_path(iteration).name)

    def with_guards(self, guards: GuardsConfig) -> RunFolder:
        """Record other guards, which decide no number of the run. The caller holds the lock."""
        run = replace(self, config=self.config.model_copy(update={"guards": guards}))
        run._write_record()
        return run

    def _write_record(self) -> None:
        record = {"config": self.config.model_dump(), "identity": dict(self.identity)}
        write_record(self.path / "run.json", record)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process. Raises RunLockedError at once if another one does."""
        make_folder(self.path)
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunLockedError(f"another process is working on {self.path}; wait for it, or stop it") from None
            yield
        finally:
            os.close(descriptor)


def check_vacant(path: Path) -> None:
    """Raise UserError unless a new run may begin in this folder."""
    if (path / "run.json").exists():
        raise UserError(f"--run-dir {path} already holds a run; continue it with `rlhf resume {path}`")
    if path.exists() and (not path.is_dir() or any(p.name != "lock" and p.suffix != ".tmp" for p in path.iterdir())):
        raise UserError(f"--run-dir {path} is not an empty folder; choose a new one")
