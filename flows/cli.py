"""The ``rlhf`` command. Heavy imports stand inside the commands, so that ``--help`` is instant."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from flows import stopping
from rlhf_core.contracts.errors import GuardStopError, RlhfError
from rlhf_core.contracts.secrets import without_credentials, without_secrets
from rlhf_core.memory import settle_memory

if TYPE_CHECKING:
    from rlhf_core.contracts.config import RunConfig

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
console = Console()
EXIT_MISTAKE = 2
EXIT_GUARD = 3

ConfigOption = Annotated[Path, typer.Option("--config", help="YAML file; `rlhf config` prints a template.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a key; may be repeated.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]


@app.command()
def quickstart(
    folder: Annotated[Path, typer.Option(help="Where the text world and its runs are kept.")] = Path(".quickstart"),
) -> None:
    """A whole run on a small embedded world: no download, a few minutes on two cores."""
    _prepare_environment()
    from flows.quickstart import quickstart as run_quickstart

    run_quickstart(folder, console)


@app.command()
def train(
    config: ConfigOption,
    set_: SetOption = None,
    run_dir: Annotated[Path | None, typer.Option("--run-dir", help="A new folder for the run.")] = None,
) -> None:
    """Train a policy with PPO."""
    _prepare_environment()
    from rlhf_core.contracts.config_io import load_config
    from rlhf_core.contracts.run_folder import check_vacant

    run_config = load_config(config, set_ or [])
    run_dir = run_dir or Path("runs") / f"{config.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    check_vacant(run_dir)
    with console.status("checking the config, models and prompts"):
        from rlhf_core.preflight import preflight

        preflight(run_config)
    from flows.calling import run_flow
    from flows.ppo import train as train_flow

    watch_run(run_dir, run_config, lambda: run_flow(train_flow, run_config, str(run_dir)))


@app.command()
def resume(
    run: RunArgument,
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
        list[str] | None, typer.Option("--set", metavar="guards.a.b=c", help="Change a guard; may be repeated.")
    ] = None,
) -> None:
    """Continue a stopped run from its last committed stage."""
    _prepare_environment()
    from tasks.lifecycle import check_resumable

    if repair:
        from flows.verify_display import repair_and_show

        repair_and_show(console, run)
    with console.status("checking the run, its models and prompts"):
        run_config = check_resumable(str(run), accept_drift=accept_drift)
    from flows.calling import run_flow
    from flows.ppo import resume as resume_flow

    watch_run(run, run_config, lambda: run_flow(resume_flow, str(run), accept_drift, accept_guards, set_))


@app.command()
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


@app.command()
def verify(
    run: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON, and nothing else.")] = False,
) -> None:
    """Read again everything a run wrote: what is damaged, and what can be recovered. Works while the run is going."""
    _prepare_environment()
    from flows.verify_display import verify_and_show

    if not verify_and_show(console, run, as_json=as_json):
        raise typer.Exit(EXIT_MISTAKE)


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder; or a model, with --config.")],
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
    out: Annotated[Path | None, typer.Option(help="Folder of the results; default: in the run.")] = None,
    seed: Annotated[int, typer.Option(help="Of the evaluation's draws.")] = 0,
    blend: Annotated[
        str | None, typer.Option(help="Also at these shares of the way from the reference to it: 0.5,0.7,0.85.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON, and nothing else.")] = False,
) -> None:
    """Measure a policy against its reference: score, KL, win rate, and the share of what is attainable."""
    _prepare_environment()
    from flows.evaluation_display import evaluate_and_show
    from rlhf_core.evaluation.request import Request, parse_shares, request_config

    request = Request(
        target, prompts, column, checkpoint, num_prompts, samples, frontier_samples, seed, out and str(out),
        parse_shares(blend),
    )  # fmt: skip
    stopping.on_stop(lambda: "stopped; the same command goes on from the samples that are there")
    evaluate_and_show(console, request, request_config(target, config, set_ or []), as_json=as_json)


@app.command()
def blend(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="A new folder for the policy.")],
    share: Annotated[
        float | None, typer.Option(help="Of the way from the reference (0) to the checkpoint (1), in weights.")
    ] = None,
    kl: Annotated[float | None, typer.Option(help="Instead: the KL to the reference it shall have, in nats.")] = None,
    checkpoint: Annotated[str, typer.Option(help="newest, best, last_good, or an iteration.")] = "newest",
) -> None:
    """Write a policy between the reference and a checkpoint: one run gives one for each smaller KL."""
    _prepare_environment()
    from tasks.blend import blend as write_blend

    with console.status("interpolating" if kl is None else "looking for the share that has this KL"):
        found = write_blend(str(run), str(out), share=share, kl=kl, checkpoint=checkpoint)
    console.print(f"{found.share:.4g} of the way to checkpoint {found.iteration}", highlight=False)
    if found.kl is not None:
        reach, on = found.kl.high - found.kl.mean, f"{found.num_prompts} prompts x {found.num_samples} responses"
        console.print(f"KL to the reference: {found.kl.mean:.2f} ± {reach:.2f} nats on {on}", highlight=False)
    console.print(f"[bold]policy[/]: {out}", highlight=False, soft_wrap=True)


@app.command("config")
def config_() -> None:
    """Print a commented config with every knob."""
    from rlhf_core.contracts.config_io import config_template

    sys.stdout.write(config_template())


@app.command()
def check(
    config: ConfigOption,
    set_: SetOption = None,
    run_dir: Annotated[
        Path, typer.Option("--run-dir", help="Where the run will be, for its disk's free space.")
    ] = Path("runs"),
) -> None:
    """Check a config against its files and models; print the plan. Loads no weights."""
    _prepare_environment()
    from flows.inspect import show_plan
    from rlhf_core.contracts.config_io import load_config
    from rlhf_core.preflight import preflight

    run_config = load_config(config, set_ or [])
    with console.status("checking the config, models and prompts"):
        plan = preflight(run_config)
    show_plan(console, run_config, plan, run_dir)


def watch_run(run_dir: Path, config: RunConfig, run: object) -> None:
    """Run a flow with live progress, then print its result."""
    from flows.display import TerminalWatcher, print_result
    from flows.progress import watched_by
    from rlhf_core.contracts.run_folder import RunFolder
    from rlhf_core.inspection import before_and_after, iteration_rows
    from tasks.tracking import shown_tracking_uri

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
        tracking_uri=shown_tracking_uri(folder),
    )


def how_to_go_on(run_dir: Path) -> str:
    """What a person reads when a run was stopped."""
    if (run_dir / "run.json").is_file():
        return f"stopped; continue with  rlhf resume {run_dir}"
    return "stopped before the run began; the same command starts it"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: a deliberate error is printed in one sentence each, with exit code 2, or 3 if a guard stopped.

    Ctrl-C ends with 130, SIGTERM with 143, within seconds, and with how to go on.
    """
    code = 1
    try:
        with stopping.watching_signals(until_the_end=arguments is None):
            code = _run(arguments)
    except KeyboardInterrupt:  # once more, while it was told
        code = stopping.exit_code()
    finally:
        if arguments is None:  # the process ends here
            stopping.end_in_time(code)
    raise SystemExit(code)


