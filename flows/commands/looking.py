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


def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN_OR_BUNDLE", help="A run folder, or a bundle of one iteration.")],
    as_json: JsonOption = False,
) -> None:
    """Read again everything a run wrote: what is damaged, and what can be recovered. Works while the run is going."""
    prepare_environment()
    if run.is_file():
        from flows.replay_display import verify_and_show_bundle

        verify_and_show_bundle(console, run, as_json=as_json)
        return
    from flows.verify_display import verify_and_show

    if not verify_and_show(console, run, as_json=as_json):
        raise typer.Exit(EXIT_MISTAKE)
