"""Whether the tracker of a run will take it, asked before the run begins: mistakes, and what a person may want to know.

An sqlite store is looked at without MLflow, and never made. A server is asked by MLflow's own client, so that its
certificates, headers and passwords count, within a few seconds. A server that is down is no mistake: training goes
on without it. Knows no tracker.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.secrets import without_credentials
from tasks.tracking.outbox import RefusalError, reason
from tasks.tracking.refusals import CREDENTIALS, deleted_experiment, error_code
from tasks.tracking.sqlite_store import database_of, experiment_in, state_of
from tasks.tracking.store import address_problem, misplaced, tracking_uri
from tasks.tracking.tracker import ask_server, prepare_client

DEADLINE_S: Final = 6.0
"""Seconds that a server has to answer."""
_PLAINLY: Final = ("Connection refused", "timed out", "certificate verify failed", "Name or service not known")
"""The words that matter in what the layers below MLflow say."""


@dataclass
class Findings:
    """What a look at the tracker found, one sentence each."""

    problems: list[str] = field(default_factory=list[str])
    """Mistakes: the run would not be tracked."""
    notes: list[str] = field(default_factory=list[str])


def check_tracker(config: RunConfig, runs: Path) -> Findings:
    """Look at the tracker of a run that would be made in a folder. Writes nothing; off where tracking is."""
    found = Findings()
    if not config.tracking.enabled:
        return found
    run = RunFolder(runs / "run", config, {})
    uri = tracking_uri(run)
    database = database_of(uri)
    if problem := address_problem(uri):
        found.problems.append(problem)
    elif database is not None:
        _look_at(database, run, uri, found)
    elif uri.startswith(("http://", "https://")):
        _ask(run, uri, found)
    return found


def server_problem(uri: str, error: Exception) -> tuple[str, bool]:
    """What a server's error means, in a sentence, and whether a person has to do something about it."""
    where, code, said = f"the MLflow server at {without_credentials(uri)}", error_code(error), reason(error)
    if isinstance(error, RefusalError):
        return str(error), True
    if code == "UNAUTHENTICATED" or "401" in said:
        given = os.environ.get("MLFLOW_TRACKING_USERNAME") or os.environ.get("MLFLOW_TRACKING_TOKEN")
        but = "does not know the user or password that it is given" if given else "asks for a user and password"
        return f"{where} {but} (401): {CREDENTIALS}", True
    if code == "PERMISSION_DENIED" or "403" in said:
        return (
            f"{where} refuses (403): the user may not do this, or the server does not accept that address; ask who "
            "runs it for the permission, or for its --allowed-hosts"
        ), True
    if code in ("ENDPOINT_NOT_FOUND", "BAD_REQUEST") or isinstance(error, ValueError) or "valid JSON" in said:
        return f"{where} does not answer as one ({said}): give the address of MLflow itself as tracking.uri", True
    said = next((plain for plain in _PLAINLY if plain in said), said)
    return f"{where} does not answer ({said}): a run goes on without it, and `rlhf resume` sends what it missed", False


def _look_at(database: Path, run: RunFolder, uri: str, found: Findings) -> None:
    try:
        if state_of(database) == "half-made":
            found.notes.append(f"the store {database} is half made and empty: the run puts it aside and makes another")
            return
    except RefusalError as error:
        found.problems.append(str(error))
        return
    except ConnectionError as error:
        found.notes.append(f"the store cannot be read now ({reason(error)}): a run goes on without it")
        return
    above = next(folder for folder in database.absolute().parents if folder.exists())
    if not os.access(database if database.is_file() else above, os.W_OK):
        found.problems.append(f"the store {database} cannot be written: give another tracking.uri, or the permission")
    elif experiment := experiment_in(database, run.config.tracking.experiment):
        experiment_id, is_deleted, place = experiment
        if is_deleted:
            found.problems.append(deleted_experiment(run.config.tracking.experiment, experiment_id, uri))
        elif problem := misplaced(run, run.config.tracking.experiment, place):
            found.problems.append(problem)


def _ask(run: RunFolder, uri: str, found: Findings) -> None:
    def work() -> None:
        try:
            experiment = ask_server(uri, run.config.tracking.experiment, DEADLINE_S / 2)
            if experiment is not None and (
                problem := misplaced(run, str(experiment.name), str(experiment.artifact_location))
            ):
                answered.append((problem, True))
            else:
                answered.append(("", False))
        except Exception as error:  # whatever it is, it is told
            answered.append(server_problem(uri, error))

    answered: list[tuple[str, bool]] = []
    prepare_client()  # seconds of imports, which are not the server's
    thread = threading.Thread(target=work, name="mlflow-check", daemon=True)
    thread.start()
    thread.join(DEADLINE_S)
    silent = (f"the MLflow server at {without_credentials(uri)} has not answered in {DEADLINE_S:g} s: a run goes on "
              "without it, and `rlhf resume` sends what it missed", False)  # fmt: skip
    sentence, is_mistake = answered[0] if answered else silent
    if sentence:
        (found.problems if is_mistake else found.notes).append(sentence)