def _run(arguments: Sequence[str] | None) -> int:
    """Run a command; returns the exit code."""
    try:
        app(arguments, standalone_mode=True)
    except SystemExit as end:
        if stopping.received() is None:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
    except RlhfError as error:
        if stopping.received() is not None:  # what a stage that was abandoned says on its way out
            return _stopped()
        errors = Console(stderr=True, soft_wrap=True, highlight=False)
        for line in str(error).splitlines():
            errors.print(("" if line.startswith(" ") else "[red]error:[/] ") + escape(line))
        return EXIT_GUARD if isinstance(error, GuardStopError) else EXIT_MISTAKE
    except BaseException as error:
        if stopping.received() is None:
            if arguments is not None or not isinstance(error, Exception):
                raise
            sys.stderr.write(without_secrets(traceback.format_exc()))
            return 1
    return _stopped()


def _stopped() -> int:
    """Say how to go on, unless it was said; returns the exit code of the signal."""
    if words := stopping.last_words():
        console.print(words, highlight=False, soft_wrap=True, style="yellow")
    return stopping.exit_code()


def _prepare_environment() -> None:
    """Quiet and private defaults for the libraries; whatever the user has set stays."""
    settle_memory()
    defaults = {
        "DO_NOT_TRACK": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",  # never pickle
        "PREFECT_API_REQUEST_TIMEOUT": "10",
        "PREFECT_CLIENT_MAX_RETRIES": "2",  # 2 + 4 s for an API that is gone: the run goes on without it
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # the shortest: deployments/zombies.yaml waits for three
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_LEVEL": "CRITICAL",  # errors reach the terminal as exceptions, once
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    api = os.environ.get("PREFECT_API_URL", "")
    if without_credentials(api) != api:  # Prefect logs and stores the address of its pages
        defaults["PREFECT_UI_URL"] = without_credentials(api).removesuffix("/").removesuffix("/api")
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
