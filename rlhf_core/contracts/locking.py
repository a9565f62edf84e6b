"""One process at a time: locks on files, which the system lets go when their process ends, however it ends.

Some disks have no locks (Lustre without ``-o flock``, some NFS and FUSE: ENOSYS, ENOLCK). There a file
``<lock>.held`` names the process that holds it. One of a process that has ended, on this machine and since its last
start, is taken over; another machine's is not, since nobody here can know.

Other disks lock each machine for itself (NFS with ``local_lock``, some FUSE), or forget the locks of a machine that
they have lost. There the same file is a fence: whoever is given the lock puts a name there, and whoever finds another
one there before a write has lost the folder, and stops.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, cast

from rlhf_core.contracts.durable import fenced, open_lock
from rlhf_core.contracts.errors import RunLockedError, StorageError

logger = logging.getLogger(__name__)

ASKING_S = 0.02
"""Far longer than it takes to ask whether a lock is held."""
HELD: Final = ".held"
"""Behind a lock's name: the file that stands for it where the disk has no locks."""
_NO_LOCKS: Final = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_SETTLE_S: Final = 0.2
"""How long a lock that was taken over is watched before it is believed."""
_MAX_BYTES: Final = 4096
_held_elsewhere: set[Path] = set()


@contextlib.contextmanager
def holding(path: Path, what: str, *, waits: bool = False) -> Iterator[None]:
    """Hold a lock for this process.

    Args:
        path: of its file, made if need be; its folder exists.
        what: it stands for, as a refusal names it.
        waits: until nobody else holds it.
    Raises: RunLockedError at once if another process holds it.
    """
    descriptor = open_lock(path)
    try:
        if waits:
            has_locks = _flock(descriptor, fcntl.LOCK_EX) is not None
        else:
            taken = _take(descriptor)
            if taken is False:
                time.sleep(ASKING_S)  # once more, after whoever was only asking (:func:`is_held`) has let go
                taken = _take(descriptor)
            if taken is False:
                raise RunLockedError(f"another process is working on {what}; wait for it, or stop it")
            has_locks = taken is not None
        if has_locks:
            with _noted(path, what) if is_lock(path) else contextlib.nullcontext():
                yield
            return
        with _holding_file(path.with_name(path.name + HELD), what, waits=waits):
            yield
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether a process holds the lock, also one of another machine that is known to."""
    if path in _held_elsewhere:
        return True
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # no process has ever held it, or it cannot be asked
        return False
    try:
        free = _flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)
    if free is None:
        holder = _holder(path.with_name(path.name + HELD))
        return holder is not None and not _has_ended(holder)
    return not free


def note_elsewhere(path: Path, is_it: bool) -> None:
    """Say that a process of another machine holds what this lock stands for, or does no more."""
    (_held_elsewhere.add if is_it else _held_elsewhere.discard)(path)


def is_lock(path: Path) -> bool:
    """Whether a file of a folder is its lock, or stands for it."""
    return path.name in ("lock", f"lock{HELD}")


def _take(descriptor: int) -> bool | None:
    return _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _flock(descriptor: int, how: int) -> bool | None:
    """Whether the lock was given; None where the disk has none."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


@contextlib.contextmanager
def _noted(lock: Path, what: str) -> Iterator[None]:
    """Put this process's name beside a lock that it was given, in the place of any other one."""
    path, mine = lock.with_name(lock.name + HELD), _this_process() | {"token": secrets.token_hex(8)}
    before, whole = _holder(path), path.with_name(f".{path.name}.{mine['token']}.tmp")
    try:
        whole.write_text(json.dumps(mine))
        whole.replace(path)
    except OSError:  # a disk that is full or not ours to write: the lock alone has to do
        with contextlib.suppress(OSError):
            whole.unlink(missing_ok=True)
        yield
        return
    if before and before.get("boot") != mine["boot"] and not _has_ended(before):
        logger.warning(
            "process %s of %r was working on %s, and its disk has given the lock to this one: the other one stops at "
            "its next write, if it is still at work",
            before.get("pid"), str(before.get("host"))[:80], what,
        )  # fmt: skip
    with _until_lost(path, mine, what):
        yield


