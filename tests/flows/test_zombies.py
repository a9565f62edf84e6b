"""A flow run whose process dies without a word becomes Crashed: the automation of deployments/, on a real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from iteration import tiny_tree
from torture.prefect_server import prefect_server

from rlhf_core.contracts.records import read_record

ROOT = Path(__file__).parents[2]
HURRIED = """
import prefect.flow_engine as engine
engine.MINIMUM_HEARTBEAT_INTERVAL = 1
engine.BaseFlowRunEngine.heartbeat_seconds = property(lambda self: 2)
from flows.cli import main
main()
"""
WITHIN_S = 10
"""The shortest that Prefect takes."""


@pytest.mark.slow
def test_kill_9_is_seen_as_crashed_by_the_automation_and_a_living_run_is_left_alone(tiny: Any, tmp_path: Path) -> None:
    text = (ROOT / "deployments" / "zombies.yaml").read_text()
    assert "within: 90" in text
    (tmp_path / "zombies.yaml").write_text(text.replace("within: 90", f"within: {WITHIN_S}"))
    (tmp_path / "run.yaml").write_text(json.dumps(tiny_tree(tiny) | {"num_iterations": 5000}))
    with prefect_server(tmp_path / "prefect") as server:
        environment = {**os.environ, "PREFECT_API_URL": server.url, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        create = [sys.executable, "-m", "prefect", "automation", "create", "--from-file"]
        subprocess.run([*create, str(tmp_path / "zombies.yaml")], env=environment, check=True, timeout=120)
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
