"""How much memory a file of somebody else may take: a few kilobytes can describe or unpack to any number of bytes."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

SPARE_BYTES: Final = 1 << 30
"""What reading anything may take, however small it is."""
_SHARE: Final = 0.9
"""Of the memory that is free."""
_LARGE: Final = 1 << 26
_DENSE: Final = 50
"""A disk may pack a file, but hardly to less than one part in so many."""
_guard = threading.RLock()


@contextlib.contextmanager
def at_most(num_bytes: int) -> Iterator[None]:
    """Let this process take at most so many bytes more, and no more than there are; then MemoryError is raised.

    It holds for all threads of the process meanwhile. Nothing happens where the system does not tell sizes.
    """
    with _guard:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        now = _mapped()
        limit = now + int(min(num_bytes, free_bytes() * _SHARE))
        if not now or (soft != resource.RLIM_INFINITY and soft <= limit):
            yield
            return
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def for_file(size: int, factor: int = 32) -> int:
    """Bytes that a file of this size may take once it is read: Python's objects are larger than their text."""
    return SPARE_BYTES + factor * size


def check_is_full(path: Path) -> int:
    """The size of a file that will be read whole. Raises ValueError for a hole, or more than there is memory for."""
    about = path.stat()
    if about.st_size > _LARGE and about.st_blocks * 512 * _DENSE < about.st_size:
        raise ValueError(f"it has {about.st_size} bytes, nearly all of them a hole in the file; take the file itself")
    if about.st_size > _LARGE and 2 * about.st_size > free_bytes():
        raise ValueError(
            f"it has {about.st_size} bytes, and half of the free memory does not hold them; take fewer rows"
        )
    return about.st_size


def free_bytes() -> float:
    """Memory that is free, on the machine and in this process's control group; infinity where nobody tells."""
    free = [float("inf")]
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(float(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        used = float((group / "memory.current").read_text())
        cache = next(line for line in (group / "memory.stat").read_text().splitlines() if line.startswith("file "))
        free.append(float((group / "memory.max").read_text()) - used + float(cache.split()[1]))
    return max(0.0, min(free))


def _mapped() -> int:
    """Bytes of this process's address space; 0 where nobody tells."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