@contextlib.contextmanager
def _until_lost(path: Path, mine: dict[str, Any], what: str) -> Iterator[None]:
    """Refuse every write below the folder once the file has another process's name, or is gone; remove it at the end.

    Raises: RunLockedError, in whoever writes.
    """

    def check() -> None:
        if (holder := _holder(path)) not in (mine, {}):  # {}: the disk does not give it just now
            by = f"process {holder.get('pid')} of {str(holder.get('host'))[:80]!r}" if holder else "another process"
            raise RunLockedError(
                f"{by} has taken over {what}, which this process was working on: this one stops, and has changed "
                f"nothing since; if that is not what you want, stop the other one and resume here"
            )

    try:
        with fenced(path.parent, check):
            yield
    finally:
        if _holder(path) == mine:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _holding_file(path: Path, what: str, *, waits: bool) -> Iterator[None]:
    """Hold a lock by a file of that name, which appears whole and under one name only."""
    mine = _this_process() | {"token": secrets.token_hex(8)}
    while not (_appear(path, mine) or _take_over(path, mine)):
        holder = _holder(path)
        if holder is None:  # it was let go just now
            continue
        if not waits:
            raise RunLockedError(_refusal(path, holder, what))
        time.sleep(ASKING_S)
    with _until_lost(path, mine, what):
        yield


def _appear(path: Path, mine: dict[str, Any]) -> bool:
    """Give the lock's name to a file that is whole: a hard link is made or refused at once, on any disk."""
    whole = path.with_name(f".{path.name}.{mine['token']}.tmp")
    try:
        whole.write_text(json.dumps(mine))
        os.link(whole, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise StorageError(
            f"{path.parent} is on a disk that can neither lock files nor link them ({error.strerror}), so that two "
            "runs could work on it at once; choose another disk, or mount this one with locks (Lustre: -o flock)"
        ) from error
    finally:
        whole.unlink(missing_ok=True)
    return True


def _take_over(path: Path, mine: dict[str, Any]) -> bool:
    """Take the lock of a process that has ended. Whoever took it in the same moment is found out by looking again."""
    holder = _holder(path)
    if holder is None or not _has_ended(holder):
        return False
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return False
    if _holder(aside) != holder:  # another one was faster: give it back
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
        aside.unlink(missing_ok=True)
        return False
    aside.unlink(missing_ok=True)
    if not _appear(path, mine):
        return False
    time.sleep(_SETTLE_S)
    return _holder(path) == mine


def _refusal(path: Path, holder: dict[str, Any], what: str) -> str:
    if holder.get("host") == socket.gethostname():
        return f"another process ({holder.get('pid')}) is working on {what}; wait for it, or stop it"
    return (
        f"process {holder.get('pid')} of {str(holder.get('host'))[:80]!r} is working on {what}, whose disk has no "
        f"locks; wait for it, or stop it; if that machine is gone, remove {path}"
    )


def _holder(path: Path) -> dict[str, Any] | None:
    """Who holds it; None if nobody does. A file of another kind is held by nobody known."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            found = json.loads(file.read(_MAX_BYTES) or b"")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _has_ended(holder: dict[str, Any]) -> bool:
    """Whether it is known that this process has ended."""
    here = _this_process()
    if holder.get("machine") != here["machine"] or holder.get("host") != here["host"]:
        return False
    if holder.get("boot") != here["boot"]:
        return True
    pid = holder.get("pid")
    if holder.get("pids") != here["pids"] or not isinstance(pid, int):
        return False
    return _began(pid) != holder.get("began")


def _this_process() -> dict[str, Any]:
    pids = ""
    with contextlib.suppress(OSError):
        pids = str(Path("/proc/self/ns/pid").readlink())
    return {
        "host": socket.gethostname(),
        "machine": _text("/etc/machine-id"),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "pids": pids,
        "pid": os.getpid(),
        "began": _began(os.getpid()),
    }


def _began(pid: int) -> str:
    """When a process began, in ticks since the machine's start; empty if there is none."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()  # the name may hold spaces
    return fields[19] if len(fields) > 19 else ""


def _text(file: str) -> str:
    try:
        return Path(file).read_text().strip()
    except (OSError, ValueError):
        return ""
