"""SIGINT, SIGTERM and SIGKILL at seeded moments of a run, with everything that may stand in the way of a quick end.

One real Prefect server; the real command and the real flow. A reward service, an MLflow or a Prefect API that hangs,
a run that waits for a person, two stages side by side: the process ends in time, Prefect knows how, and resuming gives
the same run.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torture import proxy
from torture.battery import Effort, Outcome
from torture.prefect_server import PrefectServer, free_port, prefect_server, rlhf
from torture.runs import battery_config, fingerprint, in_child, start, start_or_go_on, warm

from flows.calling import without_prefect
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config, canonical_json
from rlhf_core.contracts.records import read_record
from rlhf_core.contracts.stage_graph import FILE_STEMS
from tasks.lifecycle.guards import accept_tripped
from tasks.tracking import outbox

NAME = "SIGTERM, SIGINT, and kill -9 as Prefect sees it"
GOAL = "200/200 exit <= 5 s, state right, same hash after"
EXIT_S = 5.0
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
STATES = {signal.SIGINT: ("CANCELLED", "CRASHED"), signal.SIGTERM: ("CRASHED",), signal.SIGKILL: ("CRASHED",)}
"""A Ctrl-C that comes while Prefect itself is at work, before or after the flow's body, is a crash to it."""
LONGEST_S = 90.0
START_S, BETWEEN_S = 1.0, 0.05
"""About the longest times until a run has begun, and between two of its files."""
MARKS = [
    ".",
    "run.json",
    "prefect.json",
    *(f"iterations/{i:06d}/{stem}.json" for i in range(3) for stem in FILE_STEMS.values()),
    "checkpoints/000002/manifest.json",
    "checkpoints/000003/manifest.json",
    "before_after.json",
]
"""A run's files in the order of their appearance; the first one stands for its start."""
SCORES = "iterations/000001/02_rollouts.json"
"""There, iteration 1 goes on to its two side-by-side stages."""
SERVICE = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        while Path(sys.argv[2]).exists():
            time.sleep(0.05)
        body = json.dumps({"scores": [len(text) / 10 for text in asked["responses"]]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:
            pass
    def log_message(self, *_):
        pass
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@dataclass(frozen=True)
class Case:
    """A signal, and where it strikes."""

    number: signal.Signals
    kind: str = "plain"
    """plain, process (an own interpreter), workers, busy (a server that refuses three requests of ten for the moment),
    reward, mlflow, paused, api (these hang), temporary, bare."""
    at: float = 0.5
    """As a share of a run's files, and as a share of the time to the next one; where something hangs: seconds of it."""

    @property
    def name(self) -> str:
        """For people and for folders."""
        return f"{self.number.name}-{self.kind}-{self.at:.6f}"


class Bench:
    """What all cases share: a server, a reward service, something that never answers, and the wanted hashes."""

    def __init__(self, effort: Effort, server: PrefectServer, service: int, silent: int, busy: int) -> None:
        self.folder, self.server, self.silent, self.busy = effort.folder, server, silent, busy
        (self.folder / "warm").mkdir()
        plain = battery_config(effort.tiny)
        warm(plain, self.folder / "warm")
        component = {"kind": "http", "name": "service", "url": f"http://127.0.0.1:{service}/score", "timeout_s": 60.0}
        reward = {"components": [component], "allowed_hosts": ["127.0.0.1"]}
        never = {"entropy_floor": {"threshold": 1e-9, "action": "pause"}}  # keeps more checkpoints than no guard does
        self.configs = {
            "plain": plain,
            "reward": battery_config(effort.tiny, {"reward": reward}),
            "paused": battery_config(effort.tiny, {"guards": never}),
            "workers": battery_config(effort.tiny, {"execution": {"num_shards": 2, "num_workers": 2}}),
        }
        self.wanted: dict[str, str] = {}
        for name, config in self.configs.items():
            run_dir = self.folder / f"wanted-{name}"
            if in_child(lambda c=config, r=run_dir: start(c, r), log=self.folder / "log"):
                raise RuntimeError((self.folder / "log").read_text())
            self.wanted[name] = fingerprint(run_dir)
        self.longest_s = 0.0

    def config(self, kind: str) -> RunConfig:
        """The config of a case."""
        tree = self.configs.get(kind, self.configs["plain"]).model_dump()
        if kind == "mlflow":
            tree["tracking"] |= {"enabled": True, "uri": f"http://127.0.0.1:{self.silent}"}
        if kind == "paused":
            tree["guards"]["entropy_floor"]["threshold"] = 1000.0
        return build_config(tree)

    def try_case(self, case: Case) -> str:
        """What is wrong with a case; empty if nothing is."""
        run_dir, log, hang = self.folder / case.name, self.folder / f"{case.name}.log", self.folder / "hang"
        config = self.config(case.kind)
        (self.folder / f"{case.name}.yaml").write_bytes(canonical_json(config.model_dump()))
        arguments = ["train", "--config", str(self.folder / f"{case.name}.yaml"), "--run-dir", str(run_dir)]
        others = {"temporary": None, "bare": _api(self.silent), "busy": _api(self.busy)}
        api = others.get(case.kind, self.server.url)
        if case.kind == "reward":
            hang.touch()
        begin = _process if case.kind == "process" else rlhf
        child = begin(arguments, api=api, log=log)
        try:
            took, code = self._strike(case, child, run_dir, log)
        finally:
            hang.unlink(missing_ok=True)
            if case.kind == "api":
                self.server.send(signal.SIGCONT)
        said = log.read_text() if log.is_file() else ""
        if code is None:
            return f"it was still there {LONGEST_S:.0f} s later"
        self.longest_s = max(self.longest_s, took)
        if took > EXIT_S:
            return f"it took {took:.1f} s to end"
        finished = code == 0 and "see the picture" in said
        if code != CODES[case.number] and not finished:
            return f"exit code {code}: {' / '.join(said.strip().splitlines()[-3:])}"
        if case.number != signal.SIGKILL and not finished and "stopped" not in said:
            return "nobody was told how to go on"
        return self._state(case, run_dir, finished=finished) or self._resumed(case, config, run_dir)

    def _strike(self, case: Case, child: int, run_dir: Path, log: Path) -> tuple[float, int | None]:
        """Wait for the moment, send the signal; (seconds until the end, exit code)."""
        if case.kind in ("reward", "api"):
            _await(run_dir / (SCORES if case.kind == "api" else "iterations/000000/04_ref_logprobs.json"), child)
            if case.kind == "api":
                self.server.send(signal.SIGSTOP)
            time.sleep(case.at)
        elif case.kind == "paused":
            until = time.monotonic() + LONGEST_S
            while not (log.is_file() and "the run is paused" in log.read_text()) and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(case.at)
        else:
            which, rest = divmod(case.at * len(MARKS), 1)
            _await(run_dir / MARKS[int(which)], child)
            time.sleep(rest * (START_S if MARKS[int(which)] == "." else BETWEEN_S))
        began = time.monotonic()
        try:
            os.kill(child, case.number)
        except ProcessLookupError:
            return 0.0, None
        code = _wait(child)
        return time.monotonic() - began, code

    def _state(self, case: Case, run_dir: Path, *, finished: bool) -> str:
        """What is wrong with what Prefect says of the flow run."""
        record = run_dir / "prefect.json"
        if not record.is_file() or case.kind in ("temporary", "bare", "api"):
            return ""
        flow_run_id, wanted = read_record(record)["flow_run_id"], () if finished else STATES[case.number]
        state = self.server.state(flow_run_id)
        if case.number == signal.SIGKILL:  # nobody could tell: its successor will
            return "" if state in ("RUNNING", "COMPLETED") else f"the flow run is {state} after kill -9"
        return "" if state in (*wanted, "COMPLETED") else f"the flow run is {state}, not {' or '.join(wanted)}"

    def _resumed(self, case: Case, config: RunConfig, run_dir: Path) -> str:
        """Resume it, through Prefect after kill -9, and compare. Returns: what is wrong."""
        dead = None
        log = self.folder / f"{case.name}.resumed"
        if case.number == signal.SIGKILL and (run_dir / "prefect.json").is_file():
            dead = read_record(run_dir / "prefect.json")["flow_run_id"]
            code = _wait(rlhf(["resume", str(run_dir)], api=self.server.url, log=log))
        else:
            code = in_child(lambda: _go_on(case, config, run_dir), log=log)
        if code:
            return f"resuming it failed: {' / '.join(log.read_text().strip().splitlines()[-3:])}"
        if fingerprint(run_dir) != self.wanted.get(case.kind, self.wanted["plain"]):
            return "another hash after resuming"
        if dead is not None and (state := self.server.state(dead)) not in ("CRASHED", "COMPLETED"):
            return f"its dead flow run is {state} after resuming"
        return ""


def measure(effort: Effort) -> Outcome:
    """Every case, each a run of its own."""
    cases = _cases(full=effort.full)
    failures: list[str] = []
    with (
        prefect_server(effort.folder / "prefect") as server,
        _service(effort.folder) as service,
        _silence() as silent,
        _busy(server.port) as busy,
    ):
        bench = Bench(effort, server, service, silent, busy)
        for done, case in enumerate(cases):
            if problem := bench.try_case(case):
                failures.append(f"{case.name}: {problem}")
            effort.progress(done + 1, len(cases))
    signals = sum(case.number != signal.SIGKILL for case in cases)
    return Outcome(
        tried=len(cases),
        passed=len(cases) - len(failures),
        figure=f"{signals} signals and {len(cases) - signals} kills in {len({case.kind for case in cases})} kinds of "
        f"situation: {len(cases) - len(failures)} as promised; the slowest end took {bench.longest_s:.1f} s",
        goal_size=len(_cases(full=True)),
        failures=failures[:10],
        numbers={"slowest_exit_s": round(bench.longest_s, 2)},
    )


def _cases(*, full: bool) -> list[Case]:
    polite = (signal.SIGINT, signal.SIGTERM)
    if not full:
        return [Case(number) for number in polite]
    pick = random.Random(20)
    hanging = ("reward", "mlflow", "paused", "api")
    return [
        *(Case(number, "plain", pick.random()) for number in polite for _ in range(70)),
        *(Case(number, "process", pick.random()) for number in polite for _ in range(8)),
        *(Case(number, kind, 0.1 + pick.random()) for kind in hanging for number in polite for _ in range(4)),
        *(Case(number, "bare", pick.random()) for number in polite for _ in range(4)),
        *(Case(number, "temporary", pick.random()) for number in polite for _ in range(2)),
        *(Case(signal.SIGKILL, "plain", pick.random()) for _ in range(10)),
        *(Case(number, "workers", pick.random()) for number in (*polite, signal.SIGKILL) for _ in range(4)),
        *(Case(number, "busy", pick.random()) for number in polite for _ in range(4)),
    ]


def _go_on(case: Case, config: RunConfig, run_dir: Path) -> None:
    """Resume without Prefect; what was paused is accepted."""
    outbox.CLOSE_TIMEOUT_S = 1.0  # the MLflow that hangs still does
    if case.kind == "paused" and (run_dir / "run.json").is_file():
        with without_prefect():
            accept_tripped(str(run_dir))
    start_or_go_on(config, run_dir)


def _process(arguments: list[str], *, api: str | None, log: Path) -> int:
    """The command in an interpreter of its own, imports and all; its pid."""
    environment: Mapping[str, Any] = {**os.environ, **({"PREFECT_API_URL": api} if api else {})}
    command = [sys.executable, "-c", "from flows.cli import main; main()", *arguments]
    with log.open("wb") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output).pid


def _await(path: Path, child: int) -> None:
    until = time.monotonic() + LONGEST_S
    while not path.exists() and time.monotonic() < until:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.005)


def _wait(child: int) -> int | None:
    """The exit code of a child, or minus its signal; None if it had to be killed."""
    until = time.monotonic() + LONGEST_S
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


@contextmanager
def _service(folder: Path) -> Iterator[int]:
    """A reward service that hangs while the file ``hang`` is there; its port."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", SERVICE, str(port), str(folder / "hang")])
    until = time.monotonic() + 60
    try:
        while time.monotonic() < until:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


@contextmanager
def _busy(upstream: int) -> Iterator[int]:
    """A port at which the Prefect server refuses requests for the moment, by chance."""
    port = free_port()
    process = subprocess.Popen([sys.executable, str(Path(proxy.__file__)), str(port), str(upstream), "busy"])
    try:
        yield port
    finally:
        process.kill()
        process.wait()


def _api(port: int) -> str:
    return f"http://127.0.0.1:{port}/api"


@contextmanager
def _silence() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1000)
        yield listener.getsockname()[1]
