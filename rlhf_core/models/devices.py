"""Which device, how many threads, which arithmetic."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.update_config import UpdateConfig

Result = TypeVar("Result")


def resolve_device(name: str) -> torch.device:
    """``auto`` takes cuda, then mps, then cpu. Raises UserError if the named device is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        found = ", ".join(device for device, there in available.items() if there)
        raise UserError(f"device is {name}, which this machine does not have; found: {found}")
    return torch.device(name)


def check_ranks(update: UpdateConfig, device: torch.device) -> None:
    """Raise UserError if a node has not what its ranks of an update need."""
    if update.is_launched and device.type not in ("cpu", "cuda"):
        raise UserError(
            f"execution.update.launcher is torchrun, but device is {device.type}: ranks compute on cpu or cuda; use "
            "execution.update.launcher inprocess"
        )
    if update.is_launched and device.type == "cuda" and update.nproc_per_node > torch.cuda.device_count():
        raise UserError(
            f"execution.update.nproc_per_node is {update.nproc_per_node}, but this machine has "
            f"{torch.cuda.device_count()} GPUs: at most one rank each"
        )


def resolve_num_threads(num_threads: int | None) -> int:
    """The configured number of CPU threads, or the cores this process may use."""
    return num_threads or usable_cores()


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def using_threads(num_threads: int) -> Iterator[None]:
    """Run with this many intra-op threads: results depend on the number, so every stage sets its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def beside(work: Callable[[], Result]) -> Iterator[Callable[[], Result]]:
    """Do something in a thread of its own beside the body, each on half of this thread's threads.

    Threads that meet after each operation lose more by waiting than those that meet at the end, and lose many times
    more where something else wants a core. With one thread the work is done after the body.

    Args:
        work: shares nothing with the body; sees the grad mode of the caller.
    Yields: what gives the result of the work, to be called after the body. It raises what the work has raised.
    """
    share = torch.get_num_threads() // 2
    if share == 0:
        yield work
        return
    with_grad = torch.is_grad_enabled()

    def alone() -> Result:
        torch.set_num_threads(share)
        with torch.set_grad_enabled(with_grad):
            return work()

    with using_threads(share), ThreadPoolExecutor(1) as other:
        yield other.submit(alone).result


@contextlib.contextmanager
def computing_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Autocast to bfloat16 where asked: float32 master weights, bfloat16 matrix products."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        yield
