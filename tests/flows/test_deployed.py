"""What deployments/ sets up, on a real server with a worker: runs that are triggered, scheduled, cancelled, suspended
by an automation, and killed. One server for all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from iteration import tiny_tree
from tiny_world import Tiny
from torture.prefect_server import PrefectServer, free_port, prefect_server
from torture.runs import fingerprint, start

from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.records import read_record
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.inspection import iteration_rows

ROOT = Path(__file__).parents[2]
ROOM = ROOT / "deployments"
HURRIED = """
import prefect.flow_engine as engine
engine.MINIMUM_HEARTBEAT_INTERVAL = 1
engine.BaseFlowRunEngine.heartbeat_seconds = property(lambda self: 2)
from flows.cli import main
main()
"""
WITHIN_S = 10
"""The shortest that Prefect takes."""
LONG = 40
"""Iterations of a run that is stopped on its way: each takes about a third of a second here."""
CANCELLED_WITHIN_S = 10
WAIT_S = 180.0


@dataclass
class Site:
    """A server, a worker, and the folder that the deployments were made from."""

    server: PrefectServer
    folder: Path
    environment: dict[str, str]
    tiny: Tiny
    told: list[dict[str, Any]] = field(default_factory=list)
    """What the notification block has received."""

    def prefect(self, *arguments: str) -> str:
        """A command of Prefect, as a person types it in that folder; what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *arguments],
            env=self.environment, cwd=self.folder, check=False, timeout=120, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def config(self, num_iterations: int, **changes: Any) -> dict[str, Any]:
        """A config as the form sends it."""
        return tiny_tree(self.tiny) | {"num_iterations": num_iterations} | changes

    def deployment(self, name: str) -> str:
        """Its id, by flow/name."""
        return self.server.ask(f"/deployments/name/{name}")["id"]

    def run(self, name: str, **parameters: Any) -> str:
        """Trigger a deployment; returns the id of the flow run."""
        made = self.server.ask(f"/deployments/{self.deployment(name)}/create_flow_run", {"parameters": parameters})
        return made["id"]

    def until(self, met: Callable[[], Any], what: str) -> Any:
        """Wait for something; returns it."""
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            if found := met():
                return found
            time.sleep(0.2)
        log = (self.folder / "worker.log").read_text()[-4000:]
        raise AssertionError(f"{what} did not come within {WAIT_S:.0f} s; the worker says:\n{log}")

    def until_state(self, flow_run_id: str, wanted: str) -> float:
        """Wait for the state of a flow run; returns the seconds it took."""
        begun = time.monotonic()
        self.until(lambda: self.server.state(flow_run_id) == wanted, f"{wanted} of {flow_run_id}")
        return time.monotonic() - begun

    def until_iteration(self, run_dir: str, iteration: int) -> None:
        """Wait until a run has begun an iteration."""
        folder = self.folder / run_dir / "iterations" / f"{iteration:06d}"
        self.until(folder.is_dir, f"iteration {iteration} of {run_dir}")

    def artifacts(self, flow_run_id: str) -> dict[str, Any]:
        """Key -> data of its artifacts."""
        asked = {"artifacts": {"flow_run_id": {"any_": [flow_run_id]}}}
        return {each["key"]: each["data"] for each in self.server.ask("/artifacts/filter", asked)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    with prefect_server(tmp_path_factory.mktemp("server") / "prefect") as server:
        yield server


@pytest.fixture(scope="module")
def site(server: PrefectServer, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Deployed with the three commands that stand at the top of prefect.yaml, and both automations."""
    folder = tmp_path_factory.mktemp("site")
    environment = {
        **os.environ, "PREFECT_API_URL": server.url, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_LOGGING_LEVEL": "INFO",
    }  # fmt: skip
    site = Site(server, folder, environment, tiny)
    site.prefect("work-pool", "create", "rlhf", "--type", "process", "--overwrite")
    site.prefect("--no-prompt", "deploy", "--all", "--prefect-file", str(ROOM / "prefect.yaml"))
    with _listening(site.told) as address:
        script = (
            "from prefect.blocks.notifications import CustomWebhookNotificationBlock as Block\n"
            f"print(Block(name='rlhf', url={address!r}, json_data={{'said': '{{{{subject}}}} | {{{{body}}}}'}})"
            ".save('rlhf', overwrite=True))"
        )
        made = subprocess.run(
            [sys.executable, "-c", script], env=environment, check=True, timeout=120, capture_output=True, text=True
        )
        text = (ROOM / "kl-ceiling.yaml").read_text().replace("NOTIFICATION_BLOCK", made.stdout.split()[-1])
        (folder / "kl-ceiling.yaml").write_text(text)
        site.prefect("automation", "create", "--from-file", str(folder / "kl-ceiling.yaml"))
        zombies = (ROOM / "zombies.yaml").read_text()
        assert "within: 90\n" in zombies
        assert "within: 1800\n" in zombies
        for within in ("90", "1800"):
            zombies = zombies.replace(f"within: {within}\n", f"within: {WITHIN_S}\n")
        (folder / "zombies.yaml").write_text(zombies)
        site.prefect("automation", "create", "--from-file", str(folder / "zombies.yaml"))
        with (folder / "worker.log").open("w") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "prefect", "worker", "start", "--pool", "rlhf"],
                env=environment, cwd=folder, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            yield site
        finally:
            worker.terminate()
            worker.wait(30)


class _listening:  # noqa: N801 - reads as what it does
    """A service that keeps what is posted to it; gives its address."""

    def __init__(self, told: list[dict[str, Any]]) -> None:
        class Keep(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its base's name
                """Quiet."""

        self._service = ThreadingHTTPServer(("127.0.0.1", free_port()), Keep)

    def __enter__(self) -> str:
        threading.Thread(target=self._service.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._service.server_port}/"

    def __exit__(self, *_: object) -> None:
        self._service.shutdown()
        self._service.server_close()


@pytest.fixture(scope="module")
def undisturbed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the stopped ones must come to, made without Prefect."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    start(build_config(tiny_tree(tiny) | {"num_iterations": LONG}), run_dir)
    return run_dir


@pytest.mark.slow
def test_everything_is_deployed(site: Site) -> None:
    deployed = {each["name"]: each for each in site.server.ask("/deployments/filter", {})}
    assert set(deployed) == {
        "quickstart", "train", "resume", "nightly", "evaluate", "evaluate-newest", "sweep", "chain",
    }  # fmt: skip
    nightly = deployed["nightly"]
    assert nightly["schedules"][0]["schedule"]["cron"] == "0 2 * * *"
    assert nightly["global_concurrency_limit"]["limit"] == 1
    assert nightly["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    assert nightly["pull_steps"][0]["prefect.deployments.steps.set_working_directory"]["directory"] == str(site.folder)


@pytest.mark.slow
def test_a_scheduled_run_begins_by_itself_and_completes(site: Site) -> None:
    nightly = site.deployment("ppo/nightly")
    parameters = {"config": site.config(2), "run_dir": "runs/scheduled"}
    schedule = {"interval": 60.0, "anchor_date": datetime.now(UTC).isoformat()}
    (made,) = site.server.ask(
        f"/deployments/{nightly}/schedules", [{"schedule": schedule, "active": True, "parameters": parameters}]
    )
    record = site.folder / "runs" / "scheduled" / "prefect.json"
    site.until(record.is_file, "the scheduled run")
    site.server.ask(f"/deployments/{nightly}/schedules/{made['id']}", None, "DELETE")
    flow_run_id = read_record(record)["flow_run_id"]
    site.until_state(flow_run_id, "COMPLETED")
    flow_run = site.server.ask(f"/flow_runs/{flow_run_id}")
    assert flow_run["auto_scheduled"] is True
    assert flow_run["name"] == "ppo · scheduled"


@pytest.mark.slow
def test_a_triggered_run_completes_and_its_newest_checkpoint_is_evaluated(site: Site) -> None:
    first = site.run("ppo/train", config=site.config(2), run_dir="runs/apart/triggered")
    site.until_state(first, "COMPLETED")
    shown = site.artifacts(first)
    assert shown["triggered-progress"] == 100.0
    assert "**2 of 2 iterations** · finished" in shown["triggered"]
    tasks = site.server.ask("/task_runs/filter", {"flow_runs": {"id": {"any_": [first]}}})
    assert {"generate-0", "ppo_update-1", "save_checkpoint-2"} <= {task["name"] for task in tasks}
    second = site.run(
        "evaluate-newest/evaluate-newest", runs="runs/apart", num_prompts=4, samples=2, frontier_samples=20
    )
    site.until_state(second, "COMPLETED")
    assert "| policy | score | gain | KL | win rate |" in site.artifacts(second)["triggered-evaluation"]


@pytest.mark.slow
def test_a_cancelled_run_stops_in_time_and_resumes_to_the_same_bits(site: Site, undisturbed: Path) -> None:
    flow_run_id = site.run("ppo/train", config=site.config(LONG), run_dir="runs/cancelled")
    site.until_iteration("runs/cancelled", 3)
    site.server.ask(f"/flow_runs/{flow_run_id}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    begun = time.monotonic()
    run = RunFolder.open(site.folder / "runs" / "cancelled")
    site.until(lambda: not run.is_locked(), "the end of its process")
    stopped_s = time.monotonic() - begun
    site.until_state(flow_run_id, "CANCELLED")
    assert stopped_s < CANCELLED_WITHIN_S
    assert run.num_finished() < LONG, "it was stopped on its way"
    resume = [sys.executable, "-c", "from flows.cli import main; main()", "resume", "runs/cancelled"]
    subprocess.run(resume, env=site.environment, cwd=site.folder, check=True, timeout=WAIT_S, capture_output=True)
    assert fingerprint(run.path) == fingerprint(undisturbed)


def passed_once(run_dir: Path) -> float:
    """A KL that a run rises above early, and never falls below again."""
    kl = [row["kl"] for row in iteration_rows(RunFolder.open(run_dir))]
    k = next(k for k in range(2, len(kl) // 2) if max(kl[:k]) < min(kl[k:]))
    return (max(kl[:k]) + min(kl[k:])) / 2


@pytest.mark.slow
def test_kl_above_its_ceiling_suspends_the_run_tells_somebody_and_resumed_it_goes_on(
    site: Site, undisturbed: Path
) -> None:
    guards = {"kl_ceiling": {"threshold": passed_once(undisturbed)}, "negative_kl": {"threshold": None}}
    flow_run_id = site.run("ppo/train", config=site.config(LONG, guards=guards), run_dir="runs/suspended")
    site.until_state(flow_run_id, "PAUSED")
    assert site.server.ask(f"/flow_runs/{flow_run_id}")["state"]["name"] == "Suspended"
    run = RunFolder.open(site.folder / "runs" / "suspended")
    site.until(lambda: not run.is_locked(), "the end of its process")
    assert run.num_finished() < LONG
    (message,) = site.until(lambda: site.told, "the notification")
    assert message["said"].startswith("ppo · suspended: kl_ceiling at iteration ")
    assert f"The run folder is {run.path}" in message["said"]
    site.server.ask(f"/flow_runs/{flow_run_id}/resume", {})
    site.until_state(flow_run_id, "COMPLETED")
    assert fingerprint(run.path) == fingerprint(undisturbed)
    assert len(site.told) == 1, "it is told once"


@pytest.mark.slow
def test_kill_9_is_seen_as_crashed_by_the_automation_and_a_living_run_is_left_alone(site: Site, tmp_path: Path) -> None:
    server, environment = site.server, site.environment
    (tmp_path / "run.yaml").write_text(json.dumps(site.config(5000)))
    train = ["train", "--config", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run")]
    run = subprocess.Popen([sys.executable, "-c", HURRIED, *train], env=environment, stdout=subprocess.DEVNULL)
    try:
        record = tmp_path / "run" / "prefect.json"
        until = time.monotonic() + 120
        while not record.exists() and time.monotonic() < until and run.poll() is None:
            time.sleep(0.1)
        time.sleep(1.5 * WITHIN_S)
        flow_run_id = read_record(record)["flow_run_id"]
        assert run.poll() is None
        assert server.state(flow_run_id) == "RUNNING"
    finally:
        run.kill()
        run.wait()
    until = time.monotonic() + 6 * WITHIN_S
    while server.state(flow_run_id) == "RUNNING" and time.monotonic() < until:
        time.sleep(0.2)
    assert server.state(flow_run_id) == "CRASHED"


@pytest.mark.slow
def test_a_run_left_pending_by_a_dead_worker_is_crashed_and_one_of_somebody_else_is_left_alone(site: Site) -> None:
    """A worker has taken it, and dies before the flow begins: nothing is heard of it again."""
    tomorrow = {"type": "SCHEDULED", "state_details": {"scheduled_time": "2100-01-01T00:00:00Z"}}
    path, taken = f"/deployments/{site.deployment('ppo/train')}/create_flow_run", {"type": "PENDING", "name": "Pending"}
    ours = site.server.ask(path, {"state": tomorrow, "parameters": {"config": site.config(2)}})["id"]
    flow_id = site.server.ask("/flows/", {"name": "of somebody else"})["id"]
    others = site.server.ask("/flow_runs/", {"flow_id": flow_id, "state": tomorrow})["id"]
    for flow_run_id in (ours, others):
        site.server.ask(f"/flow_runs/{flow_run_id}/set_state", {"state": taken, "force": True})
    assert site.until_state(ours, "CRASHED") > 0.5 * WITHIN_S
    assert "died before it began" in site.server.ask(f"/flow_runs/{ours}")["state"]["message"]
    assert site.server.state(others) == "PENDING"
