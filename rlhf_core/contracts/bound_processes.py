"""Child processes that end when this process does, however it ends: kill -9 and the OOM killer too.

Linux signals a child when its parent dies (``PR_SET_PDEATHSIG``), and takes for the parent the *thread* that has
started it. So a child that must outlive the calling thread, but not the process, is started by a thread that lasts as
long as the process does. Elsewhere than on Linux, nothing is bound.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

BOUND_PID = "RLHF_BOUND_PID"
"""Environment variable of a bound process, and of its children: the PID of the bound process."""
_PR_SET_PDEATHSIG = 1
_PRELUDE = f"""\
import ctypes, os, sys
prctl = getattr(ctypes.CDLL(None), "prctl", None)
if prctl is not None:
    prctl({_PR_SET_PDEATHSIG}, int(sys.argv[2]))
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.environ[{BOUND_PID!r}] = str(os.getpid())
os.execvp(sys.argv[3], sys.argv[3:])
"""
"""Binds its life to its parent's, then becomes the command. (Between fork and exec, threads would be a risk.)"""


def bound(command: Sequence[str], number: int = signal.SIGKILL) -> list[str]:
    """Return a command that is ended when the thread that starts it ends.

    Args:
        command: program and arguments.
        number: the signal that it gets.
    """
    return [sys.executable, "-I", "-S", "-c", _PRELUDE, str(os.getpid()), str(int(number)), *command]


def start_bound(command: Sequence[str], number: int = signal.SIGKILL, **options: Any) -> subprocess.Popen[Any]:
    """Start a process that is ended when this process ends, whichever thread calls.

    Args:
        command: program and arguments.
        number: the signal that it gets.
        options: of :class:`subprocess.Popen`.
    Raises: as :class:`subprocess.Popen`.
    """
    started: Future[subprocess.Popen[Any]] = Future()
    _requests().put((started, bound(command, number), options))
    try:
        return started.result()
    except BaseException:  # interrupted, most likely: nobody will ever know the process
        started.add_done_callback(_end_unclaimed)
        raise


def end_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Let this process be ended when its parent is; end it now if that has happened already.

    Args:
        parent: PID that the parent has, or had.
        number: the signal that this process gets. The parent's thread that has started it must last.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:
        os._exit(1)


_asked: tuple[int, queue.SimpleQueue[Any]] | None = None
_lock = threading.Lock()


def _requests() -> queue.SimpleQueue[Any]:
    """The queue of this process's starting thread; a fork has its parent's variables, and not its threads."""
    global _asked  # noqa: PLW0603 - one starting thread a process
    with _lock:
        if _asked is None or _asked[0] != os.getpid():
            _asked = (os.getpid(), queue.SimpleQueue())
            threading.Thread(
                target=_start_what_is_asked, args=(_asked[1],), name="starts children", daemon=True
            ).start()
        return _asked[1]


def _start_what_is_asked(asked: queue.SimpleQueue[Any]) -> None:
    while True:
        started, command, options = asked.get()
        try:
            started.set_result(subprocess.Popen(command, **options))
        except BaseException as error:  # it is the caller's
            started.set_exception(error)


def _end_unclaimed(started: Future[subprocess.Popen[Any]]) -> None:
    if started.exception() is None:
        with contextlib.suppress(OSError):
            started.result().kill()
            started.result().wait()
