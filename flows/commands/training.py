"""Train: from a config to a policy, and on after a stop."""

from __future__ import annotations

import sys
from contextlib import suppress
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from flows import stopping
from flows.commands.options import (
    A_RUN,
    ConfigOption,
    SetOption,
    TrustOption,
    console,
    prepare_environment,
    split_interpreter,
)
from flows.displays.prompts import checking
from flows.visible import write_json_text
from rlhf_core.contracts.config_places import naming_places
from rlhf_core.contracts.errors import RlhfError
from rlhf_core.store.address import shown


class World(StrEnum):
    """What a quickstart trains."""

    embedded = "embedded"
    real = "real"


class Judge(StrEnum):
    """What rewards the real model of a quickstart."""

    function = "function"
    model = "model"


CHECKING = "checking the config, models and prompts"

if TYPE_CHECKING:
    from rlhf_core.contracts.config import RunConfig


def quickstart(
    folder: Annotated[Path, typer.Option(help="Where the worlds and their runs are kept.")] = Path(".quickstart"),
    model: Annotated[
        World, typer.Option(help="embedded: a small world, made on the spot. real: a chat model of 135 M parameters.")
    ] = World.embedded,
    reward: Annotated[
        Judge,
        typer.Option(help="With --model real: function (positive, one sentence), or a model fitted to --reviews."),
    ] = Judge.function,
    reviews: Annotated[
        Path | None,
        typer.Option(help="With --reward model: a folder of sentences of praise (.pos) and blame (.neg)."),
    ] = None,
) -> None:
    """A whole run on a small embedded world: no download, a few minutes on two cores. Or on a real chat model."""
    refuse_mixed(model, reward, reviews)
    prepare_environment()
    from flows.quickstart import quickstart as run_quickstart
    from flows.quickstart import real_quickstart

    if model is World.embedded:
        run_quickstart(folder, console)
    else:
        real_quickstart(folder, console, reward=reward.value, reviews=reviews)


def refuse_mixed(model: str, reward: str, reviews: object) -> None:
    """Raise UserError unless the choices of a quickstart fit together.

    Args:
        model: embedded or real.
        reward: function or model.
        reviews: the folder that is named; empty or None for none.
    """
    from rlhf_core.contracts.errors import UserError

    for field, value, choices in (("model", model, World), ("reward", reward, Judge)):
        if value not in list(choices):
            raise UserError(f"{field} is {value!r}; choose {' or '.join(choices)}")
    if model == World.embedded and (reward == Judge.model or reviews):
        raise UserError(
            "--reward and --reviews belong to --model real: the embedded world has a reward model of its own"
        )
    if (reward == Judge.model) != bool(reviews):
        raise UserError(
            "--reward model and --reviews FOLDER belong together: the reward model is fitted to sentences of praise "
            "(a file that ends in .pos) and blame (.neg), a sentence a line"
        )


def train(
    config: ConfigOption,
    set_: SetOption = None,
    run_dir: Annotated[
        str | None, typer.Option("--run-dir", help="A new folder for the run, or s3://BUCKET/PREFIX.")
    ] = None,
) -> None:
    """Train a policy with PPO."""
    prepare_environment()
    from rlhf_core.contracts.config_io import load_config
    from rlhf_core.store.opening import check_new, writing

    with naming_places(config):
        run_config = load_config(config, set_ or [])
        run_dir = run_dir or f"runs/{config.stem}-{datetime.now():%Y%m%d-%H%M%S}"
        check_new(run_dir)
        with checking(console, CHECKING) as progress:
            from rlhf_core.preflight import preflight

            plan = preflight(run_config, progress)
    for note in plan.notes:
        console.print(Text.assemble(("note", "bold"), f"  {shown(note)}"))
    check_address(run_config)
    from flows.calling import run_flow
    from flows.ppo import train as train_flow

    with writing(run_dir) as folder:
        watch_run(folder, run_config, lambda: run_flow(train_flow, run_config, run_dir))


def resume(
    run: Annotated[str, typer.Argument(metavar="RUN", help=A_RUN)],
    accept_drift: Annotated[
        bool, typer.Option(help="Go on although machine, libraries, models or prompts differ.")
    ] = False,
    accept_guards: Annotated[
        bool, typer.Option(help="Go on although a guard has stopped it, until its number is back within the threshold.")
    ] = False,
    repair: Annotated[
        bool, typer.Option(help="First compute again what is damaged, and put it in place if its digests are the same.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="guards.a.b=c",
            help="Change a guard, execution.update.* or generation.vllm.python; may be repeated.",
        ),
    ] = None,
    trust: TrustOption = None,
    iterations: Annotated[
        int | None,
        typer.Option(min=1, help="Of the whole run from now on: a finished run goes on to more of them."),
    ] = None,
) -> None:
    """Continue a stopped run from its last committed stage, or a finished one to more iterations."""
    prepare_environment()
    from rlhf_core.contracts.run_folder import RunFolder
    from rlhf_core.store.opening import writing
    from tasks.lifecycle.extension import plan_extension
    from tasks.lifecycle.start import check_resumable, consent

    others, python = split_interpreter(set_)
    with writing(run, new=False) as folder:
        consent(str(folder), trust or (), python)
        if repair:
            from flows.displays.verification import repair_and_show

            repair_and_show(console, folder)
        with console.status("checking the run, its models and prompts"):
            run_config = check_resumable(str(folder), accept_drift=accept_drift)
            plan = None if iterations is None else plan_extension(RunFolder.open(folder), iterations)
        if plan is not None:
            run_config = plan.config
            for sentence in plan.sentences:
                console.print(Text.assemble(("note", "bold"), f"  {shown(sentence)}"), soft_wrap=True, highlight=False)
        from flows.calling import run_flow
        from flows.ppo import resume as resume_flow

        update = [override for override in others if override.strip().startswith("execution.update.")]
        guards = [override for override in others if override not in update]
        asked = (run, accept_drift, accept_guards, guards, update, trust, python, iterations)
        watch_run(folder, run_config, lambda: run_flow(resume_flow, *asked))


