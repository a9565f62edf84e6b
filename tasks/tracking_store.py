"""Where the tracker of a run is. Knows no tracker."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_core.contracts.errors import RlhfError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.secrets import without_credentials

DATABASE = "mlflow.db"


def tracking_uri(run: RunFolder) -> str:
    """The configured tracker, MLFLOW_TRACKING_URI, or an sqlite file beside the run folder."""
    return run.config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or _beside(run.path.resolve().parent)


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
    """The id of an experiment that is there. Raises ValueError if its files are not where the config wants them."""
    wanted, place = run.config.tracking.artifact_location, str(experiment.artifact_location)
    if wanted is not None and place.rstrip("/") != wanted.rstrip("/"):
        raise ValueError(
            f"tracking.artifact_location is {wanted}, but the experiment {experiment.name} keeps its files in {place}, "
            "which MLflow never changes: name another tracking.experiment"
        )
    return str(experiment.experiment_id)


def trackers_in(folder: Path) -> list[str]:
    """The trackers of the runs in a folder, or of the run that it is; and the sqlite file that is there anyway."""
    found: set[str] = {_beside(folder.resolve())} if (folder / DATABASE).is_file() else set()
    for record in [folder / "run.json", *folder.glob("*/run.json")]:
        if record.is_file():
            with suppress(RlhfError):  # a damaged run is not why others are not shown
                run = RunFolder.open(record.parent)
                found |= {tracking_uri(run)} if run.config.tracking.enabled else set()
    return sorted(found)


def _beside(folder: Path) -> str:
    return f"sqlite:///{folder / DATABASE}"
