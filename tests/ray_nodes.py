"""A Ray cluster on this machine whose nodes can be killed: each node is processes of its own."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
START_S = 60.0
AUTHENTICATION = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
"""What nodes and whoever joins them have in their environment; by default Ray writes a token into the home folder."""
SOON_MISSED = {"RAY_health_check_period_ms": "500", "RAY_health_check_timeout_ms": "1000"}
"""A node that is gone is dead within some seconds instead of thirty."""


class RayNodes:
    """A head, and nodes of one CPU and one shelf each.

    Args:
        count: of nodes beside the head.
        folder: for what they have to say.
        head_cpus: what the head computes with.
        environment: what the so-manieth node finds in its environment beside what is there; the head is the first.
    """

    def __init__(
        self,
        count: int,
        folder: Path,
        head_cpus: int = 0,
        environment: Callable[[int], Mapping[str, str]] = lambda _number: {},
    ) -> None:
        self._folder, self._number, self._environment = folder, 0, environment
        self.address = f"127.0.0.1:{_free_port()}"
        port = self.address.split(":")[1]
        self._head = self._start("--head", f"--port={port}", "--include-dashboard=false", f"--num-cpus={head_cpus}")
        self.nodes: list[subprocess.Popen[bytes]] = []
        try:
            self._until_started(self._head)
            for _ in range(count):  # two that begin at once find each other's sockets
                self.nodes.append(self.add())
                self._until_started(self.nodes[-1])
        except BaseException:
            self.close()
            raise

    def add(self) -> subprocess.Popen[bytes]:
        """One more node, which is there in some seconds."""
        return self._start(f"--address={self.address}", "--num-cpus=1", f"--resources={json.dumps({'shelf': 1})}")

    def replace_one(self) -> None:
        """Kill the oldest node with all that runs there, as a power cut does; another one takes its place."""
        _kill(self.nodes.pop(0))
        self.nodes.append(self.add())

    def settle(self) -> None:
        """Wait until the newest node is there."""
        self._until_started(self.nodes[-1])

    def close(self) -> None:
        """End all of it."""
        for node in (*self.nodes, self._head):
            _kill(node)

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        self._number += 1
        command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", *options, "--block"]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
            **AUTHENTICATION,
            **SOON_MISSED,
            **self._environment(self._number),
        }
        with self._log(self._number).open("wb") as said:
            return subprocess.Popen(
                [*command, "--object-store-memory=80000000", "--disable-usage-stats"],
                env=environment,
                cwd=self._folder,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _until_started(self, node: subprocess.Popen[bytes]) -> None:
        log, until = self._log(self._number), time.monotonic() + START_S
        while "Ray runtime started" not in (said := log.read_text()):
            if node.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"a Ray node did not start:\n{said}")
            time.sleep(0.1)

    def _log(self, number: int) -> Path:
        return self._folder / f"node-{number}.log"


def _kill(node: subprocess.Popen[bytes]) -> None:
    """It and whatever it has started: workers are in groups of their own, and end with their node."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    node.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
