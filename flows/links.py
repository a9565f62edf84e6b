"""What a flow run and the rest of the world know of each other.

RUN/prefect.json    the flow run that worked on the run last: {"api": "...", "flow_run_id": "..."}, sealed
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
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
from rlhf_core.contracts.errors import RlhfError
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


def run_name(what: str, *parameters: str) -> Callable[[], str]:
    """Names a flow run by what it does and to what: the last part of the path that a parameter gives, as it stands.

    Args:
        what: it does.
        parameters: of the flow; one that is not given is left out, and ``run_dir`` is then the folder of its own.
    """

    def name() -> str:
        given = flow_run.parameters
        shown = [given.get(each) or (own_run_dir() if each == "run_dir" else None) for each in parameters]
        return " · ".join([what, *(Path(str(value)).name for value in shown if value)])

    return name


def own_run_dir(runs: str = "runs") -> str:
    """The folder in ``runs`` that this flow run trains in, where it was given none: the same one when it is retried."""
    return _own_run_dir(runs, flow_run.id) if flow_run.id else _new_run_dir(runs)


@functools.lru_cache(maxsize=1)
def _own_run_dir(runs: str, flow_run_id: str) -> str:
    begun = (path.parent for path in Path(runs).glob(f"*/{FILE}") if _works_on(path.parent, flow_run_id))
    return str(next(begun, None) or _new_run_dir(runs))


def _new_run_dir(runs: str) -> str:
    return str(Path(runs) / f"ppo-{datetime.now():%Y%m%d-%H%M%S-%f}")


def was_begun_here(run_dir: str) -> bool:
    """Whether this very flow run has begun this run: it was retried, or suspended and resumed."""
    path = Path(run_dir)
    return bool(flow_run.id) and (path / "run.json").is_file() and _works_on(path, str(flow_run.id))


def _works_on(path: Path, flow_run_id: str) -> bool:
    with suppress(RlhfError, OSError):
        return _remembered(path).get("flow_run_id") == flow_run_id
    return False


def take_over(run: RunFolder) -> None:
    """Remember this flow run in the run folder, and end the one before it in Prefect if it still says Running.

    The caller holds the folder's lock, which proves that the process of the one before is dead.
    """
    if is_bare():
        return
    before, this = (
        _remembered(run.path),
        {"api": without_credentials(PREFECT_API_URL.value() or ""), "flow_run_id": str(flow_run.id)},
    )
    if before == this:
        return
    write_record(run.path / FILE, this)
    if before.get("api") == this["api"]:
        with telling_prefect():
            _mark_crashed(UUID(before["flow_run_id"]))


def _remembered(run_dir: Path) -> dict[str, str]:
    path = run_dir / FILE
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


def tell_all(sentences: Iterable[str]) -> None:
    """Lines in the log of the flow run; the command line has printed them already."""
    if not is_bare():
        for sentence in sentences:
            get_run_logger().info(sentence)


def leave_note(key: str, markdown: str, description: str) -> None:
    """Leave a text in the flow run, where there is one; its list of artifacts shows the description."""
    if not is_bare():
        with telling_prefect():
            create_markdown_artifact(key=key, markdown=markdown, description=description)


def link_to_tracker(page: str | None, uri: str, run_id: str | None) -> None:
    """Leave the way to the tracker's run in the flow run: a link where it has a page, else its store and id."""
    if is_bare() or run_id is None:
        return
    if not page:
        leave_note("mlflow-run", f"MLflow run `{run_id}` in `{uri}`", "Metrics and checkpoints")
        return
    with telling_prefect():
        create_link_artifact(key="mlflow-run", link=page, link_text="MLflow run", description="Metrics and checkpoints")
