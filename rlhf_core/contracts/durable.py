"""How anything gets onto a disk: durably, atomically, and through one door.

A write is: temporary file in the same folder -> write -> fsync -> sha256 -> rename -> fsync of the folder. What a
reader finds under a name is whole; what a function here has returned from survives a power cut. A failed fsync is
never repeated on the same file: the temporary one is dropped, and another try writes a new one.

Temporary names are ``.<name>.<random>.tmp``; a folder on its way out is ``.<name>.removed``. Readers ignore both,
and :func:`remove_leftovers` takes them away.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from rlhf_core.contracts.errors import StorageError

TEMPORARY = ".tmp"
REMOVED = ".removed"


class Disk:
    """The calls that change a disk, one method each. Tests put a failing or a recording one in its place."""

    def create(self, path: Path) -> int:
        """Descriptor of a new, empty file. Raises FileExistsError if there is one."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write some of the bytes; returns how many."""
        return os.write(descriptor, data)

    def open(self, path: Path) -> int:
        """Descriptor of a file or folder that is there."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def fsync(self, descriptor: int) -> None:
        """Make a file's bytes, or the names inside a folder, survive a power cut."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Give a descriptor back."""
        os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Put a file or folder under another name; a file there is replaced."""
        source.replace(target)

    def symlink(self, path: Path, target: str) -> None:
        """A new symbolic link at ``path``."""
        path.symlink_to(target)

    def mkdir(self, path: Path) -> None:
        """A new folder."""
        path.mkdir(mode=0o755)

    def unlink(self, path: Path) -> None:
        """Remove a file or link."""
        path.unlink()

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()


_disk = Disk()


@contextlib.contextmanager
def using_disk(other: Disk) -> Iterator[None]:
    """Let every write of this process go through another disk: for tests of kills, power cuts and full disks."""
    global _disk  # noqa: PLW0603 - there is one disk a process, as there is one operating system
    before, _disk = _disk, other
    try:
        yield
    finally:
        _disk = before


def write_file(path: Path, data: bytes) -> str:
    """Write a file durably and atomically; returns its sha256. Raises StorageError; the old file is then intact."""
    with _told(path):
        make_folder(path.parent)
        temporary = _temporary_name(path)
        try:
            _write_new(temporary, data)
            _disk.rename(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)
    return hashlib.sha256(data).hexdigest()


def write_folder(path: Path, fill: Callable[[Path], None], commit: Callable[[dict[str, str]], bytes]) -> dict[str, str]:
    """Write a folder durably and atomically: ``fill`` a temporary one, sync every file, rename.

    Args:
        path: the folder to appear, which must not exist yet.
        fill: writes the files into the folder it is given.
        commit: from each file's digest to the content of ``manifest.json``, which is written inside, last.
    Returns: relative path of each file -> sha256.
    Raises: StorageError; nothing is then at ``path``.
    """
    with _told(path):
        make_folder(path.parent)
        temporary = _temporary_name(path)
        _disk.mkdir(temporary)
        try:
            fill(temporary)
            digests: dict[str, str] = {}
            for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
                digests[str(file.relative_to(temporary))] = hash_file(file)
                sync(file)
            _write_new(temporary / "manifest.json", commit(digests))
            for folder in sorted((p for p in temporary.rglob("*") if p.is_dir()), reverse=True):
                sync(folder)
            sync(temporary)
            _disk.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync(path.parent)
    return digests


def write_link(path: Path, target: str) -> None:
    """Point a symbolic link at a target beside it, durably and atomically: readers find the old or the new one."""
    with _told(path):
        temporary = _temporary_name(path)
        _disk.symlink(temporary, target)
        _disk.rename(temporary, path)
        sync(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, each name durable. Nothing happens where it is there."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with contextlib.suppress(FileExistsError):  # another process was faster
        _disk.mkdir(path)
    sync(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a committed folder: renamed first, so that no reader meets half of it."""
    with _told(path):
        doomed = path.with_name(f".{path.name}{REMOVED}")
        _remove_tree(doomed)
        _disk.rename(path, doomed)
        sync(path.parent)
        _remove_tree(doomed)


def remove_file(path: Path) -> None:
    """Remove a file, durably."""
    with _told(path):
        _disk.unlink(path)
        sync(path.parent)


def is_leftover(path: Path) -> bool:
    """Whether a name is one that a killed process may leave behind."""
    return path.name.startswith(".") and path.name.endswith((TEMPORARY, REMOVED))


def remove_leftovers(folder: Path) -> list[Path]:
    """Take away what killed processes left anywhere below a folder. Returns: what was removed.

    The caller holds the lock of the run: a temporary name of a living process would be taken too.
    """
    found = [p for p in sorted(folder.rglob(".*")) if is_leftover(p)]
    with _told(folder):
        for path in found:
            _remove_tree(path)
    return found


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make a file, or the names inside a folder, survive a power cut."""
    descriptor = _disk.open(path)
    try:
        _disk.fsync(descriptor)
    finally:
        _disk.close(descriptor)


def _write_new(path: Path, data: bytes) -> None:
    descriptor = _disk.create(path)
    try:
        rest = memoryview(data)
        while rest:
            written = _disk.write(descriptor, rest)
            if written <= 0:
                raise OSError(errno.EIO, "the disk took no byte")
            rest = rest[written:]
        _disk.fsync(descriptor)
    finally:
        _disk.close(descriptor)


def _remove_tree(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for child in sorted(path.iterdir()):
            _remove_tree(child)
        _disk.rmdir(path)
    elif path.exists() or path.is_symlink():
        _disk.unlink(path)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Say which file a failing disk could not take, and what to do."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError.of(error, path) from error
