"""Mounts of our own, where the machine allows them to anybody: in a user namespace of one process."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000
READ_ONLY, REMOUNT = 1, 32


def enter_namespace() -> None:
    """Give this process, which is a forked child of one thread, mounts of its own. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEW_USER | NEW_MOUNTS):
        code = ctypes.get_errno()
        raise OSError(code, f"no user namespace here: {os.strerror(code)}")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def mount_tmpfs(folder: Path, options: str, *, remount: bool = False, read_only: bool = False) -> None:
    """Put a file system in memory on a folder, or change the one that is there. Raises OSError."""
    flags = (REMOUNT if remount else 0) | (READ_ONLY if read_only else 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", flags, options.encode()):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(folder))
