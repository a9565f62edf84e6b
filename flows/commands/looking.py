"""Look: into a run while it is going or when it is done, and whether all of it is intact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows import stopping
from flows.commands.options import (
    EXIT_MISTAKE,
    JsonOption,
    LookedAt,
    RunOrBundle,
    console,
    local_only,
    looked_at,
    prepare_environment,
)
from rlhf_core.store.address import shown


def inspect(
    run: LookedAt,
    iteration: Annotated[int | None, typer.Option(min=0, help="Of this iteration; default: the newest.")] = None,
    stage: Annotated[str | None, typer.Option(help="The rows of one stage's artifact.")] = None,
    sample: Annotated[str | None, typer.Option(help="One response token by token.")] = None,
    samples: Annotated[bool, typer.Option("--samples", help="Responses with their main numbers.")] = False,
    by: Annotated[
        str | None, typer.Option(help="Responses, the highest first: score, kl, k3, reward, length or change.")
    ] = None,
    lowest: Annotated[bool, typer.Option("--lowest", help="The lowest first.")] = False,
    finish: Annotated[str | None, typer.Option(help="Responses that ended so: eos, stop or length (cut).")] = None,
    contains: Annotated[str | None, typer.Option(help="Responses that contain this text.")] = None,
    histograms: Annotated[bool, typer.Option("--histograms", help="How their numbers are spread.")] = False,
    iterations: Annotated[
        str | None, typer.Option(help="Responses of several iterations: 0,10,last or 3-7 or all.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="The first so many rows; default: 20 in a terminal, else all.")
    ] = None,
    as_json: JsonOption = False,
    to: Annotated[
        Path | None,
        typer.Option(callback=local_only, help="Write all rows to a file: .parquet, .csv, .jsonl or .arrow."),
    ] = None,
) -> None:
    """Look into a run: works while it is going. `change` is the mean |log-ratio to the reference| of a token."""
    from flows.displays.inspection import Question, show_run
    from rlhf_core.selection import Selection

    question = Question(
        iteration, stage, sample, samples, histograms, iterations, Selection(by, lowest, finish, contains)
    )
    show_run(console, run, question, limit=limit, as_json=as_json, to=to)


def view(
    run: LookedAt,
    iterations: Annotated[
        str | None,
        typer.Option(metavar="0,10,last", help="Numbers, last, ranges as 3-7, or all; default: first, middle, last."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            callback=local_only,
            metavar="FILE.html",
            help="Default: view.html in the run folder; of a run in an object store: NAME-view.html here.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Responses of each iteration; default: all.")] = None,
) -> None:
    """Write a page to read a run in a browser: each response token by token, curves. Works while it is going."""
    prepare_environment()
    from flows.view import write_view

    if out is None and shown(run) != str(run):
        out = Path(f"{run.name}-view.html")
    write_view(console, run, iterations=iterations, out=out, limit=limit)


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN RUN...", help="Two runs or more, also going ones.", parser=looked_at),
    ],
    out: Annotated[
        Path | None,
        typer.Option(callback=local_only, metavar="FILE.png|FILE.html", help="Also draw it: a picture, or a page."),
    ] = None,
    last: Annotated[int, typer.Option(min=1, help="Iterations averaged at the end of each run.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Compare runs: what differs in their configs, what came out, curves. Works while they are going."""
    prepare_environment()
    from flows.displays.comparison import compare_and_show

    compare_and_show(console, runs, last=last, out=out, as_json=as_json)


def verify(
    run: RunOrBundle,
    as_json: JsonOption = False,
) -> None:
    """Read again everything a run wrote: what is damaged, and what can be recovered. Works while the run is going."""
    prepare_environment()
    if run.is_file():
        from flows.displays.replay import verify_and_show_bundle

        verify_and_show_bundle(console, run, as_json=as_json)
        return
    from flows.displays.verification import verify_and_show

    if not verify_and_show(console, run, as_json=as_json):
        raise typer.Exit(EXIT_MISTAKE)


def ui(
    runs: Annotated[
        Path | None,
        typer.Option(
            callback=local_only, help="Folder of run folders, or one of them, whose tracker is shown; default: runs."
        ),
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


def feedback(
    run: LookedAt,
    to: Annotated[
        Path, typer.Option(callback=local_only, metavar="PAIRS.jsonl", help="Write {prompt, chosen, rejected} here.")
    ],
    labels: Annotated[
        Path | None,
        typer.Option(callback=local_only, metavar="FILE.jsonl", help="Also write {prompt, completion, label} here."),
    ] = None,
) -> None:
    """Write what people have said about a run's traces in MLflow as preference rows: `prompts.from_preferences`."""
    prepare_environment()
    from flows.feedback import write_feedback

    write_feedback(console, run, to, labels)
