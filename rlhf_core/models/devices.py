"""Which device, how many threads, which arithmetic."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator

import torch

from rlhf_core.contracts.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""


def resolve_device(name: str) -> torch.device:
    """``auto`` takes cuda, then mps, then cpu. Raises UserError if the named device is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        found = ", ".join(device for device, there in available.items() if there)
        raise UserError(f"device is {name}, which this machine does not have; found: {found}")
    return torch.device(name)


def resolve_num_threads(num_threads: int | None) -> int:
    """The configured number of CPU threads, or the cores this process may use."""
    return num_threads or len(os.sched_getaffinity(0))


@contextlib.contextmanager
def using_threads(num_threads: int) -> Iterator[None]:
    """Run with this many intra-op threads: results depend on the number, so every stage sets its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed for what is allocated next.

    By default it gives large blocks back and asks for them anew: some 40,000 page faults an iteration of the reviews,
    4 % of its time. Without glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, (1 << 31) - 1)):
            mallopt(option, value)


@contextlib.contextmanager
def computing_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Autocast to bfloat16 where asked: float32 master weights, bfloat16 matrix products."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        yield
