"""`rlhf ui`: both pages of a real store answer, and nothing is left running; what is not there is told."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import group
from torture.runs import start

from flows import ui
from flows.child_processes import Child
from flows.cli import main
from flows.commands.options import EXIT_MISTAKE
from flows.console import Console
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import UserError


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens at."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        work()
    return str(caught.value)


def test_both_pages_answer_and_end_with_the_command(tiny: Any, tmp_path: Path) -> None:
    """The run is tracked, so that there is a store; the servers are real."""
    from iteration import tiny_tree

    tree = tiny_tree(tiny) | {"num_iterations": 1, "tracking": {"experiment": "shown"}}
    start(build_config(tree), tmp_path / "runs/a")
    command = [sys.executable, "-c", "from flows.cli import main; main()", "ui", "--no-open"]
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=said, stderr=said, env={**os.environ, "PREFECT_HOME": str(tmp_path / "home")}
        )
    try:
        begun = time.monotonic()
        while "Ctrl-C ends" not in (text := (tmp_path / "said").read_text()):
            assert process.poll() is None, text
            assert time.monotonic() - begun < ui.START_S, text
            time.sleep(0.2)
        mlflow, prefect = (re.search(rf"{name} +(http://\S+)", text) for name in ("MLflow", "Prefect"))
        assert mlflow is not None
        assert prefect is not None
        assert f"export PREFECT_API_URL={prefect[1]}/api" in text
        assert httpx.get(mlflow[1]).status_code == 200
        assert httpx.get(prefect[1], follow_redirects=True).status_code == 200
        found = httpx.get(f"{mlflow[1]}/api/2.0/mlflow/experiments/get-by-name?experiment_name=shown").json()
        assert found["experiment"]["name"] == "shown", "the store that the run has written"
        assert httpx.get(f"{prefect[1]}/api/health").json() is True
        assert httpx.get(f"{prefect[1]}/ui-settings").json()["api_url"] == f"{prefect[1]}/api", "the page asks itself"
        tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
        children = [child for listed in tasks for child in listed.read_text().split()]
        assert len(children) == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert [group(int(child)) for child in children] == [[], []]
        assert (tmp_path / "said").read_text().rstrip().endswith("ended, and what it had started")
    finally:
        process.kill()
        process.wait()


def test_no_runs_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(SystemExit) as caught:
        main(["ui", "--no-open"])
    assert caught.value.code == EXIT_MISTAKE
    err = capsys.readouterr().err
    assert (
        err
        == "error: --runs runs is not there: no run has been made yet; `rlhf quickstart` or `rlhf train` makes one\n"
    )
    Path("runs/b-sweep").mkdir(parents=True)
    assert refused(lambda: ui.find_tracker(Path("runs"))).startswith("--runs runs holds no run that MLflow knows yet")
    Path("runs/b-sweep/mlflow.db").touch()
    assert refused(lambda: ui.find_tracker(Path("runs"))).endswith("; there are some with --runs runs/b-sweep")
    assert ui.find_tracker(Path("runs/b-sweep")) == f"sqlite:///{tmp_path}/runs/b-sweep/mlflow.db"
    assert list(tmp_path.rglob("*.lock")) == []


def test_the_tracker_of_the_runs(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from iteration import tiny_tree

    from rlhf_core.contracts.run_folder import RunFolder

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, tracking in (("a", {}), ("b", {"uri": "http://somewhere:5000"}), ("c", {"enabled": False})):
        RunFolder.create(tmp_path / name, build_config(tiny_tree(tiny) | {"tracking": tracking}), {"num_threads": 1})
    assert ui.find_tracker(tmp_path / "b") == "http://somewhere:5000"
    told = refused(lambda: ui.find_tracker(tmp_path))
    assert f"its runs use 2 trackers (http://somewhere:5000, sqlite:///{tmp_path}/mlflow.db)" in told
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://u:hunter2@h/db")
    told = refused(lambda: ui.find_tracker(tmp_path))
    assert "hunter2" not in told
    assert ui.find_tracker(tmp_path / "a") == "postgresql://u:hunter2@h/db"


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("sqlite:///not/there.db", "the tracking database not/there.db is not there"),
        ("http://127.0.0.1:9", "the MLflow server at http://127.0.0.1:9 does not answer"),
        ("./mlruns", "the tracker './mlruns' is a folder, and MLflow keeps runs in no folder any more"),
        ("file:///tmp/mlruns", "give sqlite:////tmp/mlruns/mlflow.db"),
        ("ftp://h/mlruns", "the tracker 'ftp://h/mlruns' is neither a server (http://...) nor a database"),
    ],
)
def test_a_tracker_that_cannot_be_shown(uri: str, told: str) -> None:
    assert told in refused(lambda: ui.check_tracker(uri))


def test_a_port_that_is_taken(taken: int) -> None:
    assert refused(lambda: ui.choose_port(taken, 5000, "--mlflow-port")).startswith(f"--mlflow-port {taken} is in use")
    assert ui.choose_port(None, taken, "--mlflow-port") not in (taken, 0), "a free one instead of the usual"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert ui.choose_port(port, taken, "--mlflow-port") == port


def test_a_server_that_ends_by_itself_is_told_with_its_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("create table of_somebody_else (x)")
    began: list[Child] = []

    def dies(*_: object) -> ui.Page:
        began.append(Child([sys.executable, "-S", "-c", "print('no such table'); raise SystemExit(1)"], tmp_path / "d"))
        return ui.Page("MLflow", "http://127.0.0.1:9", "", "/health", began[0])

    def stays(*_: object) -> ui.Page:
        began.append(Child([sys.executable, "-S", "-c", "import time; time.sleep(60)"], tmp_path / "s"))
        return ui.Page("Prefect", "http://127.0.0.1:9", "", "/api/health", began[1])

    monkeypatch.setattr(ui, "mlflow_page", dies)
    monkeypatch.setattr(ui, "prefect_page", stays)
    console = Console(file=(tmp_path / "out").open("w"))
    told = refused(lambda: ui.show_pages(console, None, f"sqlite:///{tmp_path}/mlflow.db", is_opened=False))
    console.file.close()
    assert told == "MLflow has ended by itself (exit code 1); it has said:\n  no such table"
    assert began[1].poll() is not None, "the other one was ended"


def test_what_runs_already_is_not_started_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ui, "Child", lambda *_: pytest.fail("a server was started"))
    monkeypatch.setattr(ui, "api_answers", lambda: True)
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: "http://u:hunter2@prefect.example:4200/api"}):
        page = ui.prefect_page(Console(), 4200, tmp_path)
    assert (page.address, page.has_answered) == ("http://prefect.example:4200", True)
    page = ui.mlflow_page("http://mlflow.example:5000", 5000, tmp_path)
    assert (page.address, page.has_answered) == ("http://mlflow.example:5000", True)


def test_a_prefect_server_that_is_configured_and_gone_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setattr(ui, "Child", lambda _command, _log, environment: environment)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        page = ui.prefect_page(Console(width=200), 4321, tmp_path)
    assert "PREFECT_API_URL http://127.0.0.1:9/api does not answer" in capsys.readouterr().out
    environment: Any = page.server
    assert environment["PREFECT_API_URL"] == "http://127.0.0.1:4321/api"
