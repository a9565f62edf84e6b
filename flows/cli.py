"""The ``rlhf`` command. Heavy imports stand inside the commands, so that ``--help`` is instant."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer
from rich.markup import escape

from flows import stopping
from flows.commands import chaining, keeping, looking, measuring, replaying, sweeping, training
from flows.commands.options import EXIT_GUARD, EXIT_MISTAKE, Console, console
from rlhf_core.contracts.errors import GuardStopError, RlhfError
from rlhf_core.contracts.secrets import without_secrets
from rlhf_core.store.address import shown

PANELS = {
    "Train": (training.quickstart, training.train, training.resume, training.check, training.config, chaining.chain),
    "Look": (keeping.runs, looking.inspect, looking.view, looking.compare, looking.verify, looking.ui),
    "Measure": (measuring.evaluate, measuring.blend, sweeping.sweep),
    "Replay": (replaying.replay, replaying.bundle),
    "Tidy up": (keeping.clean,),
}
"""Heading of the help -> its commands, named as their functions."""

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
for panel, commands in PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"rlhf-flow {version('rlhf-flow')}")
        raise typer.Exit


@app.callback()
def about(
    *,
    is_asked: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """PPO against a reward model with a KL penalty, in stages that can be stopped, read and replayed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: a deliberate error is printed in one sentence each, with exit code 2, or 3 if a guard stopped.

    Ctrl-C ends with 130, SIGTERM with 143, within seconds, and with how to go on.
    """
    code = 1
    if arguments is None:
        stopping.ends_here()
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
        for line in shown(str(error)).splitlines():
            errors.print(("" if line.startswith(" ") else "[red]error:[/] ") + escape(line))
        return EXIT_GUARD if isinstance(error, GuardStopError) else EXIT_MISTAKE
    except BaseException as error:
        if stopping.received() is None:
            if arguments is not None or not isinstance(error, Exception):
                raise
            sys.stderr.write(shown(without_secrets(traceback.format_exc())))
            return 1
    return _stopped()


def _stopped() -> int:
    """Say how to go on, unless it was said; returns the exit code of the signal."""
    if words := stopping.last_words():
        console.print(words, highlight=False, soft_wrap=True, style="yellow")
    return stopping.exit_code()
