"""Removing runs, or parts of them: planned for a person to read, then done one by one, each under its run's lock.

Never removed: what a process works on, what lies behind a link, what an alias of MLflow's registry names, and what
another run of the folder reads its models from. A run goes by one rename, so that nobody meets half of it; parts are
recorded in the run (:mod:`rlhf_core.contracts.cleaned`) before they go, so that nobody takes them for damage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from rlhf_core.cleaning import (
    Part,
    Wanted,
    chosen,
    cleaned_after,
    needed_by_others,
    removable_artifacts,
    removable_checkpoints,
)
from rlhf_core.contracts.cleaned import Cleaned
from rlhf_core.contracts.durable import REMOVED, remove_file, remove_folder, remove_leftovers
from rlhf_core.contracts.errors import RlhfError, RunLockedError
from rlhf_core.contracts.locking import holding, is_held
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.run_list import ListedRun, list_runs, measured
from tasks.lifecycle.retention import best_checkpoint
from tasks.tracking.outbox import Ledger, reason
from tasks.tracking.store import tracking_uri
from tasks.tracking.tracker import connect

WHOLE = -1
"""Stands for a run as a whole, where a registered version does not say which checkpoint it is."""
GROUPS = ("sweep", "chain")
"""Whoever works on the runs of a folder holds a lock beside them."""
Aliases = Mapping[int, Sequence[str]]
"""Iteration of a checkpoint -> aliases of MLflow's registry that name it, as rlhf-policy@best."""


@dataclass(frozen=True)
class Removal:
    """A run, or a part of one, that would be removed."""

    run: ListedRun
    part: Part
    num_bytes: int
    checkpoints: Sequence[int] = ()
    artifacts: range = range(0)
    """Iterations."""
    files: Sequence[Path] = ()

    @property
    def sentence(self) -> str:
        """What it is, in a few words."""
        if self.part == "checkpoints":
            return f"checkpoints {', '.join(map(str, self.checkpoints))}"
        if self.part == "artifacts":
            return f"artifacts of iterations {self.artifacts.start} to {self.artifacts.stop - 1}"
        return "the run"


@dataclass(frozen=True)
class CleaningPlan:
    """What would be removed, and what would not although it meets the criteria."""

    folder: Path
    removals: Sequence[Removal]
    spared: Sequence[tuple[ListedRun, str]]
    """Run, and why it stays."""
    leftovers: Sequence[Path] = field(default=())
    """What a killed removal has left."""

    @property
    def num_bytes(self) -> int:
        """Of all that would be removed."""
        return sum(removal.num_bytes for removal in self.removals)


def plan_cleaning(folder: Path, what: Wanted, *, asks_registry: bool = True) -> CleaningPlan:
    """Find out what would be removed. Writes nothing.

    Args:
        folder: of runs.
        what: the criteria.
        asks_registry: False where a person has said that MLflow's aliases do not matter.
    Raises: UserError if there is no such folder.
    """
    runs = list_runs(folder)
    needed, registry = needed_by_others(runs), _Registry()
    removals: list[Removal] = []
    spared: list[tuple[ListedRun, str]] = []
    for run in chosen(runs, what):
        try:
            named = registry.aliases(run) if asks_registry else {}
            _refuse_needed(run, what, needed, named)
            found = [removal for part in what.parts if (removal := _removal(run, part, named)) is not None]
        except (RlhfError, OSError) as error:
            spared.append((run, str(error).splitlines()[0]))
            continue
        removals += found
    return CleaningPlan(folder, removals, spared, _leftovers(folder))


def clean(plan: CleaningPlan) -> list[str]:
    """Remove what was planned, unless it has changed meanwhile.

    Returns: a sentence for everything that could not be removed.
    """
    problems: list[str] = []
    for removal in plan.removals:
        if not removal.run.path.is_dir():  # somebody else was faster
            continue
        try:
            with holding(removal.run.path / "lock", str(removal.run.path)):
                _remove(removal)
        except (RlhfError, OSError) as error:
            problems.append(str(error).splitlines()[0])
    for path in plan.leftovers:
        try:
            remove_folder(path)
        except RlhfError as error:
            problems.append(str(error).splitlines()[0])
    return problems


def registry_aliases(run: RunFolder, client: Any) -> Aliases:
    """The aliases of MLflow's registry that name a checkpoint of a run. Raises whatever the tracker raises."""
    run_id = Ledger.of(run.path).run_id
    found: dict[int, list[str]] = {}
    for version in client.search_model_versions(f"run_id = '{run_id}'") if run_id else []:
        aliases: Mapping[str, Any] = client.get_registered_model(version.name).aliases
        names = [f"{version.name}@{alias}" for alias, number in aliases.items() if str(number) == str(version.version)]
        tag = str(version.tags.get("rlhf.iteration", ""))
        if names:
            found.setdefault(int(tag) if tag.isdecimal() else WHOLE, []).extend(sorted(names))
    return found


