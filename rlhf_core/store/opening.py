"""The doors to a run: whoever is given a folder or an address gets a folder, and works in it as in any other.

    reading("s3://bucket/run")    the copy, brought in line with the store; also while the run goes on
    writing("s3://bucket/run")    the same, with the lease: what is written goes to the store first
    adding("s3://bucket/run")     an evaluation beside a run that may go on: one room of it goes to the store

A folder of this machine is handed through as it is. Two locks stand beside a copy: ``writer`` is held by the process
that works on the run here, ``copying`` by whoever brings the copy in line. While there is a writer here, it does that.
Machines that compute for a run of another one have a door of their own (:mod:`rlhf_core.store.helping`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from rlhf_core.contracts.durable import using_disk
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.locking import holding, is_held, note_elsewhere
from rlhf_core.contracts.run_folder import check_vacant
from rlhf_core.store import helping, lease
from rlhf_core.store.address import is_url
from rlhf_core.store.layout import RECORD, absent_folders, is_local
from rlhf_core.store.mirror import Mirror, remove_absent
from rlhf_core.store.objects import Objects
from rlhf_core.store.place import Place, in_addresses

logger = logging.getLogger(__name__)
_open: dict[str, Path] = {}
"""Address -> copy, of what this process has open to write in."""


def check_new(place: str) -> None:
    """Raise UserError unless a run may begin in a folder or at an address. Writes nothing there."""
    if not is_url(place):
        check_vacant(Path(place))
        return
    there = Place.of(place)
    there.refuse_foreign(new=True)
    if there.objects.read(RECORD) is not None:
        raise UserError(f"--run-dir {place} already holds a run; continue it with `rlhf resume {place}`")


def reading(place: str | Path, *, weights: bool = True) -> Path:
    """The folder of a run, to be read; of an address, its copy as the run is now.

    Args:
        place: folder or address.
        weights: also those of the checkpoints, most of a run's bytes.
    Raises:
        UserError: the address is none, or no run is there.
        StorageError: the store cannot be read.
    """
    if not is_url(place):
        return Path(place)
    if (copy := _open.get(str(place).rstrip("/"))) is not None:
        return copy
    there = Place.of(str(place))
    there.refuse_foreign()
    with in_addresses(), there.copying():
        if not is_held(there.writer):
            found = there.bring_in_line(wanted=lambda name: weights or not _is_weights(name))
            held = found.entries.get(lease.NAME)
            note_elsewhere(
                there.copy / "lock",
                held is not None and lease.is_live(there.objects, found.now - held.modified),
            )
    return there.copy


@contextlib.contextmanager
def writing(place: str | Path, *, new: bool = True) -> Iterator[Path]:
    """The folder of a run, to be begun or gone on with in this process.

    Args:
        place: folder or address.
        new: there may be nothing yet.
    Raises:
        UserError: the address is none, or something else is there.
        RunLockedError: another process works on it; also later, if this one has lost its lease.
        StorageError: the store cannot be read or written.
    """
    if not is_url(place) or str(place).rstrip("/") in _open:
        yield _open.get(str(place).rstrip("/"), Path(place))
        return
    there = Place.of(str(place))
    there.refuse_foreign(new=new)
    renewing = Objects(there.address, tries=2, read_s=3.0)
    with (
        in_addresses(),
        holding(there.writer, str(there.address)),
        lease.taken(renewing, there.digest(), logger.warning, began=lambda: _has_begun(there)) as mine,
    ):
        with there.copying():
            _finish(there, mine.check)
            etags = {name: entry.etag for name, entry in there.bring_in_line().entries.items()}
        note_elsewhere(there.copy / "lock", False)
        with helping.open_to_helpers(there) as local, _mirrored(there, mine.check, local, etags):
            yield there.copy


@contextlib.contextmanager
def adding(place: str | Path, room: str) -> Iterator[Path]:
    """The folder of a run, to be read and to be written in one room that has no writer of its own: its evaluations.

    Args:
        place: folder or address.
        room: what goes to the store; nothing else of the run may be changed.
    Raises: as :func:`reading`.
    """
    copy = reading(place)
    if not is_url(place) or str(place).rstrip("/") in _open:
        yield copy
        return
    there = Place.of(str(place))
    with (
        in_addresses(),
        _mirrored(there, lambda: None, lambda name: is_local(name) or not name.startswith(f"{room}/")),
    ):
        yield copy


def copy_of(place: str | Path) -> Path:
    """The folder that a run is worked on in; of an address, that of its copy, whether it is there yet or not."""
    return Place.of(str(place)).copy if is_url(place) else Path(place)


def local(place: str) -> str:
    """The folder of an address that this process has open; anything else as it is."""
    return str(reading(place)) if is_url(place) else place


@contextlib.contextmanager
def _mirrored(
    there: Place, check: Callable[[], None], local: Callable[[str], bool], etags: dict[str, str] | None = None
) -> Iterator[None]:
    _open[str(there.address)] = there.copy
    try:
        with using_disk(Mirror(there.copy, there.objects, there.known(), check=check, local=local, etags=etags)):
            yield
    finally:
        del _open[str(there.address)]


def _finish(there: Place, check: Callable[[], None]) -> None:
    """Take away the folders that a killed process has left half sent or half removed."""
    entries = there.objects.list().entries
    for folder in absent_folders(entries):
        check()
        names = [name for name in entries if name.startswith(f"{folder}/")]
        remove_absent(folder, names, there.objects.delete)


def _has_begun(there: Place) -> bool:
    return (there.copy / RECORD).is_file()


def _is_weights(name: str) -> bool:
    return name.startswith("checkpoints/") and name.endswith(".safetensors")
