"""What Prefect shows of a flow run that a signal ends, while its server is busy or the way out goes wrong.

Each case is a process of its own, which ends as a command does: threads that are still telling something end with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

ROOT = Path(__file__).parents[2]
LIMIT_S = 5.0
COMMAND = """
import os, signal, sys, threading, time
import httpx
from prefect import flow
from flows import stopping
from flows.calling import flow_body, run_flow

where, busy, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
refused = 0
send = httpx.HTTPTransport.handle_request

def of_a_busy_server(transport, request):
    # as Prefect's server answers while another request holds its sqlite
    global refused
    if refused < busy and request.url.path.endswith("/set_state") and struck:
        refused += 1
        return httpx.Response(503, json={"exception_message": "Service Unavailable"}, request=request)
    return send(transport, request)

httpx.HTTPTransport.handle_request = of_a_busy_server
struck = []

def strike():
    struck.append(time.monotonic())
    os.kill(os.getpid(), number)
    time.sleep(60)

class Workers:
    # a pool whose processes are killed while calls wait for them
    def __enter__(self):
        return self
    def __exit__(self, *_):
        raise RuntimeError("A process in the process pool was terminated abruptly")

@flow(persist_result=False)
def work():
    from prefect.runtime import flow_run
    print("FLOW", flow_run.id, flush=True)
    with flow_body() as ended_with:
        if where == "body":
            strike()
        if where == "workers":
            with Workers():
                strike()
        return ended_with(1)

if where == "after":
    from prefect.flow_engine import FlowRunEngine
    FlowRunEngine.handle_success = lambda *_: strike()

stopping.ends_here()
code = 1
try:
    with stopping.watching_signals(until_the_end=True):
        stopping.on_stop(lambda: "stopped; the same command goes on")
        run_flow(work)
except BaseException as error:
    print("ENDED BY", type(error).__name__, flush=True)
    code = stopping.exit_code()
print(stopping.last_words(), flush=True)
print("TOOK", time.monotonic() - struck[0], flush=True)
stopping.end_in_time(code)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("where", "busy", "number", "state"),
    [
        ("body", 0, 2, "Cancelled"),
        ("body", 3, 2, "Cancelled"),
        ("body", 3, 15, "Crashed"),
        ("workers", 0, 2, "Cancelled"),
        ("workers", 3, 2, "Cancelled"),
        ("after", 3, 2, "Completed Crashed"),  # its engine may be the last to tell, of a crash
    ],
)
def test_prefect_is_told_of_a_signal(prefect_server: None, where: str, busy: int, number: int, state: str) -> None:
    """A server that refuses the first requests, as under load, leaves no flow run behind that seems to run."""
    said, code, took = _command(where, busy, number)
    flow_run_id = UUID(said.split("FLOW ")[1].split()[0])
    with get_client(sync_client=True) as client:
        found = client.read_flow_run(flow_run_id).state
    assert found is not None
    assert found.name in state.split(), said
    assert code == 128 + number, said
    assert took < LIMIT_S, said


def test_a_person_reads_that_prefect_was_not_told(prefect_server: None) -> None:
    """Where the server refuses until the time is over, nothing pretends otherwise."""
    said, code, took = _command("body", 1000, 2)
    with get_client(sync_client=True) as client:
        found = client.read_flow_run(UUID(said.split("FLOW ")[1].split()[0])).state
    assert found is not None
    assert found.is_running()
    assert "Prefect did not answer in time" in said
    assert code == 130
    assert took < LIMIT_S


def _command(where: str, busy: int, number: int) -> tuple[str, int, float]:
    """What it printed, its exit code, and seconds from the signal to its end."""
    environment = {**os.environ, "PREFECT_API_URL": str(PREFECT_API_URL.value()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMMAND, where, str(busy), str(number)]
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    lines: list[str] = []
    struck = time.monotonic()
    with subprocess.Popen(command, env=environment, **output) as child:
        assert child.stdout is not None
        for line in child.stdout:
            lines.append(line)
            if line.startswith("FLOW"):
                struck = time.monotonic()
        code = child.wait(timeout=120)
    return "".join(lines), code, time.monotonic() - struck
