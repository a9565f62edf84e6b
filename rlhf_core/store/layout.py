"""How a run folder stands in a store: each file is an object of the same name, but for three things.

    checkpoints/last_good.link      a link: the name that it leads to
    checkpoints/000010/.absent      that folder is not there: it is not all there yet, or about to be removed
    lease.json                      who writes (:mod:`rlhf_core.store.lease`)

A store has no rename. So a folder that appears at once on a disk is announced as absent, sent file by file with its
manifest last, and there when the mark is taken away; one that is removed is marked first. Files are sent whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Final

from rlhf_core.contracts.durable import is_leftover
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.shards import SHARDS
from rlhf_core.store.lease import NAME as LEASE
from rlhf_core.store.objects import Entry

LINK: Final = ".link"
ABSENT: Final = ".absent"
RECORD: Final = "run.json"
LOCAL: Final = frozenset({"lock", "lock.held", SHARDS})
"""Of a run folder, what stays on the machine that works on it: no result is in there. While other machines compute its
shards, those are in the store as well (:mod:`rlhf_core.store.helping`)."""
COMMITS: Final = "manifest.json"


def is_local(name: str) -> bool:
    """Whether a name below a run folder is of this machine alone: temporary, or in a local room."""
    parts = PurePosixPath(name).parts
    return not parts or parts[0] in LOCAL or any(is_leftover(Path(part)) for part in parts)


def is_shard(name: str) -> bool:
    """Whether a name below a run folder is of what workers need or make, and not temporary."""
    parts = PurePosixPath(name).parts
    return len(parts) > 1 and parts[0] == SHARDS and not any(is_leftover(Path(part)) for part in parts)


def files_of(entries: dict[str, Entry], url: Callable[[str], str]) -> dict[str, Entry]:
    """The objects that are files or links of a run, without what is marked as absent.

    Args:
        entries: of the store.
        url: of an object, for messages.
    Raises: IntegrityError if a name would lead out of the folder, or is a file's and a folder's.
    """
    absent = absent_folders(entries)
    found = {
        name: entry
        for name, entry in entries.items()
        if not name.endswith("/") and name != LEASE and not any(_is_below(name, folder) for folder in absent)
    }
    for name in found:
        parts = name.split("/")
        if any(part in ("", ".", "..") or len(part.encode()) > 255 or "\0" in part for part in parts):
            raise IntegrityError(f"{url(name)} is an object that no folder can hold; remove it")
        around = ("/".join(parts[:n]) for n in range(1, len(parts)))
        if file := next((folder for folder in around if folder in found), None):
            raise IntegrityError(f"{url(file)} is an object, and {url(name)} stands below it; remove one of them")
    return found


def absent_folders(entries: Iterable[str]) -> list[str]:
    """Folders that are marked as absent."""
    return [name.removesuffix(f"/{ABSENT}") for name in entries if name.endswith(f"/{ABSENT}")]


def is_record(name: str) -> bool:
    """Whether a file may commit others: it is written after them, and removed before them."""
    return name.endswith(".json")


def _is_below(name: str, folder: str) -> bool:
    return name.startswith(f"{folder}/")
