"""Replay: an iteration computed again and compared, or under other knobs, or packed for somebody else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.options import (
    JsonOption,
    RunArgument,
    RunOrBundle,
    TrustOption,
    console,
    local_only,
    prepare_environment,
    split_interpreter,
)
from rlhf_core.contracts.errors import UserError

EXIT_DIFFERENT = 1


def replay(
    run: RunOrBundle,
    iteration: Annotated[int | None, typer.Option(min=0, help="A finished one; a bundle holds one.")] = None,
    from_: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Begin with this stage; default: all six.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="a.b=c", help="What if: recompute with another knob, e.g. kl.coef=0.2; may be repeated."
        ),
    ] = None,
    sample: Annotated[
        str | None, typer.Option(metavar="ID", help="This response alone, token by token: i000007-p000012-s0.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="CPU threads instead of the run's: does a number depend on them?"),
    ] = None,
    as_json: JsonOption = False,
    trust: TrustOption = None,
) -> None:
    """Compute an iteration again, and prove it bit-identical or show the first difference. Changes nothing.

    Each stage is computed from the stored artifacts of those before it. Exit code 0: identical; 1: different; 2: it
    could not be asked. With --set it tells what would move instead: rewards, advantages, the update; without generating
    again.
    """
    prepare_environment()
    from flows.displays.replay import replay_and_show, what_if_and_show

    overrides, python = split_interpreter(set_)
    if overrides and python is not None:
        raise UserError("--set generation.vllm.python and another --set do not go together: a what-if asks no vLLM")
    if overrides:
        for name, value in (("--from", from_), ("--threads", threads)):
            if value is not None:
                raise UserError(
                    f"{name} {value} and --set do not go together: --set begins with the first stage that its keys "
                    "affect, and computes as the run did"
                )
        what_if_and_show(
            console, run, overrides, iteration=iteration, sample=sample, as_json=as_json, trust=trust or ()
        )
        return
    same = replay_and_show(
        console, run, iteration=iteration, first=from_, sample=sample, num_threads=threads, as_json=as_json,
        trust=trust or (), vllm_python=python,
    )  # fmt: skip
    if not same:
        raise typer.Exit(EXIT_DIFFERENT)


def bundle(
    run: RunArgument,
    iteration: Annotated[int, typer.Option(min=0, help="A finished one.")],
    out: Annotated[
        Path | None,
        typer.Option(callback=local_only, metavar="FILE", help="A new file; default: NAME-i000007.rlhf.zip here."),
    ] = None,
    without_models: Annotated[
        bool, typer.Option("--without-models", help="Small: shaping alone can be replayed from it.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Pack one iteration into one file that a colleague can verify and replay: `rlhf replay FILE`.

    It holds prompts, responses and models, and the run's config with its paths: look whom you send it to.
    """
    prepare_environment()
    from flows.displays.replay import bundle_and_show

    out = out or Path(f"{run.resolve().name}-i{iteration:06d}.rlhf.zip")
    bundle_and_show(console, run, out, iteration=iteration, with_models=not without_models, as_json=as_json)
