"""The folder of a sweep: what it is, its runs, and where each of them stands.

    FOLDER/sweep.json               what it is: config, grid, seeds, threads of a run; sealed, written first
    FOLDER/configs/NAME.yaml        config of each run
    FOLDER/NAME/                    a run folder like any other, as kl.coef=0.05_seed=1
    FOLDER/logs/NAME.log            what its process has printed
    FOLDER/summary.json, sweep.png  what the runs say together, and the picture
    FOLDER/best.yaml                config of the best point, where there is one
    FOLDER/mlflow.json, prefect.json  which runs of MLflow and Prefect it is; mlflow.db beside them by default
    FOLDER/lock                     flock: one process at a time

Nothing is kept here about how far a run is: its own folder says so.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config, config_digest, config_template, flat_params
from rlhf_core.contracts.durable import make_folder, remove_file, write_file
from rlhf_core.contracts.errors import IntegrityError, RlhfError, RunLockedError, UserError
from rlhf_core.contracts.locking import holding, is_lock
from rlhf_core.contracts.places import with_places
from rlhf_core.contracts.records import read_json, read_record, write_record
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.trust import recorded
from rlhf_core.contracts.typed import typed
from rlhf_core.inspection import standing
from rlhf_core.sweeping.grid import Grid, SweepRun, plan_runs, value_text

RECORD: Final = "sweep.json"
ANY_NUMBER: Final = 1 << 60


@dataclass(frozen=True)
class Axis:
    """One key of the grid with its values."""

    key: str
    values: Sequence[Any]


@dataclass(frozen=True)
class SweepRecord:
    """What sweep.json says: all that decides the numbers of its runs."""

    config: Mapping[str, Any]
    axes: Sequence[Axis]
    """The grid, in the order in which it was given."""
    seeds: Sequence[int]
    num_threads: int
    """CPU threads of each run: a part of its identity, so that another ``--jobs`` changes no number."""
    unpinned: Mapping[str, str | None] = field(default_factory=dict[str, "str | None"])
    """Field of the config -> its value as the user has it, before it was held at a commit or a date."""

    @classmethod
    def of(
        cls,
        config: RunConfig,
        grid: Grid,
        seeds: Sequence[int],
        num_threads: int,
        unpinned: Mapping[str, str | None] | None = None,
    ) -> SweepRecord:
        """The record of what a user asks."""
        axes = [Axis(key, list(values)) for key, values in grid.items()]
        return cls(config.model_dump(), axes, list(seeds), num_threads, dict(unpinned or {}))

    @property
    def asked_config(self) -> RunConfig:
        """The config as the user has it: hub ids without the commits that the sweep keeps."""
        return with_places(build_config(dict(self.config)), self.unpinned)

    @property
    def grid(self) -> dict[str, Sequence[Any]]:
        """Key -> values."""
        return {axis.key: axis.values for axis in self.axes}


@dataclass(frozen=True)
class Standing:
    """Where a run of a sweep stands, by its files alone.

    Example: ``Standing(12, 40, 1.93, 3.4, is_running=True)``
    """

    finished: int = 0
    """Iterations."""
    of: int = 0
    score: float | None = None
    """Mean score of the newest finished iteration."""
    kl: float | None = None
    is_begun: bool = False
    is_running: bool = False
    is_finished: bool = False
    stopped_by: str | None = None
    """The guards that have stopped it."""
    problem: str | None = None
    """Why its folder cannot be read."""


@dataclass(frozen=True)
class SweepFolder:
    """A sweep on disk: a reference that every task is given."""

    path: Path
    config: RunConfig
    grid: Grid
    seeds: tuple[int, ...]
    runs: tuple[SweepRun, ...]

    @classmethod
    def create(cls, path: Path, record: SweepRecord) -> SweepFolder:
        """Begin, or find again, the sweep of a record. Raises UserError if the folder holds anything else."""
        check_folder(path, record)
        make_folder(path)
        if not (path / RECORD).is_file():
            write_record(path / RECORD, asdict(record))
        there = cls.open(path)
        for run in there.runs:
            template = config_template(run.config).encode()
            if not there.config_path(run).is_file() or there.config_path(run).read_bytes() != template:
                write_file(there.config_path(run), template)
        return there

    @classmethod
    def open(cls, path: Path) -> SweepFolder:
        """A sweep that was begun. Raises UserError if the folder holds none, IntegrityError if it is damaged."""
        record = read_sweep(path)
        if record is None:
            raise UserError(f"{path} is not a sweep: it has no {RECORD}")
        runs = runs_of(record)
        for run in runs:
            recorded(run.config, path)
        return cls(path, build_config(dict(record.config)), record.grid, tuple(record.seeds), tuple(runs))

    @property
    def points(self) -> list[Mapping[str, Any]]:
        """The combinations of the grid, in order."""
        return [run.values for run in self.runs if run.seed == self.seeds[0]]

    def run_path(self, run: SweepRun) -> Path:
        """The folder of a run, which may not be there yet."""
        return self.path / run.name

    def config_path(self, run: SweepRun) -> Path:
        """The config that a run is started with."""
        return self.path / "configs" / f"{run.name}.yaml"

    def log_path(self, run: SweepRun) -> Path:
        """What the process of a run has printed."""
        return self.path / "logs" / f"{run.name}.log"

    def standing(self, run: SweepRun) -> Standing:
        """Where a run stands; reads its newest iteration alone."""
        of = run.config.num_iterations
        if not (self.run_path(run) / "run.json").is_file():
            return Standing(of=of)
        try:
            folder = RunFolder.open(self.run_path(run))
            finished, said = folder.num_finished(), standing(folder)
            newest = folder.manifests(finished - 1) if finished else {}
            guards = folder.path / "guards.json"
            metrics = {k: v for manifest in newest.values() for k, v in manifest.metrics.items()}
            return Standing(
                finished,
                of,
                metrics.get("objective/scores"),
                metrics.get("objective/kl"),
                is_begun=True,
                is_running=folder.is_locked(),
                is_finished=said == "finished" or finished >= of < folder.config.num_iterations,  # it was extended
                stopped_by=read_record(guards).get("stopped") if guards.is_file() else None,
            )
        except (RlhfError, FileNotFoundError) as error:
            return Standing(of=of, is_begun=True, problem=str(error).splitlines()[0])

    def check_runs(self) -> None:
        """Raise UserError if a run folder in it was begun with another config, RunLockedError if one is in use."""
        for run in self.runs:
            if not (self.run_path(run) / "run.json").is_file():
                continue
            try:
                there = RunFolder.open(self.run_path(run))
            except IntegrityError:  # resuming that run tells about it
                continue
            begun_with = {"num_iterations": there.num_iterations_begun_with}
            configs = (config.model_copy(update=begun_with) for config in (there.config, there.asked_config))
            if config_digest(run.config) not in map(config_digest, configs):
                raise UserError(f"{there.path} is a run of another config than the sweep's; move it away")
            if there.is_locked():
                raise RunLockedError(f"another process is working on {there.path}; wait for it, or stop it")

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Hold the sweep for this process. Raises RunLockedError at once if another one holds it."""
        return holding(self.path / "lock", f"the sweep {self.path}")

    def write_results(self, summary: Mapping[str, Any], picture: bytes | None, best: RunConfig | None) -> None:
        """Write what a person reads; the summary last. What is of an earlier result, and is no more, is removed."""
        for name, data in (
            ("sweep.png", picture),
            ("best.yaml", None if best is None else config_template(best).encode()),
        ):
            if data is not None:
                write_file(self.path / name, data)
            elif (self.path / name).is_file():
                remove_file(self.path / name)
        text = json.dumps(summary, indent=2, allow_nan=False, ensure_ascii=False)
        write_file(self.path / "summary.json", text.encode() + b"\n")

    def summary(self) -> dict[str, Any]:
        """The results. Raises UserError while they are not written."""
        path = self.path / "summary.json"
        if not path.is_file():
            raise UserError(f"{self.path} has no results yet: it has no summary.json")
        return read_json(path.read_bytes(), origin=str(path))


