"""Chain: train again whenever there is something new, and promote what passes the gate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows import stopping
from flows.commands.options import ConfigOption, SetOption, console, local_only, prepare_environment
from rlhf_core.contracts.config_places import naming_places


def chain(
    config: ConfigOption,
    runs: Annotated[
        Path, typer.Option(callback=local_only, help="Folder of the chain: its record and its run folders.")
    ],
    held_out: Annotated[str, typer.Option(help="Prompts that were not trained on: a file, folder or hub id.")],
    min_win_rate: Annotated[
        float | None, typer.Option(help="The lower end of its 95 % interval must reach it; default: 0.55.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Nats a response; the upper end of its 95 % interval; default: 10.")
    ] = None,
    alias: Annotated[str | None, typer.Option(help="Of the registered model; default: production.")] = None,
    reward_model: Annotated[
        str | None,
        typer.Option(metavar="NAME@ALIAS", help="A reward model of MLflow's registry; default: the config's."),
    ] = None,
    column: Annotated[str | None, typer.Option(help="Of the held-out prompts; default: the run's.")] = None,
    num_prompts: Annotated[int | None, typer.Option(help="Held-out prompts, at most; default: 64.")] = None,
    samples: Annotated[int | None, typer.Option(help="Responses of the policy to each; default: 8.")] = None,
    frontier_samples: Annotated[
        int | None, typer.Option(help="Responses of the reference to each; default: 64.")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Train if prompts, models or config are new; evaluate; promote the policy if it passes the gate."""
    prepare_environment()
    from rlhf_core.contracts.config_io import load_config
    from rlhf_core.evaluation.gate import gate_of

    run_config = load_config(config, set_ or [])
    gate = gate_of(
        prompts=held_out, column=column, num_prompts=num_prompts, samples=samples, frontier_samples=frontier_samples,
        min_win_rate=min_win_rate, max_kl=max_kl, alias=alias,
    )  # fmt: skip
    stopping.on_stop(lambda: "stopped; the same command goes on where it was")
    from flows.calling import run_flow
    from flows.chain import chain as chain_flow
    from flows.displays.terminal import TerminalWatcher
    from flows.progress import watched_by

    watching = TerminalWatcher(console, run_config.num_iterations)
    with naming_places(config), watching as terminal, watched_by(terminal):
        outcome = run_flow(chain_flow, run_config, str(runs), gate, reward_model)
    console.print(outcome, markup=False, highlight=False, soft_wrap=True)
