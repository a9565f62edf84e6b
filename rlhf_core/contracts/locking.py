"""One process at a time: locks on files, which the system lets go when their process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from rlhf_core.contracts.durable import open_lock
from rlhf_core.contracts.errors import RunLockedError

ASKING_S = 0.02
"""Far longer than it takes to ask whether a lock is held."""
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
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        elif not (_take(descriptor) or _take_again(descriptor)):
            raise RunLockedError(f"another process is working on {what}; wait for it, or stop it")
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
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def note_elsewhere(path: Path, is_it: bool) -> None:
    """Say that a process of another machine holds what this lock stands for, or does no more."""
    (_held_elsewhere.add if is_it else _held_elsewhere.discard)(path)


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _take_again(descriptor: int) -> bool:
    """Once more, after whoever was only asking (:func:`is_held`) has let go."""
    time.sleep(ASKING_S)
    return _take(descriptor)
