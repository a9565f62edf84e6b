"""What a person wants removed from a folder of runs: which runs, by age, count, size or outcome, and which parts.

    Wanted(older_than_s=30 * DAY, keep=5, states=("stopped",))      runs that meet all of it, but for the newest five

Nothing is removed here: :mod:`tasks.lifecycle.cleaning` does, and asks MLflow first.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from rlhf_core.contracts.archive import open_segment, segment_paths
from rlhf_core.contracts.artifacts import artifact_path
from rlhf_core.contracts.cleaned import Cleaned
from rlhf_core.contracts.errors import RlhfError, UserError
from rlhf_core.contracts.places import model_places
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.stage_graph import FILE_STEMS, STAGES
from rlhf_core.run_list import STATES, ListedRun, State

Part = Literal["run", "checkpoints", "artifacts"]
PARTS: Final[tuple[str, ...]] = tuple(part for part in get_args(Part) if part != "run")
REMOVABLE: Final = tuple(state for state in STATES if state not in ("running", "waiting"))
SECONDS: Final = {"s": 1, "min": 60, "h": 3_600, "d": 86_400, "w": 604_800}
BYTES: Final = {
    "B": 1,
    **{f"{prefix}B": 1_000 ** (i + 1) for i, prefix in enumerate("kMGT")},
    **{f"{prefix}iB": 1_024 ** (i + 1) for i, prefix in enumerate("KMGT")},
}
_AMOUNT: Final = re.compile(r"\s*([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*([A-Za-z]+)\s*")


@dataclass(frozen=True)
class Wanted:
    """What a person asks to have removed: runs that meet every criterion."""

    older_than_s: float | None = None
    """Not written for so long."""
    keep: int | None = None
    """So many of the newest runs stay."""
    larger_than: int | None = None
    """Bytes."""
    states: Sequence[State] = ()
    """Empty: any that is not at work."""
    parts: Sequence[Part] = ("run",)
    """Whole runs, or parts of runs that stay."""

    def why_not(self, run: ListedRun, rank: int, now: float) -> str:
        """Why a run does not meet the criteria; empty if it does. ``rank``: 0 for the newest of its folder."""
        if run.state in ("running", "waiting"):
            return f"it is {run.state}"
        if self.keep is not None and rank < self.keep:
            return f"it is among the newest {self.keep}"
        if self.states and run.state not in self.states:
            return f"it is {run.state}"
        if self.older_than_s is not None and run.age_s(now) <= self.older_than_s:
            return "it is newer"
        if self.larger_than is not None and run.num_bytes <= self.larger_than:
            return "it is smaller"
        return ""


def wanted(
    older_than: str | None,
    keep: int | None,
    larger_than: str | None,
    states: Sequence[str],
    only: Sequence[str],
) -> Wanted:
    """From a command line's texts. Raises UserError with every mistake, or where no criterion is given.

    >>> wanted("30d", None, "1.5GB", ["stopped"], [])
    Wanted(older_than_s=2592000.0, keep=None, larger_than=1500000000, states=('stopped',), parts=('run',))
    """
    problems: list[str] = []
    age = _amount(older_than, SECONDS, "--older-than", "30d, 12h or 45min", problems)
    size = _amount(larger_than, BYTES, "--larger-than", "10GB, 500MB or 1.5TB", problems)
    if keep is not None and keep < 0:
        problems.append(f"--keep is {keep}; give how many of the newest runs stay, 0 or more")
    problems += [f"--state is {s!r}; choose {', '.join(REMOVABLE)}" for s in states if s not in REMOVABLE]
    problems += [f"--only is {part!r}; choose {' or '.join(PARTS)}" for part in only if part not in PARTS]
    if older_than is None and keep is None and larger_than is None and not states:
        problems.append(
            "nothing says which runs: give --older-than 30d, --keep 5, --larger-than 10GB or --state stopped, or "
            "several of them; a run has to meet all of them"
        )
    if problems:
        raise UserError(*problems)
    parts: tuple[Part, ...] = tuple(part for part in get_args(Part) if part in only) or ("run",)
    return Wanted(age, keep, None if size is None else int(size), tuple(s for s in STATES if s in states), parts)


def chosen(runs: Sequence[ListedRun], what: Wanted, now: float | None = None) -> list[ListedRun]:
    """The runs that meet all criteria. ``runs``: the newest first."""
    now = time.time() if now is None else now
    begun = [run for run in runs if run.written is not None]
    return [run for rank, run in enumerate(begun) if not what.why_not(run, rank, now)]


def needed_by_others(runs: Sequence[ListedRun]) -> Mapping[Path, str]:
    """Run folders that other runs read their models from -> which run that is."""
    found: dict[Path, str] = {}
    folders = {run.path.resolve(): run.path for run in runs}
    for run in runs:
        try:
            config = RunFolder.open(run.path).config
        except (RlhfError, OSError):
            continue
        for place in model_places(config).values():
            try:
                parents = Path(place).expanduser().resolve().parents
            except OSError:
                continue
            for parent in parents:
                if parent in folders and folders[parent] != run.path:
                    found[folders[parent]] = run.name
    return found


def removable_checkpoints(run: RunFolder, kept: Sequence[int]) -> list[int]:
    """Checkpoints without which a run goes on all the same: not the newest, the last good one, nor any of ``kept``."""
    saved = run.checkpoints()
    return [iteration for iteration in saved[:-1] if iteration not in kept and iteration != run.last_good]


def removable_artifacts(run: RunFolder) -> tuple[range, list[Path]]:
    """Artifacts without which a run goes on all the same: of iterations before its newest checkpoint.

    Those of iteration 0, with which the run is compared at its end, stay, and so do manifests: every metric and digest.

    Returns: the iterations, and the files.
    """
    start, before, segments = 1, max(run.checkpoints(), default=0), segment_paths(run.path)
    for first, last, path in segments:
        if first == 0 and len(open_segment(path).iterations) > 1:
            start = last + 1
        if first < before <= last:
            before = first
    files = [run.path / artifact_path(i, stage) for i in range(start, before) for stage in STAGES]
    for first, last, path in segments:
        if start <= first and last < before:
            files += [path / f"{stem}.arrow" for stem in FILE_STEMS.values()]
    there = [file for file in files if file.is_file() and not file.is_symlink()]
    return range(start, max(start, before)), there


def cleaned_after(there: Cleaned, date: str, checkpoints: Sequence[int], artifacts: range) -> Cleaned:
    """The record of a run once these checkpoints, and the artifacts of these iterations, are removed, too."""
    start, before = there.artifacts_from, there.artifacts_before
    if artifacts:
        start = min(start, artifacts.start) if before else artifacts.start
        before = max(before, artifacts.stop)
    return Cleaned(date, sorted({*there.checkpoints, *checkpoints}), start, before)


def _amount(
    text: str | None, units: Mapping[str, int], option: str, examples: str, problems: list[str]
) -> float | None:
    if text is None:
        return None
    found = _AMOUNT.fullmatch(text)
    if found is None or found[2] not in units:
        problems.append(f"{option} is {text!r}; write a number and a unit ({', '.join(units)}), as {examples}")
        return None
    return float(found[1]) * units[found[2]]
