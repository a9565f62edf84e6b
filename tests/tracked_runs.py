"""Runs for tests of the tracker: made without training, and sent to a real sqlite store."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from made_runs import made_run

from rlhf_core.contracts.run_folder import RunFolder
from tasks.tracking import tracker as tracking
from tasks.tracking.outbox import Ledger


def trackable(path: Path, empty_store: Path | None, iterations: int = 3, **made: Any) -> RunFolder:
    """A run with two checkpoints, beside a store that has no experiment of ours yet."""
    if empty_store is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(empty_store, path.parent / "mlflow.db")
    scores = [float(i) for i in range(iterations)]
    changes = [f"num_iterations={iterations}", "checkpoint.every=1", "tracking.trace_every=null"]  # no artifacts
    run = made_run(path, scores, changes=changes, **made)
    for iteration in (2, 3):
        add_checkpoint(run, iteration)
    (path / "report.png").write_bytes(b"png")
    (path / "view.html").write_text("<p>")
    return run


def add_checkpoint(run: RunFolder, iteration: int) -> None:
    """A checkpoint whose policy is one small file."""
    policy = run.checkpoint_path(iteration) / "policy"
    policy.mkdir(parents=True)
    (policy / "config.json").write_text("{}")
    (policy.parent / "manifest.json").write_text("{}")


def send(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Send a run as a resume does, which is another process; returns the warnings."""
    from mlflow.tracking._tracking_service import utils

    said: list[str] = []
    utils._artifact_repos_cache.clear()
    with monkeypatch.context() as patched:
        for logger in (
            tracking.logger,
            logging.getLogger("tasks.tracking.sqlite_store"),
            logging.getLogger("tasks.tracking.models"),
        ):
            patched.setattr(logger, "warning", lambda text, *values: said.append(text % values))
        patched.setattr("tasks.tracking.outbox.LAST_TRIES", 1)
        with tracking.Tracker(RunFolder.open(run.path), {}):
            pass
    return said


def client_of(run: RunFolder) -> Any:
    """A client of the store beside a run."""
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{run.path.parent / 'mlflow.db'}")


def ledger_of(run: RunFolder) -> Ledger:
    """What the run folder says of its run in the tracker."""
    return Ledger.of(run.path)
