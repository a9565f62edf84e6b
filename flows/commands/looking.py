"""Look: into a run while it is going or when it is done, and whether all of it is intact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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


def view(
    run: RunArgument,
    iterations: Annotated[
        str | None,
        typer.Option(metavar="0,10,last", help="Numbers, last, ranges as 3-7, or all; default: first, middle, last."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Default: view.html in the run folder.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Responses of each iteration; default: all.")] = None,
) -> None:
    """Write a page to read a run in a browser: each response token by token, curves. Works while it is going."""
    prepare_environment()
    from flows.view import write_view

    write_view(console, run, iterations=iterations, out=out, limit=limit)


def verify(
    run: RunArgument,
    as_json: JsonOption = False,
) -> None:
    """Read again everything a run wrote: what is damaged, and what can be recovered. Works while the run is going."""
    prepare_environment()
    from flows.verify_display import verify_and_show

    if not verify_and_show(console, run, as_json=as_json):
        raise typer.Exit(EXIT_MISTAKE)