def read_sweep(path: Path) -> SweepRecord | None:
    """The record of a folder's sweep; None if it has none. Raises IntegrityError if it is damaged."""
    if not (path / RECORD).is_file():
        return None
    try:
        return typed(SweepRecord, read_record(path / RECORD))
    except ValueError as error:
        raise IntegrityError(f"{path / RECORD} is not the record of a sweep: {error}") from None


def runs_of(record: SweepRecord, *, max_runs: int = ANY_NUMBER) -> list[SweepRun]:
    """The runs of a record. Raises UserError with every mistake of every combination."""
    config = build_config(dict(record.config))
    threads = {} if "num_threads" in record.grid else {"num_threads": record.num_threads}
    return plan_runs(config.model_copy(update=threads), record.grid, record.seeds, max_runs=max_runs)


def check_folder(path: Path, record: SweepRecord) -> None:
    """Raise UserError unless the sweep of a record may begin, or go on, in a folder."""
    there = read_sweep(path)
    if there is not None:
        if differences := _differences(there, record):
            raise UserError(
                f"--run-dir {path} holds another sweep ({'; '.join(differences)}); choose another folder, or give "
                "what it was begun with to go on"
            )
        return
    if path.exists() and (not path.is_dir() or any(not is_lock(p) and p.suffix != ".tmp" for p in path.iterdir())):
        raise UserError(f"--run-dir {path} is neither an empty folder nor a sweep; choose a new one")


def _differences(there: SweepRecord, asked: SweepRecord) -> list[str]:
    """How two sweeps differ, a few words each."""
    told: list[str] = []
    for key in sorted(there.grid.keys() | asked.grid.keys()):
        before, now = (_values(record.grid.get(key)) for record in (there, asked))
        if before != now:
            told.append(f"{key} is {before} there, and {now} now")
    if list(there.seeds) != list(asked.seeds):
        told.append(f"seeds are {_values(there.seeds)} there, and {_values(asked.seeds)} now")
    if there.num_threads != asked.num_threads:
        told.append(f"a run has {there.num_threads} threads there, and {asked.num_threads} now")
    before, now = (flat_params(record.asked_config) for record in (there, asked))
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    told += [f"{key} is {value_text(before.get(key))} there, and {value_text(now.get(key))} now" for key in keys[:3]]
    return told + ([f"and {len(keys) - 3} more keys"] if len(keys) > 3 else [])


def _values(values: Sequence[Any] | None) -> str:
    return "not swept" if values is None else ", ".join(value_text(value) for value in cast("list[Any]", values))
