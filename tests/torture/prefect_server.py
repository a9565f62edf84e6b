"""A real Prefect server on loopback that can be killed and come back, and the ``rlhf`` command in forked children."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torture.runs import fork

START_S = 180.0
BUSY_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Pauses before it is asked again after a 503: its sqlite was locked."""


class PrefectServer:
    """One server with a database of its own, in ``home``."""

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home, self.port = home, free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The address of its API."""
        return f"http://127.0.0.1:{self.port}/api"

    def start(self) -> None:
        """Begin, or come back at the same address with the same database."""
        factory = ["--factory", "prefect.server.api.server:create_app", "--log-level", "error"]
        quiet = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_UI_ENABLED": "false", "DO_NOT_TRACK": "true"}
        hurried = {"PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY": "PT1S"}
        command = [sys.executable, "-m", "uvicorn", *factory, "--host", "127.0.0.1", "--port", str(self.port)]
        environment = {**os.environ, "PREFECT_HOME": str(self.home), **quiet, **hurried}
        with (self.home / "log").open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=log)

    def wait(self) -> None:
        """Until it answers. Raises RuntimeError if it never does."""
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                self.ask("/health")
                return
            time.sleep(0.05)
        raise RuntimeError(f"Prefect's server did not start:\n{(self.home / 'log').read_text()[-2000:]}")

    def send(self, number: int) -> None:
        """Give its process a signal: SIGSTOP lets it hang, SIGCONT ends that, SIGKILL ends it."""
        if self._process is not None:
            self._process.send_signal(number)
            if number == signal.SIGKILL:
                self._process.wait()

    def ask(self, path: str, body: Mapping[str, Any] | Sequence[Any] | None = None, method: str | None = None) -> Any:
        """The JSON that its API answers, if any. ``method``: default GET, or POST of a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        for pause_s in (*BUSY_S, None):
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return json.loads(answer.read() or b"null")
            except urllib.error.HTTPError as error:
                if error.code != 503 or pause_s is None:
                    raise
                time.sleep(pause_s)
        raise AssertionError("the last turn returns or raises")

    def state(self, flow_run_id: str) -> str:
        """The state of a flow run, as COMPLETED."""
        return self.ask(f"/flow_runs/{flow_run_id}")["state_type"]


@contextlib.contextmanager
def prefect_server(home: Path) -> Iterator[PrefectServer]:
    """A server that answers."""
    server = PrefectServer(home)
    try:
        server.start()
        server.wait()
        yield server
    finally:
        server.send(signal.SIGKILL)


def free_port() -> int:
    """A port of loopback that nobody uses at this moment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def rlhf(arguments: Sequence[str], *, api: str | None, log: Path, slow_s: float = 0.0) -> int:
    """Begin a command in a forked child, which ends as a process of its own would; returns its pid.

    Args:
        arguments: as typed.
        api: PREFECT_API_URL, or None for a temporary server.
        log: what it prints.
        slow_s: seconds that each stage takes longer.
    """

    def work() -> None:
        atexit._clear()  # what the parent wanted at its own end
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = _command(arguments, api, slow_s)
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)

    return fork(work, log=log.with_suffix(".error"))


def _command(arguments: Sequence[str], api: str | None, slow_s: float) -> int:
    from flows import cli
    from flows.commands.options import prepare_environment

    os.environ.pop("PREFECT_API_URL", None)
    if api is not None:
        os.environ["PREFECT_API_URL"] = api
    prepare_environment()
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()
    from tasks.session.session import open_session

    open_session.cache_clear()
    if slow_s:
        from flows.displays.terminal import TerminalWatcher

        shown = TerminalWatcher.stage_started

        def slowly(self: TerminalWatcher, iteration: int, stage: str) -> None:
            time.sleep(slow_s)
            shown(self, iteration, stage)

        TerminalWatcher.stage_started = slowly
    sys.argv = ["rlhf", *arguments]
    try:
        cli.main()  # without arguments, as the process itself begins: it may end the process
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 1
