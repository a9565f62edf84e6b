"""What `rlhf check` finds out about a tracker, in a sentence each; the servers are doubles of recorded answers."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from made_runs import TREE

from flows import ui
from flows.commands.training import check_address, tracker_notes
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import UserError
from tasks.tracking import check as tracker_check
from tasks.tracking.check import Findings, check_tracker

NO_EXPERIMENT = (404, json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "Could not find experiment"}))
DENIED = "You are not authenticated. Please see https://www.mlflow.org/docs/latest/auth/index.html"
ANSWERS = {
    "MLflow 3.17": {"/version": (200, "3.17.2"), "/api": NO_EXPERIMENT, "/": (200, "<!doctype html>")},
    "MLflow 2.22": {"/version": (200, "2.22.1"), "/api": NO_EXPERIMENT, "/": (200, "<!doctype html>")},
    "basic auth": {"/version": (401, DENIED), "/api": (401, DENIED), "/": (401, DENIED)},
    "another host": dict.fromkeys(("/version", "/api", "/"), (403, "Invalid Host header - possible DNS rebinding")),
    "a web page": dict.fromkeys(("/version", "/api", "/"), (200, "<html>hello")),
    "nothing there": dict.fromkeys(("/version", "/api", "/"), (404, "")),
    "deleted": {
        "/version": (200, "3.17.2"),
        "/api": (
            200,
            json.dumps({"experiment": {"experiment_id": "7", "name": "rlhf-flow", "lifecycle_stage": "deleted"}}),
        ),
    },
}
"""Server -> what it answers below a path: of MLflow's, as recorded from servers of that version."""


@contextmanager
def double(name: str, pause_s: float = 0.0) -> Iterator[str]:
    """A server that answers like the one of that name; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(pause_s)
            answers = ANSWERS[name]
            path = max((path for path in answers if self.path.startswith(path)), key=len)
            status, text = answers[path]
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"):
        os.environ.pop(f"MLFLOW_TRACKING_{name}", None)


def found(runs: Path, *changes: str) -> Findings:
    return check_tracker(build_config(TREE, changes), runs)


@pytest.mark.parametrize(
    ("server", "problem"),
    [
        ("MLflow 3.17", None),
        ("MLflow 2.22", "is MLflow 2.22.1, and checkpoints need the logged models of MLflow 3 or newer: upgrade it"),
        ("basic auth", "asks for a user and password (401): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("another host", "refuses (403): the user may not do this, or the server does not accept that address"),
        ("a web page", "does not answer as one"),
        ("nothing there", "does not answer as one"),
        ("deleted", "the experiment rlhf-flow is deleted there: restore it with"),
    ],
)
def test_a_server_is_asked(tmp_path: Path, server: str, problem: str | None) -> None:
    with double(server) as uri:
        what = found(tmp_path, f"tracking.uri={uri}")
    assert what.notes == []
    assert len(what.problems) == (problem is not None)
    assert (problem or "") in "".join(what.problems)


def test_a_server_that_is_down_is_no_mistake(tmp_path: Path) -> None:
    what = found(tmp_path, "tracking.uri=http://127.0.0.1:9")
    assert what.problems == []
    assert what.notes == [
        "the MLflow server at http://127.0.0.1:9 does not answer (Connection refused): a run goes on without it, and "
        "`rlhf resume` sends what it missed"
    ]


def test_one_that_hangs_costs_no_more_than_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_check, "DEADLINE_S", 0.5)
    tracker_check.prepare_client()
    with double("MLflow 3.17", pause_s=5.0) as uri:
        began = time.monotonic()
        what = found(tmp_path, f"tracking.uri={uri}")
        assert time.monotonic() - began < 3
    assert what.problems == []
    assert "does not answer" in what.notes[0] or "has not answered in 0.5 s" in what.notes[0]


def test_nobody_is_asked_where_tracking_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_check, "ask_server", lambda *_: pytest.fail("asked"))
    assert found(tmp_path, "tracking.enabled=false", "tracking.uri=http://127.0.0.1:9") == Findings()
    assert found(tmp_path, "tracking.enabled=false", "tracking.uri=./mlruns") == Findings()


@pytest.mark.parametrize("uri", ["./mlruns", "mlruns", "/srv/mlruns", "file:///srv/mlruns", "file:/srv/mlruns"])
def test_a_folder_is_refused_and_told_what_to_give(tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = found(tmp_path, f"tracking.uri={uri}").problems
    assert "is a folder, and MLflow keeps runs in no folder any more: give sqlite:///" in problem
    os.environ["MLFLOW_TRACKING_URI"] = uri
    assert found(tmp_path).problems == [problem]
    with pytest.raises(UserError, match="is a folder"):
        check_address(build_config(TREE))
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    assert found(tmp_path).problems == []
    check_address(build_config(TREE, ["tracking.enabled=false"]))


class TestAStore:
    def test_that_is_not_there_yet_is_not_made(self, tmp_path: Path) -> None:
        assert found(tmp_path / "runs") == Findings()
        assert list(tmp_path.iterdir()) == []

    def test_that_is_half_made_is_told(self, tmp_path: Path) -> None:
        import sqlite3

        with sqlite3.connect(tmp_path / "mlflow.db") as connection:
            connection.execute("create table alembic_version (version_num text)")
        connection.close()
        (note,) = found(tmp_path).notes
        assert note == f"the store {tmp_path}/mlflow.db is half made and empty: the run puts it aside and makes another"
        with pytest.raises(UserError, match="was left half made, and holds no run"):
            ui.check_tracker(f"sqlite:///{tmp_path}/mlflow.db")

    def test_that_is_no_database_is_a_mistake(self, tmp_path: Path) -> None:
        (tmp_path / "mlflow.db").write_text("notes " * 1000)
        (problem,) = found(tmp_path).problems
        assert "is damaged or no database" in problem
        with pytest.raises(UserError, match="is damaged or no database"):
            tracker_notes(build_config(TREE), tmp_path)

    def test_whose_experiment_is_deleted_or_elsewhere(self, tmp_path: Path, empty_store: Path) -> None:
        from mlflow.tracking import MlflowClient

        shutil.copy(empty_store, tmp_path / "mlflow.db")
        client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
        experiment = client.create_experiment("rlhf-flow", artifact_location="file:///here")
        assert found(tmp_path) == Findings()
        (problem,) = found(tmp_path, "tracking.artifact_location=s3://there").problems
        assert "but the experiment rlhf-flow keeps its files in file:///here" in problem
        client.delete_experiment(experiment)
        (problem,) = found(tmp_path).problems
        assert f"mlflow experiments restore --experiment-id {experiment}" in problem
        assert found(tmp_path, "tracking.experiment=another") == Findings()


@pytest.mark.parametrize(
    ("server", "told"),
    [
        ("MLflow 3.17", ""),
        ("basic auth", "; it asks for a user and password"),
        ("another host", "refuses (403): it does not accept that address, or this user"),
        ("nothing there", "does not answer as an MLflow server (404)"),
    ],
)
def test_the_pages_of_a_server_that_wants_something(server: str, told: str) -> None:
    with double(server) as uri:
        if told.startswith(";") or not told:
            assert ui.check_tracker(uri) == told
        else:
            with pytest.raises(UserError) as refused:
                ui.check_tracker(uri)
            assert told in str(refused.value)
