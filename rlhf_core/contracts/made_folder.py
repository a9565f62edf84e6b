"""A folder that a recipe makes: whole or not at all, once, and made again only if the recipe or a file has changed.

It is written into a hidden sibling folder, synced to disk, and renamed into place. A record in it holds the recipe's
digest, what was measured, and the SHA-256 of every other file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, cast

from rlhf_core.contracts.durable import hash_file, sync
from rlhf_core.contracts.locking import holding


def make_once(
    directory: Path,
    digest: str,
    make: Callable[[Path], Mapping[str, Any]],
    *,
    record: str,
    contents: Collection[str],
    kind: str,
) -> dict[str, Any]:
    """Make a folder, or use the one that is there. Processes that ask for one folder wait for the first of them.

    Args:
        directory: the folder; missing parents are made. An older one is replaced once the new one is complete.
        digest: of the recipe.
        make: writes everything into an empty folder, and returns what is recorded, plain JSON.
        record: name of the file that says what the folder is.
        contents: names that the folder may hold.
        kind: what it is, for errors: "text world".
    Returns: what was recorded.
    Raises: ValueError for a directory that is no folder or holds files of another kind, or whatever ``make`` raises.
    """
    if (there := _recorded(directory, digest, record)) is not None:
        return there
    directory.parent.mkdir(parents=True, exist_ok=True)
    lock = directory.with_name(f".{directory.name}.lock")
    with holding(lock, str(lock), waits=True):
        if (there := _recorded(directory, digest, record)) is not None:  # another process has made it in the meantime
            return there
        _refuse_strangers(directory, contents, kind)
        building = directory.with_name(f".{directory.name}.building")
        shutil.rmtree(building, ignore_errors=True)  # of a process that was killed
        building.mkdir()
        try:
            content = dict(make(building)) | {"digest": digest, "files": _digests(building, record)}
            (building / record).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            for path in building.rglob("*"):
                sync(path)
            sync(building)
            _put_in_place(building, directory)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return content


def _recorded(directory: Path, digest: str, record: str) -> dict[str, Any] | None:
    """What was recorded, if the folder is of this digest and undamaged."""
    try:
        content = cast("dict[str, Any]", json.loads((directory / record).read_text(encoding="utf-8")))
        recorded, found = content["files"], _digests(directory, record)
        is_intact = bool(recorded) and all(found.get(name) == sha256 for name, sha256 in recorded.items())
        return content if is_intact and content["digest"] == digest else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no record, or no longer one
        return None


def _digests(directory: Path, record: str) -> dict[str, str]:
    """SHA-256 of each file below the directory, by relative path, the record apart."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / record)
    return {path.relative_to(directory).as_posix(): hash_file(path) for path in files}


def _refuse_strangers(directory: Path, contents: Collection[str], kind: str) -> None:
    """Raise ValueError for a directory that could not be replaced without losing what is no part of it."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is not a folder")
    strangers = sorted(path.name for path in directory.glob("*") if path.name not in contents)
    if strangers:
        raise ValueError(f"{directory} holds files that are no part of a {kind}: {', '.join(strangers)}")


def _put_in_place(building: Path, directory: Path) -> None:
    """Rename a finished folder to its name; the one that had the name is removed last."""
    replaced = directory.with_name(f".{directory.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if directory.exists():
        directory.rename(replaced)
    building.rename(directory)
    sync(directory.parent)
    shutil.rmtree(replaced, ignore_errors=True)
