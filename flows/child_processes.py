"""Processes that a command starts and ends: each leads a group of its own, and none outlives the command.

A child is told to end when its parent dies, however that happens (Linux: PR_SET_PDEATHSIG). What it prints goes to a
file: nobody has to empty a pipe, and its last lines can be shown.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from rlhf_core.contracts.bound_processes import start_bound
from rlhf_core.contracts.durable import make_folder
from rlhf_core.contracts.search_path import child_environment, settled
from rlhf_core.contracts.secrets import without_secrets

RLHF = (sys.executable, "-P", "-c", "from flows.cli import main; main()")
"""The ``rlhf`` command of this very installation; -P, so that no folder here is taken for one of its packages."""
END_S = 2.8
"""How long children may take to end by themselves: less than ``flows.stopping`` gives this process."""
REAP_S = 0.4
POLL_S = 0.05
LAST_BYTES = 8192


class Child:
    """A process that was started here.

    Args:
        command: program and arguments; the program as a path.
        log: file that gets what it prints, after what is there.
        environment: of the process; default: this one's.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        make_folder(log.parent)
        with log.open("ab") as output:
            self._begins_at = output.tell()
            self._process = start_bound(
                command,
                signal.SIGTERM,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=child_environment() if environment is None else settled(environment),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the process, which is that of its group."""
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit code, as a shell has it (130 for a Ctrl-C that nobody caught); None while it runs."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def send(self, number: int) -> None:
        """A signal to all of its group; nothing happens if it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def reap(self) -> None:
        """Wait for the end of what was killed, which takes no time unless a disk hangs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(REAP_S)

    def last_lines(self, limit: int) -> list[str]:
        """What it has printed last, without secrets."""
        with self.log.open("rb") as said:
            size = said.seek(0, os.SEEK_END)
            said.seek(max(self._begins_at, size - LAST_BYTES))
            lines = said.read().decode(errors="replace").splitlines()
        return [without_secrets(line.rstrip()) for line in lines if line.strip()][-limit:]


def end(children: Collection[Child], number: int = signal.SIGTERM, *, grace_s: float = END_S) -> None:
    """Tell children to end, wait for them a bounded time, then end what is left of their groups.

    Args:
        children: those that have ended already are passed over, but not what they have left running.
        number: the signal that asks them.
        grace_s: seconds until SIGKILL.
    """
    until = time.monotonic() + grace_s
    try:
        for child in children:
            child.send(number)
        while any(child.poll() is None for child in children) and time.monotonic() < until:
            time.sleep(POLL_S)
    finally:
        for child in children:
            child.send(signal.SIGKILL)
        for child in children:
            child.reap()
