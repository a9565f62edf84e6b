"""Bringing a copy in line with its store: what is missing or differs is fetched, what the store has not is removed.

Readers of a copy see what readers of the run itself would: no record is there before what it commits. A run that goes
on meanwhile is listed until two lists agree, which is how it was at one moment between them. The files at its top
(``mlflow.json``, ``guards.json``) are written over and over and commit nothing below: the newest ones are taken.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rlhf_core.contracts.durable import TEMPORARY
from rlhf_core.contracts.errors import IntegrityError, StorageError
from rlhf_core.store.known import Known
from rlhf_core.store.layout import LINK, RECORD, files_of, is_local, is_record
from rlhf_core.store.objects import ChangedError, Entry, Listing, Objects

AT_ONCE = 8
"""Objects that are fetched side by side."""
TRIES = 10
"""While the run goes on and its objects change."""


def bring_in_line(
    objects: Objects,
    root: Path,
    known: Known,
    *,
    under: str = "",
    wanted: Callable[[str], bool] = lambda _name: True,
    local: Callable[[str], bool] = is_local,
) -> Listing:
    """Make a folder the copy of a run, or of one folder of it.

    Args:
        objects: of the run.
        root: folder of the copy.
        known: what is known of its files.
        under: of this folder alone, as ``shards/000007/``.
        wanted: whether a file is fetched; others are left as they are.
        local: whether a name is of this machine alone, and left out here and there.
    Returns: what was in the store.
    Raises:
        StorageError: the store does not give it, or changes all the time.
        IntegrityError: it holds what no run folder can.
    """
    for _ in range(TRIES):
        begun = time.time()
        try:
            listing = _settled(objects, under, local)
            files = files_of(listing.entries, objects.url)
            files = {name: entry for name, entry in files.items() if not local(name)}
            root.mkdir(parents=True, exist_ok=True)
            _remove_surplus(root, under, {name.removesuffix(LINK) for name in files}, local, begun)
            _fetch_missing(objects, root, known, files, wanted)
            return listing
        except ChangedError:
            continue
    raise StorageError(
        f"{objects.address} changes faster than it can be read; nothing was changed: try it again, or look at it on "
        "the machine where it runs"
    )


def _settled(objects: Objects, under: str, local: Callable[[str], bool]) -> Listing:
    """A list that held at one moment; after so many tries the newest one, whose objects are each checked."""
    before = objects.list(under)
    for _ in range(TRIES):
        listing = objects.list(under)
        if _below_the_top(listing, local) == _below_the_top(before, local):
            return listing
        before = listing
    return before


def _below_the_top(listing: Listing, local: Callable[[str], bool]) -> dict[str, str]:
    return {name: entry.etag for name, entry in listing.entries.items() if "/" in name and not local(name)}


def _fetch_missing(
    objects: Objects, root: Path, known: Known, files: dict[str, Entry], wanted: Callable[[str], bool]
) -> None:
    """Fetch what is not there as the store has it: records after what they may commit, the run's own last."""
    missing = [
        name
        for name, entry in files.items()
        if not name.endswith(LINK) and wanted(name) and not known.is_same(name, entry, root / name)
    ]
    first = [name for name in missing if not is_record(name)]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for _ in threads.map(lambda name: _fetch(objects, root, known, name, files[name]), first):
            pass
    for name in sorted(set(missing) - set(first), key=lambda name: (name == RECORD, name)):
        _fetch(objects, root, known, name, files[name])
    for name in files:
        if name.endswith(LINK):
            _link(objects, root, name)


def _fetch(objects: Objects, root: Path, known: Known, name: str, entry: Entry) -> None:
    """Fetch a file whole, or not at all; its time is that of its object."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}{TEMPORARY}")
    try:
        try:
            objects.fetch(name, temporary, entry.etag)
        except ChangedError:
            newest = objects.list(name, at_most=1).entries.get(name)
            if newest is None or "/" in name:
                raise
            _fetch(objects, root, known, name, newest)
            return
        os.utime(temporary, (entry.modified, entry.modified))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    known.note(name, entry.etag, path)


def _link(objects: Objects, root: Path, name: str) -> None:
    """Make a link that the store remembers, if it is not there."""
    if (found := objects.read(name)) is None:
        raise ChangedError(name)
    path, target = root / name.removesuffix(LINK), os.fsdecode(found[0])
    if not target.isascii() or not target.isalnum():
        raise IntegrityError(f"{objects.url(name)} leads to {target[:80]!r}, which is no name beside it; remove it")
    if not path.is_symlink() or str(path.readlink()) != target:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(target)


def _remove_surplus(root: Path, under: str, there: set[str], local: Callable[[str], bool], begun: float) -> None:
    """Remove what the store has not, and folders that hold nothing; what has just come is newer than the list."""
    found = [p for p in (root / under).rglob("*") if not local(p.relative_to(root).as_posix())]
    old = [p for p in found if p.lstat().st_ctime < begun]
    surplus = [p for p in old if (p.is_symlink() or not p.is_dir()) and p.relative_to(root).as_posix() not in there]
    for path in sorted(surplus, key=lambda path: (not is_record(path.name), path)):
        path.unlink(missing_ok=True)
    for path in sorted((p for p in old if p not in surplus and p.is_dir() and not p.is_symlink()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