class _Registry:
    """MLflow's registry, asked once for each tracker."""

    def __init__(self) -> None:
        self._clients: dict[str, Any] = {}

    def aliases(self, listed: ListedRun) -> Aliases:
        """Of a run. Raises RlhfError where nobody can tell."""
        if not (listed.path / "mlflow.json").is_file():
            return {}
        try:
            run = RunFolder.open(listed.path)
            if Ledger.of(run.path).run_id is None:
                return {}
            uri = tracking_uri(run)
            store = Path(uri.removeprefix("sqlite:///").partition("?")[0])
            if uri.startswith("sqlite:///") and not store.is_file():  # connecting would make an empty one
                raise FileNotFoundError(f"{store} is not there")
            if uri not in self._clients:
                self._clients[uri] = connect(run)[0]
            return registry_aliases(run, self._clients[uri])
        except Exception as error:  # MLflow's own, which only tasks/tracking/tracker.py knows
            raise RlhfError(
                f"whether an alias of MLflow names it is not known ({reason(error)}); start that tracker, or give "
                "--ignore-registry"
            ) from None


def _refuse_needed(run: ListedRun, what: Wanted, needed: Mapping[Path, str], named: Aliases) -> None:
    """Raise RlhfError for a run that somebody needs, or works on."""
    if "run" in what.parts and named:
        raise RlhfError(f"MLflow's {', '.join(name for names in named.values() for name in names)} is of it")
    if set(what.parts) != {"artifacts"} and run.path in needed:
        raise RlhfError(f"{needed[run.path]} was begun with a model that lies in it")
    for name in GROUPS:
        lock = run.path.parent / ("lock" if name == "sweep" else "chain.lock")
        if (run.path.parent / f"{name}.json").is_file() and is_held(lock):
            raise RlhfError(f"a process is working on the {name} that it belongs to")


def _removal(run: ListedRun, part: Part, named: Aliases) -> Removal | None:
    """What a part consists of; None if there is nothing of it."""
    if part == "run":
        return Removal(run, part, run.num_bytes)
    folder = RunFolder.open(run.path)
    if part == "artifacts":
        iterations, files = removable_artifacts(folder)
        size = sum(file.stat().st_size for file in files)
        return Removal(run, part, size, artifacts=iterations, files=files) if files else None
    if WHOLE in named:
        raise RlhfError(f"MLflow's {', '.join(named[WHOLE])} is of it, and does not say of which checkpoint")
    best = best_checkpoint(folder) if folder.config.checkpoint.keep_best else None
    checkpoints = removable_checkpoints(folder, [*named, *([] if best is None else [best])])
    size = sum(measured(folder.checkpoint_path(iteration))[0] for iteration in checkpoints)
    return Removal(run, part, size, checkpoints=checkpoints) if checkpoints else None


def _remove(removal: Removal) -> None:
    """Remove it. The caller holds the run's lock."""
    path = removal.run.path
    if path.is_symlink() or _of_others(measured(path)[1], removal.run.written, removal.part):
        raise RunLockedError(f"{path} has changed since this was planned; look again")
    if removal.part == "run":
        remove_folder(path)
        return
    run = RunFolder.open(path)
    today = date.today().isoformat()
    cleaned_after(Cleaned.of(path), today, removal.checkpoints, removal.artifacts).write(path)
    for iteration in removal.checkpoints:
        remove_folder(run.checkpoint_path(iteration))
    for file in removal.files:
        remove_file(file)
    remove_leftovers(path / "checkpoints")


def _of_others(now: float | None, planned: float | None, part: Part) -> bool:
    """Whether somebody has written in a run since it was planned; several parts of one run are removed in turn."""
    return part == "run" and now != planned


def _leftovers(folder: Path) -> list[Path]:
    """Run folders that a killed removal has renamed and not removed yet."""
    below = (p for p in sorted(folder.iterdir()) if p.is_dir() and not p.is_symlink())
    places: Iterable[Path] = [p for p in (folder, *below) if not (p / "run.json").is_file()]
    found = [p for place in places for p in sorted(place.glob(f".*{REMOVED}"))]
    return [p for p in found if p.is_dir() and not p.is_symlink() and _was_run(p) and not is_held(p / "lock")]


def _was_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("run.json", "lock", "iterations", "checkpoints"))
