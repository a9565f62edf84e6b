"""The folder of a run: its layout, its lock, and where its loop stands.

    RUN/run.json                        the config and the identity of the run, each drift that was accepted and each
                                        extension to another number of iterations; the config has the commits of hub
                                        ids, ``unpinned`` the names without them
    RUN/iterations/000007/01_….arrow    six artifacts, each with its manifest 01_….json
    RUN/archive/000000-000099/          old iterations, one file a stage: artifacts.keep_iterations
    RUN/checkpoints/000010/             policy/, critic/, optimizer.safetensors, state.json, manifest.json
    RUN/checkpoints/last_good           link to the newest good one, where a guard has stopped the run
    RUN/lock                            flock: one process at a time

``checkpoints/000010`` is the state *before* iteration 10, that is after ten updates.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

from rlhf_core.contracts.archive import newest_archived
from rlhf_core.contracts.artifacts import Manifest, read_manifest
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config, digest_json
from rlhf_core.contracts.durable import make_folder, settle, write_link
from rlhf_core.contracts.errors import IntegrityError, UserError
from rlhf_core.contracts.guard_config import GuardsConfig
from rlhf_core.contracts.locking import holding, is_held, is_lock
from rlhf_core.contracts.loop_state import LoopState
from rlhf_core.contracts.places import with_places
from rlhf_core.contracts.records import read_record, write_record
from rlhf_core.contracts.run_places import why_no_run
from rlhf_core.contracts.stage_graph import STAGES
from rlhf_core.contracts.trust import accept_config, recorded
from rlhf_core.contracts.typed import typed
from rlhf_core.contracts.update_config import UpdateConfig

RECORD_REMEDY = "put run.json back from a copy; where the run was tracked, MLflow has its config.yaml and identity.json"


@dataclass(frozen=True)
class Drift:
    """Other conditions, accepted by a person: from an iteration on the run has another identity."""

    iteration: int
    """The first one under the new conditions."""
    before: Mapping[str, Any]
    """The identity until then."""
    changes: Sequence[str]
    """One line for each entry of the identity that differs."""
    weights: str
    """Digest of the weights that ``iteration`` starts from, as the new conditions give them; "" if not known yet."""


@dataclass(frozen=True)
class Extension:
    """Another number of iterations, given to a run that was finished or stopped.

    Example: ``Extension(40, before=40, after=200, date="2026-11-03", identity={...})``
    """

    iteration: int
    """The first one under the new number."""
    before: int
    """``num_iterations`` until then."""
    after: int
    date: str
    """The day on which it was given, as 2026-11-03."""
    identity: Mapping[str, Any]
    """The identity until then: the number of iterations decides the learning rate, so that it is part of it."""
    num_drifts: int = 0
    """Drifts that were accepted before it."""


@dataclass(frozen=True)
class _More:
    drifts: tuple[Drift, ...]
    extensions: tuple[Extension, ...]
    unpinned: Mapping[str, str | None]


@dataclass(frozen=True)
class RunFolder:
    """A run on disk: a reference that every task is given."""

    path: Path
    config: RunConfig
    identity: Mapping[str, Any]
    """In force now."""
    drifts: tuple[Drift, ...] = ()
    """In the order in which they were accepted."""
    extensions: tuple[Extension, ...] = ()
    """In the order in which they were given."""
    unpinned: Mapping[str, str | None] = field(default_factory=dict[str, "str | None"])
    """Field of the config -> its value as the user has it, before it was held at a commit or a date."""

    @classmethod
    def create(
        cls,
        path: Path,
        config: RunConfig,
        identity: Mapping[str, Any],
        unpinned: Mapping[str, str | None] | None = None,
    ) -> RunFolder:
        """Start a run of the person's own config in a new or empty folder.

        Raises: UserError if the folder holds anything.
        """
        check_vacant(path)
        accept_config(config)
        run = cls(path, config, dict(identity), unpinned=dict(unpinned or {}))
        with run.locked():
            check_vacant(path)  # of two that begin at once, the second sees the first
            run._write_record()
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run. Raises UserError if the folder holds none, IntegrityError if its record is damaged."""
        record = path / "run.json"
        if not record.is_file():
            raise UserError(why_no_run(path))
        try:
            values = read_record(record)
        except IntegrityError as error:
            raise IntegrityError(f"{error}; {RECORD_REMEDY}") from None
        return cls.of_record(path, values)

    @classmethod
    def of_record(cls, path: Path, values: Mapping[str, Any]) -> RunFolder:
        """A run from the content of its ``run.json``. Raises IntegrityError if that is damaged."""
        record = path / "run.json"
        optional = {field.name for field in fields(_More)}
        if values.keys() - optional != {"config", "identity"}:
            raise IntegrityError(f"{record} is not the record of a run; {RECORD_REMEDY}")
        try:
            empty: dict[str, Any] = {"drifts": [], "extensions": [], "unpinned": {}}
            more = typed(_More, {name: values.get(name, nothing) for name, nothing in empty.items()})
            if not isinstance(values["config"], dict) or not isinstance(values["identity"], dict):
                raise ValueError("config or identity is no object")
        except ValueError as error:
            raise IntegrityError(f"{record} is not the record of a run: {error}; {RECORD_REMEDY}") from None
        config = build_config(cast("dict[str, Any]", values["config"]))
        recorded(config, path)
        identity = cast("dict[str, Any]", values["identity"])
        return cls(path, config, identity, more.drifts, more.extensions, more.unpinned)

    @property
    def asked_config(self) -> RunConfig:
        """The config as the user has it: hub ids without the commits that the run keeps."""
        return with_places(self.config, self.unpinned)

    def identity_at(self, iteration: int) -> Mapping[str, Any]:
        """The identity that an iteration was, or will be, computed under."""
        return next((identity for until, identity in self._history if until > iteration), self.identity)

    def identity_digest_at(self, iteration: int) -> str:
        """sha256 of the identity that an iteration was, or will be, computed under."""
        return digest_json(dict(self.identity_at(iteration)))

    def num_iterations_at(self, iteration: int) -> int:
        """``num_iterations`` as it was when an iteration was computed."""
        return next((each.before for each in self.extensions if each.iteration > iteration), self.config.num_iterations)

    @property
    def num_iterations_begun_with(self) -> int:
        """``num_iterations`` of the config that the run was started with."""
        return self.extensions[0].before if self.extensions else self.config.num_iterations

    def config_at(self, iteration: int) -> RunConfig:
        """The config that an iteration was, or will be, computed with."""
        return self.config.model_copy(update={"num_iterations": self.num_iterations_at(iteration)})

    @functools.cached_property
    def identities(self) -> frozenset[str]:
        """Digests of every identity that the run has had."""
        had = [identity for _, identity in self._history]
        return frozenset(digest_json(dict(identity)) for identity in (*had, self.identity))

    @functools.cached_property
    def _history(self) -> list[tuple[int, Mapping[str, Any]]]:
        """(iteration, identity until then) of every drift and extension, in the order in which they were recorded."""
        found: list[tuple[int, Mapping[str, Any]]] = []
        for number in range(len(self.drifts) + 1):
            found += [(each.iteration, each.identity) for each in self.extensions if each.num_drifts == number]
            found += [(drift.iteration, drift.before) for drift in self.drifts[number : number + 1]]
        return found

    def drift_at(self, iteration: int) -> Drift | None:
        """The newest drift that was accepted before an iteration, if one was accepted just there."""
        return next((drift for drift in reversed(self.drifts) if drift.iteration == iteration), None)

    def drift_after(self, iteration: int) -> Drift | None:
        """The first drift that was accepted after an iteration, which cannot be computed again since."""
        return next((drift for drift in self.drifts if drift.iteration > iteration), None)

    def updates_behind(self, iteration: int) -> int:
        """How many updates older the policy is that answers an iteration's prompts: one where stages overlap.

        None where there is no older one: at the beginning, and where a drift has begun.
        """
        return int(self.config.execution.overlap and iteration > 0 and self.drift_at(iteration) is None)

    def manifest(self, stage: str, iteration: int) -> Manifest | None:
        """The commit record of a stage, or None. Raises IntegrityError if it is damaged, or of another run."""
        manifest = read_manifest(self.path, stage, iteration)
        if manifest is not None and manifest.identity not in self.identities:
            raise IntegrityError(
                f"{self.path / manifest.artifact.path}, or run.json, is of another run: their identities differ; "
                f"`rlhf verify {self.path}` tells which"
            )
        return manifest

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
        archived = newest_archived(self.path)
        return 0 if archived is None else archived + 1

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
        named = [p for p in paths if p.name.isdecimal() and p.name == self.checkpoint_path(int(p.name)).name]
        return sorted(int(p.name) for p in named if (p / "manifest.json").is_file())

    @property
    def last_good(self) -> int | None:
        """The iteration of the checkpoint that is kept under the alias ``last_good``."""
        link = self.path / "checkpoints" / "last_good"
        if not link.is_symlink():
            return None
        name = link.readlink().name
        if not (name.isascii() and name.isdecimal() and len(name) < 12):
            raise IntegrityError(f"{link} leads to {name}, which is no checkpoint; remove that link")
        return int(name)

    def keep_as_last_good(self, iteration: int) -> None:
        """Give a committed checkpoint the alias ``last_good``."""
        write_link(self.path / "checkpoints" / "last_good", self.checkpoint_path(iteration).name)

    def with_guards(self, guards: GuardsConfig) -> RunFolder:
        """Record other guards, which decide no number of the run. The caller holds the lock."""
        run = replace(self, config=self.config.model_copy(update={"guards": guards}))
        run._write_record()
        return run

    def with_update(self, update: UpdateConfig, *, write: bool) -> RunFolder:
        """The run with other processes for its update; their layout is a drift. ``write`` as in :meth:`with_drift`."""
        execution = self.config.execution.model_copy(update={"update": update})
        run = replace(self, config=self.config.model_copy(update={"execution": execution}))
        if write:
            run._write_record()
        return run

    def with_interpreter(self, python: str, *, write: bool) -> RunFolder:
        """The run with another environment that has vLLM; the caller holds the lock if it is to be written."""
        vllm = self.config.generation.vllm.model_copy(update={"python": python})
        generation = self.config.generation.model_copy(update={"vllm": vllm})
        run = replace(self, config=self.config.model_copy(update={"generation": generation}))
        if write:
            run._write_record()
        return run

    def with_drift(self, identity: Mapping[str, Any], drift: Drift, *, write: bool) -> RunFolder:
        """The run under another identity.

        Args:
            identity: from ``drift.iteration`` on.
            drift: since when, and what has changed.
            write: record it on disk; the caller then holds the lock.
        """
        run = replace(self, identity=dict(identity), drifts=(*self.drifts, drift))
        if write:
            run._write_record()
        return run

    def with_extension(self, config: RunConfig, identity: Mapping[str, Any], extension: Extension) -> RunFolder:
        """Record another number of iterations. The caller holds the lock.

        Args:
            config: with the new number.
            identity: from ``extension.iteration`` on.
            extension: since when, and what was before.
        """
        run = replace(self, config=config, identity=dict(identity), extensions=(*self.extensions, extension))
        run._write_record()
        return run

    def record(self) -> dict[str, Any]:
        """The content of ``run.json``."""
        record: dict[str, Any] = {"config": self.config.model_dump(), "identity": dict(self.identity)}
        if self.drifts:
            record["drifts"] = [asdict(drift) for drift in self.drifts]
        if self.extensions:
            record["extensions"] = [asdict(extension) for extension in self.extensions]
        if self.unpinned:
            record["unpinned"] = dict(self.unpinned)
        return record

    def _write_record(self) -> None:
        write_record(self.path / "run.json", self.record())

    def is_locked(self) -> bool:
        """Whether a process is working on the run."""
        return is_held(self.path / "lock")

    @contextlib.contextmanager
    def locked(self, *, settled: bool = True) -> Iterator[None]:
        """Hold the run for this process.

        Args:
            settled: what another process wrote is made durable first, and links are refused.
        Raises: RunLockedError at once if another process holds it.
        """
        make_folder(self.path)
        with holding(self.path / "lock", str(self.path)):
            if settled:
                settle(self.path, links=("checkpoints/last_good",))
            yield


def check_vacant(path: Path) -> None:
    """Raise UserError unless a new run may begin in this folder."""
    if (path / "run.json").exists():
        raise UserError(f"--run-dir {path} already holds a run; continue it with `rlhf resume {path}`")
    if path.exists() and (not path.is_dir() or any(not is_lock(p) and p.suffix != ".tmp" for p in path.iterdir())):
        raise UserError(f"--run-dir {path} is not an empty folder; choose a new one")
