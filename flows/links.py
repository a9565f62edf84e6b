"""The links between a flow run and its tracker page."""

from __future__ import annotations

from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.runtime import flow_run


def this_flow_run() -> dict[str, str]:
    """Id, name and page of the flow run around the caller; empty outside one."""
    if not flow_run.id:
        return {}
    known = {"flow_run_id": flow_run.id, "flow_run_name": flow_run.name, "flow_run_url": flow_run.ui_url}
    return {name: str(value) for name, value in known.items() if value}


def link_to_tracker(page: str | None, uri: str, run_id: str | None) -> None:
    """Leave the way to the tracker's run in the flow run: a link where it has a page, else its store and id."""
    if not flow_run.id or run_id is None:
        return
    if page:
        create_link_artifact(key="mlflow-run", link=page, link_text="MLflow run", description="Metrics and checkpoints")
    else:
        create_markdown_artifact(key="mlflow-run", markdown=f"MLflow run `{run_id}` in `{uri}`")
