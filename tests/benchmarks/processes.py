"""Measured processes: each of its own, with the same threads, watched for its memory through /proc (Linux)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.world import ROOT

LOOK_S = 0.1
"""Seconds between two looks at a process's memory."""
PRIVATE = ("PREFECT_API_URL", "PREFECT_API_KEY", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME")
"""What would send a measured run to somebody's server."""


@dataclass
class Ended:
    """A process that has ended well."""

    began: float
    """Clock time of its start, as file times are."""
    seconds: float = 0.0
    peak_bytes: int = 0
    """VmHWM of the process itself."""
    server_peak_bytes: int = 0
    """VmHWM of the temporary Prefect server, its child; 0 without one."""
    memory: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    """(clock time, resident bytes) of the process, all along."""


def environment(threads: int, home: str) -> dict[str, str]:
    """Of a measured process: so many threads, quiet, no network, a Prefect home of its own."""
    kept = {name: value for name, value in os.environ.items() if name not in PRIVATE}
    path = [str(ROOT), str(ROOT / "tests"), *kept.get("PYTHONPATH", "").split(os.pathsep)]
    return kept | {
        "PYTHONPATH": os.pathsep.join(part for part in path if part),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PREFECT_HOME": home,
        "DO_NOT_TRACK": "true",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "COLUMNS": "160",
    }


def measured(command: Sequence[str], *, threads: int, folder: Path) -> Ended:
    """Run a command to its end.

    Args:
        command: program and arguments.
        threads: of torch and OpenMP.
        folder: for its output.
    Raises: RuntimeError with the end of its output if it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rlhf-benchmarks-prefect-") as home, (folder / "output").open("wb") as out:
        ended, started = Ended(time.time()), time.perf_counter()
        with subprocess.Popen(
            command, env=environment(threads, home), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        ) as child:
            with _ended_with_us(child):
                _watch(child, ended)
            ended.seconds = time.perf_counter() - started
    if child.returncode:
        said = (folder / "output").read_text(errors="replace")[-3000:]
        raise RuntimeError(f"{' '.join(command[:4])} … ended with code {child.returncode}:\n{said}")
    return ended


def python(module: str, *arguments: object) -> list[str]:
    """The command of a module of this suite."""
    return [sys.executable, "-m", module, *(str(argument) for argument in arguments)]


def peak_bytes(pid: int | str = "self") -> int:
    """VmHWM of a process; 0 once it is gone."""
    return _memory(pid).get("VmHWM", 0)


def resident_bytes(pid: int | str = "self") -> int:
    """VmRSS of a process; 0 once it is gone."""
    return _memory(pid).get("VmRSS", 0)


@contextlib.contextmanager
def _ended_with_us(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """A suite that is stopped leaves nothing running."""
    try:
        yield
    except BaseException:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(15)
        child.kill()
        raise


def _watch(child: subprocess.Popen[bytes], ended: Ended) -> None:
    looks = 0
    while True:
        found = _memory(child.pid)
        if "VmRSS" in found:
            ended.memory.append((time.time(), found["VmRSS"]))
        ended.peak_bytes = max(ended.peak_bytes, found.get("VmHWM", 0))
        if looks % 10 == 0:
            servers = [peak_bytes(pid) for pid in _children(child.pid) if _is_prefect_server(pid)]
            ended.server_peak_bytes = max(ended.server_peak_bytes, sum(servers))
        looks += 1
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(LOOK_S)
            return


def _memory(pid: int | str) -> dict[str, int]:
    """VmRSS and VmHWM, bytes."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {
        (part := line.split())[0][:-1]: int(part[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))
    }


def _children(pid: int) -> list[int]:
    try:
        return [int(p) for task in Path(f"/proc/{pid}/task").glob("*/children") for p in task.read_text().split()]
    except OSError:
        return []


def _is_prefect_server(pid: int) -> bool:
    try:
        return b"prefect.server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
