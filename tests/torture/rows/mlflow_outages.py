"""MLflow down, slow, failing, hanging, and answering too late or not at all: nothing waits, nothing is lost or doubled.

A real ``mlflow server`` on sqlite behind a faulty proxy. What has arrived is read in the server's own database.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torture import proxy
from torture.battery import Effort, Outcome
from torture.runs import battery_config, fingerprint, fork, in_child, start, start_or_go_on, warm

from rlhf_core.contracts.config_io import flat_params
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.inspection import before_and_after
from tasks.tracking.metrics import iteration_metrics, result_metrics
from tasks.tracking.outbox import Ledger
from tasks.tracking.traces import due_iterations, extreme_responses

NAME = "MLflow down, slow, 500s, hangs, lost and late answers"
GOAL = "same hash, every metric exactly once"
DOWN_S = 60.0
"""The outage of the full row."""
CALM_S = 5.0
"""Seconds that a tracker may cost training, at most, on a busy machine; a request that hangs takes longer."""
TIMEOUT_S = 1
"""Of a request, as the user may set it."""
RESUMES = 6
"""Resumes that may be needed until all has arrived, once the tracker works."""


@dataclass(frozen=True)
class Case:
    """A fault, how long it lasts, and whether training is killed in the middle, too."""

    fault: str
    seed: int
    whole_run: bool = False
    """The first run meets the fault to its end; otherwise the resumes meet it too, until all has arrived."""
    kills: int = 0

    @property
    def name(self) -> str:
        """For people and for folders."""
        return (
            f"{self.fault}-{self.seed}" + ("-whole" if self.whole_run else "") + (f"-{self.kills}k" * bool(self.kills))
        )


def measure(effort: Effort) -> Outcome:
    """Every case, each a run of its own, on one server."""
    cases = _cases(full=effort.full)
    failures: list[str] = []
    slowest = delay = 0.0
    metrics = 0
    config = battery_config(effort.tiny)
    (effort.folder / "warm").mkdir()
    warm(config, effort.folder / "warm")
    importlib.import_module("mlflow.tracking")
    began = time.monotonic()
    if in_child(lambda: start(config, effort.folder / "untracked"), log=effort.folder / "log"):
        raise RuntimeError((effort.folder / "log").read_text())
    alone, wanted = time.monotonic() - began, fingerprint(effort.folder / "untracked")
    with mlflow_server(effort.folder / "server") as upstream:
        for done, case in enumerate(cases):
            bench = _Bench(effort, case, upstream)
            bench.run()
            problems = bench.problems(wanted, alone)
            failures += [f"{case.name}: {problem}" for problem in problems[:3]]
            slowest, delay = max(slowest, bench.closed_after), max(delay, bench.loop_s - alone)
            metrics += bench.num_metrics
            effort.progress(done + 1, len(cases))
    failed = {failure.split(":")[0] for failure in failures}
    return Outcome(
        tried=len(cases),
        passed=len(cases) - len(failed),
        figure=f"{len(cases)} runs through {len({case.fault for case in cases})} kinds of outage: same hash, "
        f"{metrics:,} metric values in the tracker, each once; training waited {max(delay, 0):.1f} s at most",
        goal_size=len(_cases(full=True)),
        failures=failures[:10],
        numbers={"loop_delay_s": round(delay, 2), "slowest_close_s": round(slowest, 2), "metric_values": metrics},
    )


def _cases(*, full: bool) -> list[Case]:
    if not full:
        return [Case("lost", 0)]
    seeds = range(2)
    return [
        Case("down", 0),
        Case("down", 1, whole_run=True),
        *(Case(fault, seed) for fault in ("errors", "lost", "late", "garbage", "mixed") for seed in seeds),
        *(Case(fault, 0, whole_run=True) for fault in ("hang", "slow", "late", "lost")),
        *(Case(fault, seed, kills=2) for fault in ("none", "lost", "mixed") for seed in seeds),
    ]


class _Bench:
    """One case: its proxy, its run, and what the server has of it."""

    def __init__(self, effort: Effort, case: Case, upstream: int) -> None:
        self.case, self.upstream = case, upstream
        self.run_dir = effort.folder / case.name
        self.database = effort.folder / "server" / "mlflow.db"
        self.log = effort.folder / f"{case.name}.log"
        self.port = _free_port()
        self.config = battery_config(effort.tiny, {
            "tracking": {
                "uri": f"http://127.0.0.1:{self.port}", "experiment": case.name, "registered_model": case.name
            }
        })  # fmt: skip
        self.down_s = DOWN_S if effort.full else 3.0
        self.loop_s = self.closed_after = 0.0
        self.num_metrics = 0

    def run(self) -> None:
        """The run under the fault, then resumes until all has arrived."""
        self.began = time.time()
        if self.case.fault == "down" and not self.case.whole_run:
            child = self._fork()
            time.sleep(self.down_s)
            with self._proxy("none"):
                self._wait(child)
        elif self.case.fault == "down":
            self._wait(self._fork())
        else:
            with self._proxy(self.case.fault):
                self._run_with_kills()
        last = self.run_dir / "iterations" / f"{self.config.num_iterations - 1:06d}" / "06_update.json"
        ended = last.stat().st_mtime
        self.loop_s, self.closed_after = ended - self.began, time.time() - ended
        for turn in range(RESUMES):
            with self._proxy("none" if self.case.whole_run or turn else self.case.fault.replace("down", "none")):
                self._wait(self._fork())
            if turn and self._is_finished():
                return

    def _run_with_kills(self) -> None:
        chance = random.Random(self.case.seed)
        for _ in range(self.case.kills):
            child = self._fork()
            time.sleep(chance.uniform(0.3, 4.0))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        self.began = time.time()
        self._wait(self._fork())

    def _fork(self) -> int:
        def work() -> None:
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(TIMEOUT_S)
            start_or_go_on(self.config, self.run_dir)

        return fork(work, log=self.log)

    def _wait(self, child: int) -> None:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            raise RuntimeError(f"{self.case.name}: a tracker's failure reached the run:\n{self.log.read_text()}")

    @contextlib.contextmanager
    def _proxy(self, fault: str) -> Iterator[None]:
        command = [sys.executable, proxy.__file__, self.port, self.upstream, fault, self.case.seed]
        process = subprocess.Popen([str(part) for part in command])
        try:
            _wait_for(self.port, process)
            yield
        finally:
            process.kill()
            process.wait()

    def _is_finished(self) -> bool:
        return [row[1] for row in self._runs()] == ["FINISHED"]

    def _runs(self) -> list[tuple[Any, ...]]:
        return self._ask(
            "select run_uuid, runs.status from runs join experiments using (experiment_id) "
            "where experiments.name = ? and runs.lifecycle_stage = 'active'",
            self.case.name,
        )

    def _ask(self, question: str, *values: object) -> list[tuple[Any, ...]]:
        with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as database:
            return database.execute(question, values).fetchall()

    def problems(self, wanted: str, alone: float) -> list[str]:
        """What is not as it should be, in sentences."""
        found: list[str] = []
        if fingerprint(self.run_dir) != wanted:
            found.append("another hash than without tracking")
        if self.loop_s > 2 * alone + CALM_S:
            found.append(f"training took {self.loop_s:.1f} s, and {alone:.1f} s without tracking")
        runs = self._runs()
        if [status for _, status in runs] != ["FINISHED"]:
            return [*found, f"the tracker has the runs {runs}, not one that is FINISHED"]
        return found + self._metric_problems(runs[0][0]) + self._other_problems(runs[0][0])

    def _metric_problems(self, run_id: str) -> list[str]:
        run = RunFolder.open(self.run_dir)
        there: dict[tuple[str, int], list[float]] = {}
        for key, step, value in self._ask("select key, step, value from metrics where run_uuid = ?", run_id):
            there.setdefault((key, int(step)), []).append(float(value))
        wanted = {
            (key, iteration): value
            for iteration in range(run.config.num_iterations)
            for key, value in (iteration_metrics(run, iteration) | {"guard/dropped_metrics": 0.0}).items()
        }
        wanted |= {(key, step): value for step, of in result_metrics(run).items() for key, value in of.items()}
        self.num_metrics = len(wanted)
        found = [f"{key} of iteration {step} has not arrived" for key, step in wanted if (key, step) not in there]
        found += [f"{key} of step {step} is there {len(v)} times" for (key, step), v in there.items() if len(v) > 1]
        found += [
            f"{key} of iteration {step} is {there[key, step]}, and {value} on disk"
            for (key, step), value in wanted.items()
            if there.get((key, step), [value])[0] != value
        ]
        return found + [
            f"{key} of step {step} was never computed"
            for key, step in there
            if (key, step) not in wanted and key != "checkpoint/value"
        ]

    def _model(self, iteration: int) -> str:
        return f"{self.run_dir.name}-{iteration:06d}"

    def _other_problems(self, run_id: str) -> list[str]:
        found: list[str] = []
        run = RunFolder.open(self.run_dir)
        versions = [
            int(iteration)
            for (iteration,) in self._ask(
                "select t.value from model_versions v join model_version_tags t using (name, version) "
                "where v.name = ? and t.key = 'rlhf.iteration' and v.current_stage != 'Deleted_Internal' order by 1",
                self.case.name,
            )
        ]
        doubled = [i for i, same in itertools.groupby(sorted(versions)) if len(list(same)) > 1]
        if doubled or not set(versions) >= set(run.checkpoints()):
            found.append(f"model versions of the checkpoints {versions}, and there are {run.checkpoints()}")
        models = self._ask(
            "select name, count(*) from logged_models "
            "where source_run_id = ? and lifecycle_stage = 'active' group by 1",
            run_id,
        )
        if sorted((name, int(count)) for name, count in models) != [(self._model(i), 1) for i in sorted(versions)]:
            found.append(f"logged models {models} of the versions {versions}")
        params = dict(self._ask("select key, value from params where run_uuid = ?", run_id))
        wanted = {name for name, value in flat_params(run.config).items() if value != ""}
        if params.keys() != wanted:
            found.append(f"{len(params)} params instead of {len(wanted)}")
        (artifacts,) = self._ask("select artifact_uri, '' from runs where run_uuid = ?", run_id)
        folder = self.database.parent / "artifacts" / artifacts[0].partition("mlflow-artifacts:/")[2]
        files = ("config.yaml", "identity.json", "report.png", "samples.json", "view.html")
        found += [f"{file} has not arrived" for file in files if not (folder / file).is_file()]
        traces = [row["sample_id"] for i in due_iterations(run) for row in extreme_responses(run, i)]
        there = self._ask(
            "select t.value, count(s.span_id) from trace_tags t join trace_tags o using (request_id) "
            "join entity_associations a on a.source_id = request_id and a.destination_id = ? "
            "left join spans s on s.trace_id = request_id "
            "where t.key = 'rlhf.sample_id' and o.key = 'rlhf.trace_of' and o.value = ? group by request_id",
            run_id, Ledger.of(self.run_dir).outbox,
        )  # fmt: skip
        if sorted(there) != sorted((sample_id, 1) for sample_id in traces):
            found.append(f"{len(there)} traces of the {len(traces)} extreme responses")
        notes = self._ask("select count(*), '' from tags where run_uuid = ? and key = 'mlflow.note.content'", run_id)
        found += [] if notes[0][0] == 1 else ["the run has no description"]
        inputs = self._ask("select count(*), '' from inputs where destination_id = ?", run_id)
        found += [] if inputs[0][0] == 1 else [f"the run has {inputs[0][0]} datasets instead of one"]
        if not found and len(json.loads((folder / "samples.json").read_text())["data"]) != len(before_and_after(run)):
            found.append("samples.json has rows twice")
        return found


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[int]:
    """A real MLflow server; gives its port."""
    folder.mkdir()
    port = _free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "DO_NOT_TRACK": "true"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for(port, process)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60):
            yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _wait_for(port: int, process: subprocess.Popen[bytes], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise RuntimeError(f"nothing listens on port {port}; the server ended with {process.poll()}")
