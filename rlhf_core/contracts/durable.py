"""How anything gets onto a disk: durably, atomically, and through one door.

A write is: temporary file in the same folder -> write -> fsync -> sha256 -> rename -> fsync of the folder. What a
reader finds under a name is whole; what a function here has returned from survives a power cut. A failed fsync is
never repeated on the same file: the temporary one is dropped, and another try writes a new one.

Temporary names are ``.<name>.<random>.tmp``; a folder on its way out is ``.<name>.removed``. Readers ignore both,
and :func:`remove_leftovers` takes them away. A killed process may also leave a name that is visible, but would not
survive a power cut: whoever takes a folder over calls :func:`settle` before he builds on what he sees.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Collection, Iterator
from io import BufferedReader
from pathlib import Path

from rlhf_core.contracts.bounds import SPARE_BYTES, free_bytes
from rlhf_core.contracts.errors import IntegrityError, StorageError

TEMPORARY = ".tmp"
REMOVED = ".removed"
LONGEST_NAME = 200
"""Bytes of a name that stand in its temporary name: a disk takes 255."""


class Disk:
    """The calls that reach a disk, one method each. Tests put a failing or a recording one in its place."""

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

    def adopt(self, path: Path) -> None:
        """Take note of what another process has put there, by a disk of its own: nothing to do here."""

    def unlink(self, path: Path) -> None:
        """Remove a file or link."""
        path.unlink()

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()

    def lock(self, path: Path) -> int:
        """Descriptor of a file to lock, made if need be; never through a link."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)

    def reader(self, path: Path) -> BufferedReader:
        """A file, open for reading; never a pipe or a device, which might have no end."""
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise IntegrityError(f"{path} is no file, but a folder, a pipe or a device; remove it")
        return os.fdopen(descriptor, "rb")


_disk = Disk()
_fences: dict[Path, Callable[[], None]] = {}


@contextlib.contextmanager
def using_disk(other: Disk) -> Iterator[None]:
    """Let every write of this process go through another disk: for tests of kills, power cuts and full disks."""
    global _disk  # noqa: PLW0603 - there is one disk a process, as there is one operating system
    before, _disk = _disk, other
    try:
        yield
    finally:
        _disk = before


@contextlib.contextmanager
def fenced(folder: Path, check: Callable[[], None]) -> Iterator[None]:
    """Ask before every change below a folder whether this process may still make it.

    Args:
        folder: that this process holds.
        check: raises if another process has taken it over.
    """
    folder = folder.absolute()
    _fences[folder] = check
    try:
        yield
    finally:
        _fences.pop(folder, None)


def _ask_fences(path: Path) -> None:
    if _fences:
        path = path.absolute()
        for folder in [path, *path.parents]:
            if (check := _fences.get(folder)) is not None:
                check()


def write_file(path: Path, data: bytes) -> str:
    """Write a file durably and atomically; returns its sha256.

    Raises: StorageError; the old file is then there, or the new one if only its name could not be made durable.
    """
    with _told(path):
        make_folder(path.parent)
        temporary = _temporary_name(path)
        try:
            _write_new(temporary, data)
            _ask_fences(path)
            _disk.rename(temporary, path)
        except BaseException:
            _drop(temporary)
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
        mode = temporary.stat().st_mode & 0o666  # as the umask wants it: safetensors makes its files private
        try:
            _filled(fill, temporary)
            digests: dict[str, str] = {}
            for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
                file.chmod(mode)
                sync(file)
                digests[str(file.relative_to(temporary))] = hash_file(file)
            _write_new(temporary / "manifest.json", commit(digests))
            for folder in sorted((p for p in temporary.rglob("*") if p.is_dir()), reverse=True):
                sync(folder)
            sync(temporary)
            _ask_fences(path)
            _disk.rename(temporary, path)
        except BaseException:
            _drop(temporary)
            raise
        sync(path.parent)
    return digests


