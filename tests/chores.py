"""What workers are told to do in their tests: functions that another process can import."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def note(path: Path) -> None:
    """Say who has done it, and whether Prefect is there."""
    import ray

    path.write_text(f"{ray.get_runtime_context().get_node_id()} {os.getpid()} {'prefect' in sys.modules}")
    time.sleep(0.2)


def write_down(path: Path) -> None:
    """Say that it was done."""
    path.write_text(str(os.getpid()))


def die_once(path: Path) -> None:
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    path.write_text("done")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(error: Exception) -> None:
    raise error
