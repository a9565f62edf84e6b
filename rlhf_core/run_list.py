"""The runs of a folder: where each stands, what came out last, how large it is, and when it was last written.

Runs lie in the folder itself or one folder deeper, as those of a sweep or a chain do. Links are followed nowhere. It
works while runs are going, and a run that cannot be read is listed with the reason.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from rlhf_core.contracts.durable import is_leftover
from rlhf_core.contracts.errors import RlhfError, UserError
from rlhf_core.contracts.records import read_record
from rlhf_core.contracts.run_folder import RunFolder

State = Literal["running", "waiting", "stopped", "finished", "damaged"]
STATES: Final[tuple[State, ...]] = ("running", "waiting", "stopped", "finished", "damaged")
RECORD: Final = "run.json"
SWEEP: Final = "sweep.json"


@dataclass(frozen=True)
class ListedRun:
    """One run.

    Example: ``ListedRun(Path("runs/a"), "a", "stopped", 12, 40, 1.93, 3.4, 52_000_000, 1.7e9, "gpt2")``
    """

    path: Path
    name: str
    """Path below the folder that is listed."""
    state: State
    """waiting: for a person, where a guard has paused it; or for its turn in a sweep."""
    finished: int | None = None
    """Iterations; None where the run cannot be read."""
    of: int | None = None
    score: float | None = None
    """Mean score of the newest finished iteration."""
    kl: float | None = None
    num_bytes: int = 0
    written: float | None = None
    """Unix time of the newest write; None where there is nothing yet."""
    model: str | None = None
    """The policy that it began with."""
    note: str = ""
    """Why it is stopped, waiting or damaged, where something says so."""

    def age_s(self, now: float | None = None) -> float:
        """Seconds since the newest write, never below 0."""
        return max(0.0, (time.time() if now is None else now) - (self.written or 0.0))

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "run": str(self.path),
            "name": self.name,
            "state": self.state,
            "finished": self.finished,
            "num_iterations": self.of,
            "score": self.score,
            "kl": self.kl,
            "bytes": self.num_bytes,
            "written": self.written,
            "model": self.model,
            "note": self.note,
        }


def list_runs(folder: Path) -> list[ListedRun]:
    """The runs of a folder, that which was written last first.

    Args:
        folder: of runs, sweeps or chains; a run folder is listed alone.
    Raises: UserError if it is no folder that can be read.
    """
    if (folder / RECORD).is_file():
        return [listed(folder, folder.name)]
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "is not there"
        raise UserError(f"{folder} {what}; name a folder of runs")
    try:
        os.scandir(folder).close()
        found = [listed(path, str(path.relative_to(folder))) for path in run_paths(folder)]
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}; give yourself the permission") from None
    found += [run for path in (folder, *_folders(folder)) for run in _not_begun(folder, path)]
    return sorted(found, key=lambda run: (-(run.written or 0.0), run.name))


def run_paths(folder: Path) -> Iterator[Path]:
    """The run folders in a folder and in those below it; no links."""
    for path in _folders(folder):
        if _is_run(path):
            yield path
        else:
            yield from (below for below in _folders(path) if _is_run(below))


def listed(path: Path, name: str) -> ListedRun:
    """Where one run stands, by its files alone."""
    num_bytes, written = measured(path)
    try:
        run = RunFolder.open(path)
        finished, of = run.num_finished(), run.config.num_iterations
        newest = run.manifests(finished - 1) if finished else {}
        metrics = {k: v for manifest in newest.values() for k, v in manifest.metrics.items()}
        state, note = _state(run, finished)
    except (RlhfError, OSError, UnicodeDecodeError) as error:
        return ListedRun(path, name, "damaged", num_bytes=num_bytes, written=written, note=_first_line(error))
    return ListedRun(
        path,
        name,
        state,
        finished,
        of,
        metrics.get("objective/scores"),
        metrics.get("objective/kl"),
        num_bytes,
        written,
        run.config.policy.model,
        note,
    )


def measured(path: Path) -> tuple[int, float | None]:
    """Bytes of the files below a folder, each once however many names it has, and the time of the newest write.

    What goes away meanwhile, or cannot be read, counts nothing; links are not followed, and the lock is no write.
    """
    total, newest, seen = 0, None, set[tuple[int, int]]()
    folders = [path]
    while folders:
        try:
            entries = list(os.scandir(folders.pop()))
        except OSError:
            continue
        for entry in entries:
            try:
                about = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if stat.S_ISDIR(about.st_mode):
                folders.append(Path(entry.path))
            elif stat.S_ISREG(about.st_mode):
                if (about.st_dev, about.st_ino) not in seen:
                    seen.add((about.st_dev, about.st_ino))
                    total += about.st_size
                if entry.name not in ("lock", "lock.held"):
                    newest = max(newest or 0.0, about.st_mtime)
    return total, newest


def _state(run: RunFolder, finished: int) -> tuple[State, str]:
    guards = run.path / "guards.json"
    record: Mapping[str, Any] = read_record(guards) if guards.is_file() else {}
    if run.is_locked():
        waits_for = _pausing(run, record, finished - 1)
        return ("waiting", f"paused by {waits_for}: a person decides") if waits_for else ("running", "")
    if reason := record.get("stopped"):
        return "stopped", f"stopped by a guard: {reason}"
    if finished < run.config.num_iterations:
        return "stopped", ""
    if not (run.path / "before_after.json").is_file():
        return "stopped", "its report is missing"
    return "finished", ""


def _pausing(run: RunFolder, record: Mapping[str, Any], iteration: int) -> str:
    """The guards that ask a person about the newest iteration, and have no answer yet."""
    names: list[str] = record.get("tripped", {}).get(str(iteration), [])
    accepted: Mapping[str, int] = record.get("accepted", {})
    guards = run.config.guards
    asking = [n for n in names if getattr(getattr(guards, n, None), "action", "") == "pause" and n not in accepted]
    return ", ".join(asking)


def _not_begun(folder: Path, path: Path) -> Iterator[ListedRun]:
    """The runs of a sweep that wait for their turn."""
    if not (path / SWEEP).is_file():
        return
    from rlhf_core.sweeping.folder import SweepFolder

    try:
        there = SweepFolder.open(path)
    except RlhfError:  # the sweep tells of itself
        return
    for run in there.runs:
        place = there.run_path(run)
        if not place.is_dir():
            name, config = str(place.relative_to(folder)), run.config
            yield ListedRun(place, name, "waiting", 0, config.num_iterations, model=config.policy.model,
                            note="for its turn in the sweep")  # fmt: skip


def _is_run(path: Path) -> bool:
    """Whether a folder holds a run, also one whose record is gone."""
    return (path / RECORD).is_file() or ((path / "iterations").is_dir() and (path / "lock").is_file())


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, but for links and what killed processes have left."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        return [p for e in entries if e.is_dir(follow_symlinks=False) and not is_leftover(p := Path(e.path))]
    except (PermissionError, FileNotFoundError, NotADirectoryError):
        return []


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