def write_link(path: Path, target: str) -> None:
    """Point a symbolic link at a target beside it, durably and atomically: readers find the old or the new one."""
    with _told(path):
        temporary = _temporary_name(path)
        try:
            _disk.symlink(temporary, target)
            _disk.rename(temporary, path)
        except BaseException:
            _drop(temporary)
            raise
        sync(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, each name durable. Nothing happens where it is there."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with _told(path):
        with contextlib.suppress(FileExistsError):  # another process was faster
            _disk.mkdir(path)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file or a dangling link has its name")
        sync(path.parent)


def move(path: Path, target: Path) -> None:
    """Put a file or folder somewhere else on the same disk, durably. What is at ``target`` is replaced."""
    with _told(path, "moved"):
        make_folder(target.parent)
        _disk.rename(path, target)
        sync(target.parent)
        sync(path.parent)


def adopt(path: Path) -> None:
    """Take over a file or folder that another process of this run has just written, as if it were written here."""
    with _told(path):
        _disk.adopt(path)


def remove_folder(path: Path) -> None:
    """Remove a committed folder: renamed first, so that no reader meets half of it."""
    with _told(path, "removed"):
        doomed = path.with_name(f".{_short(path.name)}{REMOVED}")
        _remove_tree(doomed)
        _disk.rename(path, doomed)
        sync(path.parent)
        _remove_tree(doomed)


def remove_file(path: Path) -> None:
    """Remove a file, durably."""
    with _told(path, "removed"):
        _disk.unlink(path)
        sync(path.parent)


def is_leftover(path: Path) -> bool:
    """Whether a name is one that a killed process may leave behind."""
    return path.name.startswith(".") and path.name.endswith((TEMPORARY, REMOVED))


def remove_leftovers(folder: Path, *, deep: bool = True) -> list[Path]:
    """Take away what killed processes left in a folder, and in those below it if ``deep``. Returns: what was removed.

    The caller holds the lock of the run: a temporary name of a living process would be taken too.
    """
    found = [p for p in sorted(folder.rglob(".*") if deep else folder.glob(".*")) if is_leftover(p)]
    with _told(folder, "cleaned"):
        for path in found:
            _remove_tree(path)
    return found


def open_lock(path: Path) -> int:
    """Descriptor of a file to lock, made if need be. Raises StorageError, also if it is a link."""
    with _told(path):
        return _disk.lock(path)


def settle(folder: Path, *, links: Collection[str] = ()) -> None:
    """Take over a folder that another process wrote: make the names in it durable, and refuse links.

    What a killed process had renamed but not synced is visible, and a commit that builds on it would outlive it in a
    power cut. Iterations are synced as they end, so of numbered folders the newest one is enough.

    Args:
        folder: of a run; the caller holds its lock.
        links: relative paths that may be links, to a name beside them.
    Raises:
        IntegrityError: another link, through which a write would leave the folder.
        StorageError: the disk fails.
    """
    with _told(folder, "read"):
        for path, is_link in _below(folder):
            if is_link and not (str(path.relative_to(folder)) in links and len(path.readlink().parts) == 1):
                raise IntegrityError(
                    f"{path} is a link: a run folder holds none, since a write could leave it; remove it"
                )
    with _told(folder):
        rooms = [p for p in sorted(folder.iterdir()) if p.is_dir()]
        newest = [max(numbered) for room in rooms if (numbered := [p for p in room.iterdir() if p.name.isdecimal()])]
        for path in [*newest, *rooms, folder]:
            sync(path)
        with contextlib.suppress(PermissionError):  # others' folder around it: then it was made durable by them
            sync(folder.parent)


def read_file(path: Path, limit: int | None = None) -> bytes:
    """The bytes of a file.

    Args:
        path: of the file.
        limit: bytes that it may have, as a file that is mostly a hole claims any number; default: the free memory.
    Raises: FileNotFoundError; IntegrityError if it is larger; StorageError if the disk does not give them.
    """
    with _told(path, "read"), _disk.reader(path) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise IntegrityError(f"{path} has {size} bytes; at most {limit} are ever written there")
        if size > SPARE_BYTES and size > free_bytes():
            raise StorageError(f"{path} has {size} bytes, more than the memory that is free; close other programs")
        return file.read()


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex. Raises FileNotFoundError, or StorageError if the disk does not give them."""
    with _told(path, "read"), _disk.reader(path) as file:
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


def _drop(temporary: Path) -> None:
    """Take a temporary name away after a failure, if the disk still does that: another one is told already."""
    with contextlib.suppress(OSError):
        _remove_tree(temporary)


def _filled(fill: Callable[[Path], None], folder: Path) -> None:
    """Let a library write its files; those in Rust name the operating system's error only in their text."""
    try:
        fill(folder)
    except OSError:
        raise
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


def _below(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Everything below a folder, and whether it is a link; links are not followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            yield Path(entry.path), entry.is_symlink()
            if entry.is_dir(follow_symlinks=False):
                yield from _below(Path(entry.path))


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{_short(path.name)}.{secrets.token_hex(4)}{TEMPORARY}")


def _short(name: str) -> str:
    return name.encode()[:LONGEST_NAME].decode(errors="ignore")


@contextlib.contextmanager
def _told(path: Path, action: str = "written") -> Iterator[None]:
    """Say which file a failing disk could not take or give, and what to do; or that another process holds it now."""
    changes = action != "read"
    if changes:
        _ask_fences(path)
    try:
        yield
    except FileNotFoundError as error:
        if not changes:
            raise
        _ask_fences(path)  # which has removed what this one was writing
        raise StorageError.of(error, path, action) from error
    except OSError as error:
        raise StorageError.of(error, path, action) from error