def check(
    config: ConfigOption,
    set_: SetOption = None,
    run_dir: Annotated[
        str, typer.Option("--run-dir", help="Where the run will be, for its disk's free space.")
    ] = "runs",
    hardware: Annotated[
        list[str] | None,
        typer.Option(
            "--hardware",
            metavar="8xH100",
            help="Instead: what an iteration would need there, 4x8xH100 being four nodes. Reads config.json of the "
            "models, and nothing else of them; may be repeated.",
        ),
    ] = None,
    with_probe: Annotated[
        bool, typer.Option("--probe", help="Load the models and try them on a few rows, as every training does first.")
    ] = False,
    show_prompts: Annotated[
        int,
        typer.Option("--show-prompts", metavar="N", min=0, help="Print N prompts token by token, as models read them."),
    ] = 0,
) -> None:
    """Check a config against its files and models; print the plan. Loads no weights without --probe."""
    prepare_environment()
    if hardware:
        _show_forecasts(config, set_, hardware)
        return
    from flows.displays.plan import show_plan
    from rlhf_core.contracts.config_io import load_config
    from rlhf_core.preflight import preflight
    from rlhf_core.store.opening import copy_of

    with naming_places(config):
        run_config = load_config(config, set_ or [])
        with checking(console, CHECKING) as progress:
            plan = preflight(run_config, progress)
        with console.status("asking the tracker"):
            plan.notes.extend(tracker_notes(run_config, copy_of(run_dir)))
        if with_probe:
            from rlhf_core.preflight.probe import probe

            with console.status("loading the models and trying them"):
                plan.notes.extend(probe(run_config, plan))
    show_plan(console, run_config, plan, copy_of(run_dir))
    if show_prompts:
        from flows.displays.prompts import show_prompts as show

        show(console, run_config, plan, show_prompts)


def check_address(config: RunConfig) -> None:
    """Raise UserError if the tracker's address is one that MLflow never takes. Asks nobody."""
    import os

    from rlhf_core.contracts.errors import UserError
    from tasks.tracking.store import address_problem

    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if config.tracking.enabled and uri and (problem := address_problem(uri)):
        raise UserError(problem)


def tracker_notes(config: RunConfig, runs: Path) -> list[str]:
    """What to know about the tracker of a run. Raises UserError if it would not take the run."""
    from rlhf_core.contracts.errors import UserError
    from tasks.tracking.check import check_tracker

    found = check_tracker(config, runs)
    if found.problems:
        raise UserError(*found.problems)
    return found.notes


def _show_forecasts(config: Path, set_: list[str] | None, names: list[str]) -> None:
    """Of a config on each hardware that is named."""
    from flows.displays.forecast import show_forecast
    from rlhf_core.contracts.config_io import load_config
    from rlhf_core.costs.forecast import forecast
    from rlhf_core.costs.hardware import parse_hardware

    with naming_places(config), console.status("reading the models' shapes"):
        run_config, asked = load_config(config, set_ or []), [parse_hardware(name) for name in names]
        found = [forecast(run_config, hardware) for hardware in asked]
    for each in found:
        show_forecast(console, each)


def config(
    for_model: Annotated[
        str | None, typer.Option(help="A policy's folder or hub id: print what fits it, and why.")
    ] = None,
    prompts: Annotated[str | None, typer.Option(help="With --for-model: a file or data set of prompts.")] = None,
    reward: Annotated[
        str | None, typer.Option(help="With --for-model: a reward model, or a ready-made function.")
    ] = None,
) -> None:
    """Print a commented config: every knob, or with --for-model what fits a model, with reasons."""
    from rlhf_core.contracts.config_io import config_template
    from rlhf_core.contracts.errors import UserError

    if for_model is None:
        if prompts is not None or reward is not None:
            raise UserError("--prompts and --reward belong to --for-model: name the policy's folder there")
        sys.stdout.write(config_template())
        return
    prepare_environment()
    from rlhf_core.model_fit import fit_config

    with console.status("reading the model's files"):
        fitted = fit_config(for_model, prompts, reward)
    write_json_text(fitted.to_yaml())


def watch_run(run_dir: Path, config: RunConfig, run: object) -> None:
    """Run a flow with live progress, then print its result."""
    from flows.displays.terminal import TerminalWatcher, print_result
    from flows.progress import watched_by
    from rlhf_core.contracts.run_folder import RunFolder
    from rlhf_core.inspection import before_and_after, iteration_rows
    from tasks.tracking.store import shown_tracking_uri

    assert callable(run)
    done = 0
    with suppress(RlhfError):
        done = RunFolder.open(run_dir).num_finished()
    stopping.on_stop(lambda: how_to_go_on(run_dir))
    with TerminalWatcher(console, config.num_iterations, done) as terminal, watched_by(terminal):
        run()
    folder = RunFolder.open(run_dir)
    print_result(
        console,
        str(run_dir),
        iteration_rows(folder),
        before_and_after(folder),
        kl_target=config.kl.held_at,
        tracking_uri=shown_tracking_uri(folder) if folder.config.tracking.enabled else "",
    )


def how_to_go_on(run_dir: Path) -> str:
    """What a person reads when a run was stopped."""
    if (run_dir / "run.json").is_file():
        return shown(f"stopped; continue with  rlhf resume {run_dir}")
    return "stopped before the run began; the same command starts it"
