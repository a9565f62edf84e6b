"""Keep: which runs there are, and which of them go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.options import EXIT_INCOMPLETE, JsonOption, console, local_only, prepare_environment

FolderArgument = Annotated[
    Path, typer.Argument(metavar="FOLDER", callback=local_only, help="Folder of runs; default: runs.")
]


def runs(folder: FolderArgument = Path("runs"), as_json: JsonOption = False) -> None:
    """List the runs of a folder: state, iterations, last score and KL, size, age. Those of sweeps and chains, too."""
    from flows.displays.runs import show_runs

    show_runs(console, folder, as_json=as_json)


def clean(
    folder: FolderArgument = Path("runs"),
    older_than: Annotated[
        str | None, typer.Option(metavar="30d", help="Runs that nothing was written in for so long: s, min, h, d, w.")
    ] = None,
    keep: Annotated[int | None, typer.Option(metavar="N", help="The newest N runs of the folder stay.")] = None,
    larger_than: Annotated[str | None, typer.Option(metavar="10GB", help="Runs of more bytes: kB, MB, GB, TB.")] = None,
    state: Annotated[
        list[str] | None, typer.Option(help="stopped, finished or damaged; may be repeated; default: all of them.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead of runs: checkpoints that are neither the newest nor the best, or artifacts of iterations "
            "before the newest checkpoint; may be repeated. Such a run still goes on."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this it is only shown.")] = False,
    ignore_registry: Annotated[
        bool, typer.Option("--ignore-registry", help="Also what MLflow's aliases may name: it is not asked.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show which runs meet all criteria; --yes removes them. Never one that is at work, or that an alias names."""
    prepare_environment()
    from flows.displays.runs import clean_and_show
    from rlhf_core.cleaning import wanted

    what = wanted(older_than, keep, larger_than, state or [], only or [])
    is_done = clean_and_show(console, folder, what, does_it=yes, asks_registry=not ignore_registry, as_json=as_json)
    if not is_done:
        raise typer.Exit(EXIT_INCOMPLETE)
