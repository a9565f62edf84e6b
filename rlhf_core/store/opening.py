"""The doors to a run: whoever is given a folder or an address gets a folder, and works in it as in any other.

    reading("s3://bucket/run")    the copy, brought in line with the store; also while the run goes on
    writing("s3://bucket/run")    the same, with the lease: what is written goes to the store first
    adding("s3://bucket/run")     an evaluation beside a run that may go on: one room of it goes to the store

A folder of this machine is handed through as it is. Two locks stand beside a copy: ``writer`` is held by the process
that works on the run here, ``copying`` by whoever brings the copy in line. While there is a writer here, it does that.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rlhf_core.contracts.durable import make_folder, using_disk
from rlhf_core.contracts.errors import RlhfError, UserError
from rlhf_core.contracts.locking import holding, is_held, note_elsewhere
from rlhf_core.contracts.run_folder import check_vacant
from rlhf_core.store import lease
from rlhf_core.store.address import Address, is_url, known_as, shown
from rlhf_core.store.copying import bring_in_line
from rlhf_core.store.known import Known
from rlhf_core.store.layout import RECORD, absent_folders, is_local
from rlhf_core.store.mirror import Mirror, remove_absent
from rlhf_core.store.objects import Listing, Objects

FEW = 10
"""Objects that tell whether there is anything."""
logger = logging.getLogger(__name__)
_open: dict[str, Path] = {}
"""Address -> copy, of what this process has open to write in."""


@dataclass(frozen=True)
class _Place:
    """A run in a store, and its copy here."""

    address: Address
    objects: Objects
    copy: Path

    @classmethod
    def of(cls, text: str) -> _Place:
        address = Address.of(text)
        objects = Objects(address)
        place = cls(address, objects, address.copy(objects.endpoint))
        known_as(place.copy, address)
        make_folder(place.state)
        return place

    @property
    def state(self) -> Path:
        """Folder of locks and of what is known of the copy."""
        return self.copy.with_name(f".{self.copy.name}.copy")

    @property
    def writer(self) -> Path:
        """Lock of the process that works on the run here."""
        return self.state / "writer"

    def known(self) -> Known:
        """What is known of the copy."""
        return Known(self.state / "known")

    def refuse_foreign(self, *, new: bool = False) -> None:
        """Raise UserError if there is something else than a run; or, unless it may be new, nothing."""
        if self.objects.list(RECORD, at_most=1).entries.keys() == {RECORD}:
            return
        there = self.objects.list(at_most=FEW).entries.keys() - {lease.NAME}
        if there and new:
            raise UserError(
                f"--run-dir {self.address} is neither empty nor a run: it holds {min(there)}; choose a new one"
            )
        if not new:
            raise UserError(f"{self.address} is not a run: it has no {RECORD}")

    def bring_in_line(self, *, weights: bool = True) -> Listing:
        """Make the copy one."""
        return bring_in_line(
            self.objects, self.copy, self.known(), wanted=lambda name: weights or not _is_weights(name)
        )

    def digest(self) -> str:
        """Of the writer's lock, the same for all who hold it and for nobody else."""
        boot = Path("/proc/sys/kernel/random/boot_id")
        found = self.writer.stat()
        where = [boot.read_text() if boot.is_file() else "", found.st_dev, found.st_ino, str(self.writer)]
        return hashlib.sha256(repr(where).encode()).hexdigest()


def check_new(place: str) -> None:
    """Raise UserError unless a run may begin in a folder or at an address. Writes nothing there."""
    if not is_url(place):
        check_vacant(Path(place))
        return
    there = _Place.of(place)
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
    there = _Place.of(str(place))
    there.refuse_foreign()
    with _in_addresses(), holding(there.state / "copying", str(there.address), waits=True):
        if not is_held(there.writer):
            found = there.bring_in_line(weights=weights)
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
    there = _Place.of(str(place))
    there.refuse_foreign(new=new)
    renewing = Objects(there.address, tries=2, read_s=3.0)
    with (
        _in_addresses(),
        holding(there.writer, str(there.address)),
        lease.taken(renewing, there.digest(), logger.warning, began=lambda: _has_begun(there)) as mine,
    ):
        with holding(there.state / "copying", str(there.address), waits=True):
            _finish(there, mine.check)
            etags = {name: entry.etag for name, entry in there.bring_in_line().entries.items()}
        note_elsewhere(there.copy / "lock", False)
        with _mirrored(there, mine.check, is_local, etags):
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
    there = _Place.of(str(place))
    with (
        _in_addresses(),
        _mirrored(there, lambda: None, lambda name: is_local(name) or not name.startswith(f"{room}/")),
    ):
        yield copy


def copy_of(place: str | Path) -> Path:
    """The folder that a run is worked on in; of an address, that of its copy, whether it is there yet or not."""
    return _Place.of(str(place)).copy if is_url(place) else Path(place)


def local(place: str) -> str:
    """The folder of an address that this process has open; anything else as it is."""
    return str(reading(place)) if is_url(place) else place


@contextlib.contextmanager
def _mirrored(
    there: _Place, check: Callable[[], None], local: Callable[[str], bool], etags: dict[str, str] | None = None
) -> Iterator[None]:
    _open[str(there.address)] = there.copy
    try:
        with using_disk(Mirror(there.copy, there.objects, there.known(), check=check, local=local, etags=etags)):
            yield
    finally:
        del _open[str(there.address)]


def _finish(there: _Place, check: Callable[[], None]) -> None:
    """Take away the folders that a killed process has left half sent or half removed."""
    entries = there.objects.list().entries
    for folder in absent_folders(entries):
        check()
        names = [name for name in entries if name.startswith(f"{folder}/")]
        remove_absent(folder, names, there.objects.delete)


def _has_begun(there: _Place) -> bool:
    return (there.copy / RECORD).is_file()


def _is_weights(name: str) -> bool:
    return name.startswith("checkpoints/") and name.endswith(".safetensors")


@contextlib.contextmanager
def _in_addresses() -> Iterator[None]:
    """What goes wrong is told by the address, not by the copy."""
    try:
        yield
    except RlhfError as error:
        error.args = tuple(shown(each) if isinstance(each, str) else each for each in error.args)
        if isinstance(error, UserError):
            error.problems = [shown(problem) for problem in error.problems]
        raise
