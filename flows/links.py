"""What a flow run and the rest of the world know of each other.

RUN/prefect.json    the flow run that worked on the run last: {"api": "...", "flow_run_id": "..."}, sealed
"""

from __future__ import annotations

import logging
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Crashed

from flows.calling import is_bare
from flows.outages import telling_prefect
from rlhf_core.contracts.records import read_record, write_record
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.secrets import without_credentials

FILE = "prefect.json"
logger = logging.getLogger(__name__)


def this_flow_run() -> dict[str, str]:
    """Id, name and page of the flow run around the caller; empty outside one."""
    if is_bare():
        return {}
    known = {"flow_run_id": flow_run.id, "flow_run_name": flow_run.name, "flow_run_url": flow_run.ui_url}
    has_page = str(flow_run.ui_url).startswith("http")  # a temporary server has none
    known = {name: value for name, value in known.items() if name != "flow_run_url" or has_page}
    return {name: without_credentials(str(value)) for name, value in known.items() if value}


def take_over(run: RunFolder) -> None:
    """Remember this flow run in the run folder, and end the one before it in Prefect if it still says Running.

    The caller holds the folder's lock, which proves that the process of the one before is dead.
    """
    if is_bare():
        return
    before, this = (
        _remembered(run),
        {"api": without_credentials(PREFECT_API_URL.value() or ""), "flow_run_id": str(flow_run.id)},
    )
    if before == this:
        return
    write_record(run.path / FILE, this)
    if before.get("api") == this["api"]:
        with telling_prefect():
            _mark_crashed(UUID(before["flow_run_id"]))


def _remembered(run: RunFolder) -> dict[str, str]:
    path = run.path / FILE
    if not path.is_file():
        return {}
    return {name: str(value) for name, value in read_record(path).items()}


def _mark_crashed(dead: UUID) -> None:
    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(dead).state
        except ObjectNotFound:  # its server's database is gone
            return
        if state is not None and (state.is_running() or state.is_pending()):
            message = f"Its process is dead; flow run {flow_run.id} has resumed the run."
            client.set_flow_run_state(dead, Crashed(message=message), force=True)


def warn(sentence: str) -> None:
    """A line in the log of the flow run, or of the process where there is none."""
    if is_bare():
        logger.warning(sentence)
    else:
        get_run_logger().warning(sentence)


def leave_note(key: str, markdown: str) -> None:
    """Leave a text in the flow run, where there is one."""
    if not is_bare():
        with telling_prefect():
            create_markdown_artifact(key=key, markdown=markdown)


def link_to_tracker(page: str | None, uri: str, run_id: str | None) -> None:
    """Leave the way to the tracker's run in the flow run: a link where it has a page, else its store and id."""
    if is_bare() or run_id is None:
        return
    if not page:
        leave_note("mlflow-run", f"MLflow run `{run_id}` in `{uri}`")
        return
    with telling_prefect():
        create_link_artifact(key="mlflow-run", link=page, link_text="MLflow run", description="Metrics and checkpoints")
