"""Which runs are around a path: what a person may have meant, and whether a file lies in one."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

RECORD: Final = "run.json"
MAX_NAMED: Final = 5
"""Runs that a sentence names."""
_MAX_LINKS: Final = 40
_ROOMS: Final = ("iterations", "checkpoints", "lock")


def why_no_run(path: Path) -> str:
    """One sentence about a path that is no run folder: what it is, and which runs are near it."""
    return f"{path} is not a run folder: {_what_is(path)}{runs_near(path)}"


def runs_near(path: Path) -> str:
    """The end of a sentence about a path that is no run folder: runs that may have been meant; "" if there are none."""
    inside = next((parent for parent in path.parents if (parent / RECORD).is_file()), None)
    if inside is not None:
        return f"; it is in the run {inside}"
    if path.is_dir():
        found = _runs_in(path) or [run for folder in _folders_in(path) for run in _runs_in(folder)]
        return f"; it holds {_listed(found)}: name one of them" if found else ""
    beside = _runs_in(path.parent)
    if close := difflib.get_close_matches(path.name, [run.name for run in beside], n=1):
        return f"; did you mean {path.parent / close[0]}?"
    return f"; beside it: {_listed(beside)}" if beside else ""


def run_around(path: Path, run_dir: Path | None = None) -> Path | None:
    """The run folder that a file lies in, by its own name or by one that its links lead to; None if in none.

    Args:
        path: of a file or folder, which need not exist.
        run_dir: a folder that is a run's, whatever it holds.
    """
    own = None if run_dir is None else run_dir.resolve()
    for name in _names(path):
        for parent in (name, *name.parents):
            if parent == own or _is_run(parent):
                return parent
    return None


def _is_run(folder: Path) -> bool:
    try:
        return (folder / "run.json").is_file() and any((folder / room).exists() for room in _ROOMS)
    except OSError:
        return False


def _names(path: Path) -> Iterator[Path]:
    """A path, without links above it, and every path that its links lead to."""
    name = Path(os.path.abspath(path))  # noqa: PTH100 - links stay
    for _ in range(_MAX_LINKS):
        yield name
        try:
            name = name.parent.resolve() / name.name
            yield name
            if not name.is_symlink():
                return
            name = name.parent / name.readlink()
        except (OSError, RuntimeError):
            return


def _what_is(path: Path) -> str:
    if path.is_dir():
        return f"it has no {RECORD}"
    if path.exists():
        return "it is a file"
    return "there is no such folder"


def _runs_in(folder: Path) -> list[Path]:
    return [each for each in _folders_in(folder) if (each / RECORD).is_file()]


def _folders_in(folder: Path) -> list[Path]:
    try:
        return sorted(each for each in folder.iterdir() if each.is_dir())
    except OSError:
        return []


def _listed(runs: list[Path]) -> str:
    if len(runs) == 1:
        return f"the run {runs[0]}"
    named = ", ".join(map(str, runs[:MAX_NAMED]))
    return f"the runs {named}" + (f" and {len(runs) - MAX_NAMED} more" if len(runs) > MAX_NAMED else "")
