"""Sweep: many runs of one config, and which of them is the best."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from flows import stopping
from flows.commands.options import (
    EXIT_INCOMPLETE,
    ConfigOption,
    JsonOption,
    SetOption,
    console,
    local_only,
    prepare_environment,
)
from rlhf_core.contracts.config_places import naming_places
from rlhf_core.contracts.errors import UserError

Found = TypeVar("Found")


def sweep(
    config: ConfigOption,
    grid: Annotated[
        list[str] | None, typer.Option(metavar="a.b=v,w", help="Values that a key takes in turn; may be repeated.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="How many, as 3, or which, as 1,2,5; default: the config's own.")
    ] = None,
    set_: SetOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--run-dir",
            "--out",
            callback=local_only,
            help="Folder of the sweep; default: runs/<config>-sweep. One that was begun goes on.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time; each has its share of the cores.")] = 1,
    at_kl: Annotated[
        float | None, typer.Option(help="The best point: highest score among those with at most so many nats of KL.")
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="Otherwise: highest score - price x KL; default: the config's kl.coef.")
    ] = None,
    max_runs: Annotated[
        int | None, typer.Option(help="More are refused, in case they are not meant; default: 64.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train every combination of a grid with every seed, and find the best. The same command goes on after a stop."""
    prepare_environment()
    from flows.displays.sweep import sweep_and_show
    from rlhf_core.contracts.config_io import load_config
    from rlhf_core.sweeping.grid import MAX_RUNS, parse_grid, parse_seeds
    from tasks.sweep.runs import SweepRequest

    problems: list[str] = []

    def attempt(find: Callable[[], Found]) -> Found | None:
        try:
            return find()
        except UserError as error:
            problems.extend(error.problems)
            return None

    run_config = attempt(lambda: load_config(config, set_ or []))
    axes = attempt(lambda: parse_grid(grid or [], set_ or []))
    numbers = attempt(lambda: parse_seeds(seeds, run_config.seed if run_config else 0))
    if problems or run_config is None or axes is None:
        raise UserError(*problems)
    out = out or Path("runs") / f"{config.stem}-sweep"
    stopping.on_stop(lambda: f"stopped; the same command goes on: what is finished stays, in {out}")
    request = SweepRequest(str(out), axes, numbers, jobs, at_kl, price, max_runs or MAX_RUNS)
    with naming_places(config):
        is_complete = sweep_and_show(console, request, run_config, as_json=as_json)
    if not is_complete:
        raise typer.Exit(EXIT_INCOMPLETE)
