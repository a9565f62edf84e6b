"""Measure: a policy against its reference, and policies between the two."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from flows import stopping
from flows.commands.options import (
    JsonOption,
    RunArgument,
    SetOption,
    TrustOption,
    console,
    local_only,
    prepare_environment,
)
from rlhf_core.contracts.config_places import naming_places


def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run; or a model, with --config.")],
    prompts: Annotated[
        str | None, typer.Option(help="Held-out prompts: a file, folder or hub id; default: the run's own.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Their column; default: the run's.")] = None,
    checkpoint: Annotated[
        str, typer.Option(help="Of a run: newest, best, last_good, all, or an iteration.")
    ] = "newest",
    num_prompts: Annotated[int, typer.Option(help="At most so many prompts, drawn by the seed.")] = 64,
    samples: Annotated[int, typer.Option(help="Responses of the policy to each prompt.")] = 32,
    frontier_samples: Annotated[
        int, typer.Option(help="Responses of the reference to each prompt: more reach a higher KL.")
    ] = 1024,
    config: Annotated[Path | None, typer.Option(help="For a bare model: the config of its training.")] = None,
    set_: SetOption = None,
    out: Annotated[
        Path | None, typer.Option(callback=local_only, help="Folder of the results; default: in the run.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the evaluation's draws.")] = 0,
    blend: Annotated[
        str | None, typer.Option(help="Also at these shares of the way from the reference to it: 0.5,0.7,0.85.")
    ] = None,
    as_json: JsonOption = False,
    trust: TrustOption = None,
) -> None:
    """Measure a policy against its reference: score, KL, win rate, and the share of what is attainable."""
    prepare_environment()
    from flows.displays.evaluation import evaluate_and_show
    from rlhf_core.evaluation.folder import EVALUATIONS
    from rlhf_core.evaluation.request import Request, accept_of_run, parse_shares, request_config
    from rlhf_core.store.opening import adding, local

    request = Request(
        target, prompts, column, checkpoint, num_prompts, samples, frontier_samples, seed, out and str(out),
        parse_shares(blend),
    )  # fmt: skip
    stopping.on_stop(lambda: "stopped; the same command goes on from the samples that are there")
    with naming_places(config), adding(target, EVALUATIONS):
        accept_of_run(local(target), trust)
        evaluate_and_show(console, request, request_config(local(target), config, set_ or []), as_json=as_json)


def blend(
    run: RunArgument,
    out: Annotated[Path, typer.Option(callback=local_only, help="A new folder for the policy.")],
    share: Annotated[
        float | None, typer.Option(help="Of the way from the reference (0) to the checkpoint (1), in weights.")
    ] = None,
    kl: Annotated[float | None, typer.Option(help="Instead: the KL to the reference it shall have, in nats.")] = None,
    checkpoint: Annotated[str, typer.Option(help="newest, best, last_good, or an iteration.")] = "newest",
    trust: TrustOption = None,
) -> None:
    """Write a policy between the reference and a checkpoint: one run gives one for each smaller KL."""
    prepare_environment()
    from rlhf_core.evaluation.request import accept_of_run
    from tasks.evaluation.blend import blend as write_blend

    accept_of_run(str(run), trust)
    with console.status("interpolating" if kl is None else "looking for the share that has this KL"):
        found = write_blend(str(run), str(out), share=share, kl=kl, checkpoint=checkpoint)
    console.print(f"{found.share:.4g} of the way to checkpoint {found.iteration}", highlight=False)
    if found.kl is not None:
        reach, on = found.kl.high - found.kl.mean, f"{found.num_prompts} prompts x {found.num_samples} responses"
        console.print(f"KL to the reference: {found.kl.mean:.2f} ± {reach:.2f} nats on {on}", highlight=False)
    console.print(Text.assemble(("policy", "bold"), f": {out}"), soft_wrap=True)
