"""What a process does that data must never make it do, seen by Python's own audit events."""

# ruff: noqa: PTH110, PTH112, PTH115, PTH117, PTH118 - an audit hook takes the shortest way

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NEVER = frozenset(
    {
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.startfile",
        "pty.spawn",
        "pickle.find_class",
        "socket.connect",
        "socket.bind",
        "socket.sendto",
        "socket.sendmsg",
        "socket.getaddrinfo",
        "socket.gethostbyname",
        "urllib.Request",
        "webbrowser.open",
        "ftplib.connect",
        "smtplib.connect",
        "ctypes.dlopen",
        "code.interact",
        "builtins.input",
    }
)
CHANGES = frozenset(
    {
        "os.remove",
        "os.rename",
        "os.mkdir",
        "os.rmdir",
        "os.symlink",
        "os.link",
        "os.truncate",
        "os.chmod",
        "os.chown",
        "os.utime",
        "shutil.rmtree",
        "shutil.move",
        "shutil.copyfile",
        "shutil.make_archive",
        "shutil.unpack_archive",
    }
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MARK = "evil"
"""Every module, class and repository of a payload bears it."""


def watch(
    tell: Callable[[str], None], *, foreign: Path, writable: Sequence[Path], commands: Sequence[Sequence[str]] = ()
) -> None:
    """Tell of every event that data must not cause; for the rest of this process's life.

    Args:
        tell: is given one line an event. It must not open, import or start anything.
        foreign: where the payloads lie: code from there must not be compiled, run or loaded.
        writable: the only folders that may be written.
        commands: how the commands begin that this project itself may start.
    """
    home = os.path.realpath(foreign)
    allowed = tuple(os.path.realpath(folder) for folder in writable)
    busy = False

    def inside(path: object, folders: Sequence[str], base: str = "") -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        real = os.path.realpath(os.path.join(base, os.fsdecode(path)))
        return any(real == folder or real.startswith(folder + os.sep) for folder in folders)

    def fault(event: str, args: tuple[Any, ...]) -> bool:
        if event == "subprocess.Popen":
            return not any(list(args[1])[: len(start)] == list(start) for start in commands)
        if event in {"import", "exec", "compile"}:
            origin = args[0] if event == "import" else args[1] if event == "compile" else args[0].co_filename
            file = origin if event != "import" else args[1]
            is_file = isinstance(file, str) and (
                os.path.isabs(file) or os.path.exists(file)
            )  # not "<string>" of the working folder
            return MARK in str(origin) or (is_file and inside(file, [home]))
        if event == "open":
            path, flags = args[0], args[2] or 0
            writes = isinstance(path, str | bytes) and flags & WRITING
            return bool(writes) and not inside(path, allowed) and path != os.devnull
        if event in CHANGES:
            descriptors = [a for a in args if isinstance(a, int) and a > 2 and os.path.isdir(f"/proc/self/fd/{a}")]
            base = os.readlink(f"/proc/self/fd/{descriptors[0]}") if descriptors else ""
            return isinstance(args[0], str | bytes) and not inside(args[0], allowed, base)
        return event in NEVER

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal busy
        if busy or event not in KNOWN:
            return
        busy = True
        try:
            if fault(event, args):
                shown = getattr(args[0], "co_filename", args[0]) if args else ""
                tell(f"{event} {shown!r} {[str(a)[:80] for a in args[1:3]]}")
        finally:
            busy = False

    sys.addaudithook(hook)


KNOWN = NEVER | CHANGES | {"subprocess.Popen", "import", "exec", "compile", "open"}
