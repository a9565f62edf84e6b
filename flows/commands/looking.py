"""Look: into a run while it is going or when it is done, and whether all of it is intact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows import stopping
from flows.commands.options import EXIT_MISTAKE, JsonOption, RunArgument, console, prepare_environment


def inspect(
    run: RunArgument,
    iteration: Annotated[int | None, typer.Option(min=0, help="Show one iteration.")] = None,
    stage: Annotated[str | None, typer.Option(help="Show the rows of one stage's artifact.")] = None,
    sample: Annotated[str | None, typer.Option(help="Show one response token by token.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows shown.")] = 20,
) -> None:
    """Look into a run: works while it is going."""
    from flows.inspect import show_run

    show_run(console, run, iteration=iteration, stage=stage, sample=sample, limit=limit)


def verify(
    run: RunArgument,
    as_json: JsonOption = False,
) -> None:
    """Read again everything a run wrote: what is damaged, and what can be recovered. Works while the run is going."""
    prepare_environment()
    from flows.verify_display import verify_and_show

    if not verify_and_show(console, run, as_json=as_json):
        raise typer.Exit(EXIT_MISTAKE)


def ui(
    runs: Annotated[
        Path | None, typer.Option(help="Folder of run folders, or one of them, whose tracker is shown; default: runs.")
    ] = None,
    tracking_uri: Annotated[str | None, typer.Option(help="Instead: a tracker, as sqlite:///FOLDER/mlflow.db.")] = None,
    mlflow_port: Annotated[int | None, typer.Option(help="Default: 5000, or a free one.")] = None,
    prefect_port: Annotated[int | None, typer.Option(help="Default: 4200, or a free one.")] = None,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Show the pages in a browser.")] = True,
) -> None:
    """Start MLflow's and Prefect's pages on this machine, until Ctrl-C."""
    prepare_environment()
    from flows.ui import show_pages

    stopping.on_stop(lambda: "ended, and what it had started")
    show_pages(console, runs, tracking_uri, mlflow_port=mlflow_port, prefect_port=prefect_port, is_opened=open_)
