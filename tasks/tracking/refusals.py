"""What a tracker does not take until a person has done something, with a remedy that works. Knows no tracker.

An outage ends by itself, and the next resume sends the rest. A deleted run, a purged experiment, a wrong password or
a server that is too old do not: each is named, and nobody is promised that a resume is enough.
"""

from __future__ import annotations

from typing import Any, Final

from rlhf_core.contracts.secrets import without_credentials
from rlhf_core.store.address import shown
from tasks.tracking.outbox import GoneError, RefusalError, reason

DELETED: Final = "deleted"
OLDEST_MAJOR: Final = 3
"""MLflow's first major version with logged models, which checkpoints become."""
CREDENTIALS: Final = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
_LASTING: Final = frozenset(
    {
        "BAD_REQUEST",
        "CUSTOMER_UNAUTHORIZED",
        "ENDPOINT_NOT_FOUND",
        "FEATURE_DISABLED",
        "INVALID_PARAMETER_VALUE",
        "INVALID_STATE",
        "NOT_FOUND",
        "NOT_IMPLEMENTED",
        "PERMISSION_DENIED",
        "RESOURCE_ALREADY_EXISTS",
        "RESOURCE_DOES_NOT_EXIST",
        "RESOURCE_LIMIT_EXCEEDED",
        "UNAUTHENTICATED",
    }
)
"""Error codes of MLflow that the same request meets again."""


def refusal(error: Exception, place: object) -> str | None:
    """What a person has to do about an error of the tracker, in a sentence; None for an outage, which passes.

    Args:
        error: as the tracker's client raised it.
        place: the run folder, or the sweep's.
    """
    if isinstance(error, RefusalError):
        return str(error)
    if error_code(error) == "UNAUTHENTICATED":
        return f"it asks for a user and password (401): {CREDENTIALS}, and `rlhf resume {shown(str(place))}` sends it"
    if is_final(error):
        return (
            f"it refuses ({reason(error)}): `rlhf resume {shown(str(place))}` tries again once that is put right; "
            "the run folder has everything"
        )
    return None


def error_code(error: Exception) -> str:
    """MLflow's code of an error; empty for an error of anything else."""
    return str(getattr(error, "error_code", "") or "")


def is_final(error: Exception) -> bool:
    """Whether the same request would meet the same error again."""
    return error_code(error) in _LASTING


def is_missing(error: Exception) -> bool:
    """Whether an error says that what was asked for is not there."""
    return error_code(error) in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")


def check_experiment(experiment: Any, uri: str) -> None:
    """Raise RefusalError if an experiment is deleted."""
    if experiment.lifecycle_stage == DELETED:
        raise RefusalError(deleted_experiment(str(experiment.name), str(experiment.experiment_id), uri))


def deleted_experiment(name: str, experiment_id: str, uri: str) -> str:
    """What to do about a deleted experiment, in a sentence."""
    return (
        f"the experiment {name} is deleted there: restore it with  MLFLOW_TRACKING_URI={without_credentials(uri)} "
        f"mlflow experiments restore --experiment-id {experiment_id}  and resume; new runs may also name another "
        "tracking.experiment"
    )


def find_experiment(client: Any, experiment_id: str, uri: str, place: object) -> Any:
    """The experiment of a run that was begun, under whatever name it has now.

    Raises: GoneError if it is not there; RefusalError if it is deleted.
    """
    try:
        found = client.get_experiment(experiment_id)
    except Exception as error:
        if not is_missing(error):
            raise
        raise GoneError(_gone(f"experiment {experiment_id}", uri, place)) from None
    check_experiment(found, uri)
    return found


def check_run(client: Any, run_id: str, uri: str, place: object) -> None:
    """Raise GoneError if a run is not in the tracker, and RefusalError if it is deleted there."""
    try:
        found = client.get_run(run_id)
    except Exception as error:
        if not is_missing(error):
            raise
        raise GoneError(_gone(f"run {run_id}", uri, place)) from None
    if found.info.lifecycle_stage == DELETED:
        raise RefusalError(
            f"its run {run_id} is deleted there: restore it with  MLFLOW_TRACKING_URI={without_credentials(uri)} "
            f"mlflow runs restore --run-id {run_id}  and `rlhf resume {shown(str(place))}` sends the rest"
        )


def check_version(version: str, uri: str) -> None:
    """Raise RefusalError if a server's version is too old. What is no version says nothing: a proxy may answer."""
    major = version.strip().partition(".")[0]
    if major.isdecimal() and int(major) < OLDEST_MAJOR:
        raise RefusalError(
            f"the server at {without_credentials(uri)} is MLflow {version.strip()[:20]}, and checkpoints need the "
            f"logged models of MLflow {OLDEST_MAJOR} or newer: upgrade it, or leave tracking.uri out for a store "
            "beside the runs"
        )


def _gone(what: str, uri: str, place: object) -> str:
    where = shown(str(place))
    return (
        f"{without_credentials(uri)} has no {what}: it was removed for good, or this is not the tracker that the run "
        f"was begun in; name that one in MLFLOW_TRACKING_URI, or remove {where}/mlflow.json, and `rlhf resume {where}` "
        "sends everything to a new run"
    )
