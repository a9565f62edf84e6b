"""Where the tracker of a run is. Knows no tracker."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_core.contracts.config import absolute_sqlite
from rlhf_core.contracts.errors import RlhfError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.secrets import without_credentials
from tasks.tracking.outbox import LEDGER, Ledger, RefusalError
from tasks.tracking.sqlite_store import database_of, experiments_with
from tasks.tracking.view import VIEW_TAG

DATABASE = "mlflow.db"


def tracking_uri(run: RunFolder) -> str:
    """The configured tracker, MLFLOW_TRACKING_URI, or an sqlite file beside the run folder.

    An sqlite file that was moved or copied together with the run folder is the one beside it, not the one before.
    """
    configured = run.config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not configured:
        return _beside(run.path.resolve().parent)
    uri = absolute_sqlite(configured)
    return _moved_along(run, uri) if run.config.tracking.uri else uri


def address_problem(uri: str) -> str | None:
    """Why MLflow takes no such address, in a sentence; None if it may. Asks nobody."""
    if ("://" in uri and not uri.startswith("file:")) or uri.partition(":")[0] in ("databricks", "databricks-uc", "uc"):
        return None
    if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):
        return None
    folder = uri.removeprefix("file://")
    return (
        f"the tracker {without_credentials(uri)!r} is a folder, and MLflow keeps runs in no folder any more: give "
        f"sqlite:///{folder.rstrip('/')}/{DATABASE}, or leave tracking.uri and MLFLOW_TRACKING_URI out for {DATABASE} "
        "beside the runs; `mlflow migrate-filestore` takes old runs over"
    )


def shown_tracking_uri(run: RunFolder) -> str:
    """The tracker as it may be shown and stored: without user, password or key."""
    return without_credentials(tracking_uri(run))


def artifact_location(run: RunFolder) -> str | None:
    """Where a new experiment keeps its files: as configured, beside an sqlite store; None: its server says."""
    if run.config.tracking.artifact_location is not None:
        return run.config.tracking.artifact_location
    if tracking_uri(run).startswith("sqlite:"):
        return (run.path.resolve().parent / "mlartifacts").as_uri()
    return None


def kept_experiment(run: RunFolder, experiment: Any) -> str:
    """The id of an experiment that is there. Raises RefusalError if its files are not where the config wants them."""
    if problem := misplaced(run, str(experiment.name), str(experiment.artifact_location)):
        raise RefusalError(problem)
    return str(experiment.experiment_id)


def misplaced(run: RunFolder, name: str, place: str) -> str | None:
    """Why an experiment's place of files is not the configured one, in a sentence; None if it is."""
    wanted = run.config.tracking.artifact_location
    if wanted is None or place.rstrip("/") == wanted.rstrip("/"):
        return None
    return (
        f"tracking.artifact_location is {wanted}, but the experiment {name} keeps its files in {place}, which MLflow "
        "never changes: name another tracking.experiment"
    )


def trackers_in(folder: Path) -> list[str]:
    """The trackers of the runs in a folder, or of the run that it is; and the sqlite file that is there anyway."""
    found: set[str] = {_beside(folder.resolve())} if (folder / DATABASE).is_file() else set()
    for record in [folder / "run.json", *folder.glob("*/run.json")]:
        if record.is_file():
            with suppress(RlhfError):  # a damaged run is not why others are not shown
                run = RunFolder.open(record.parent)
                found |= {tracking_uri(run)} if run.config.tracking.enabled else set()
    return sorted(found)


def _moved_along(run: RunFolder, uri: str) -> str:
    """The address of an sqlite file where it is now, if it was moved or copied together with the run folder."""
    database, home = database_of(uri), ""
    with suppress(RlhfError, OSError, TypeError):
        home = Ledger.of(run.path).home
    here = run.path.resolve()
    if database is None or not home or not Path(home).is_absolute() or Path(home) == here:
        return uri
    around = Path(home).parent
    if not database.is_relative_to(around):
        return uri
    moved = here.parent / database.relative_to(around)
    return f"sqlite:///{moved}" if moved.is_file() else uri


def experiments_in(folder: Path, uri: str) -> list[str]:
    """The experiments of a tracker that have our view: those of an sqlite store, else those of the runs in a folder."""
    if database := database_of(uri):
        return experiments_with(database, VIEW_TAG)
    found: set[str] = set()
    for record in [folder / LEDGER, *folder.glob(f"*/{LEDGER}")]:
        with suppress(RlhfError, OSError, TypeError):
            ledger = Ledger.of(record.parent)
            if ledger.experiment_id and ledger.tracker == without_credentials(uri):
                found.add(ledger.experiment_id)
    return sorted(found)


def _beside(folder: Path) -> str:
    return f"sqlite:///{folder / DATABASE}"
