"""The ``rlhf`` command. Heavy imports stand inside the commands, so that ``--help`` is instant."""

# ruff: noqa: E402 - where modules are looked for is settled before others are imported
from __future__ import annotations

from rlhf_core.contracts.search_path import settle_search_path

settle_search_path()

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer
from rich.text import Text

from flows import edge, stopping
from flows.commands import chaining, keeping, looking, measuring, replaying, sweeping, training
from flows.commands.options import EXIT_GUARD, EXIT_MISTAKE, Console, console
from flows.visible import settle_streams, visible_messages
from rlhf_core.contracts.errors import GuardStopError, RlhfError
from rlhf_core.store.address import shown

PANELS = {
    "Train": (training.quickstart, training.train, training.resume, training.check, training.config, chaining.chain),
    "Look": (
        keeping.runs,
        looking.inspect,
        looking.view,
        looking.compare,
        looking.verify,
        looking.ui,
        looking.feedback,
    ),
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
        settle_streams()
    try:
        with stopping.watching_signals(until_the_end=arguments is None), visible_messages():
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
        edge.check_surroundings(sys.argv[1:] if arguments is None else arguments)
        code = app(arguments, standalone_mode=False)
        sys.stdout.flush()
        if stopping.received() is None:
            return code if isinstance(code, int) else 0
    except SystemExit as end:
        if stopping.received() is None:
            return edge.quietly_ended(end)
    except Exception as error:
        if stopping.received() is not None:  # what a stage that was abandoned says on its way out
            return _stopped()
        return _told(error, is_process=arguments is None)
    except BaseException as error:
        if stopping.received() is None:
            if (told := edge.as_exception(error)) is None:
                raise
            return _told(told, is_process=arguments is None)
    return _stopped()


def _told(error: Exception, *, is_process: bool) -> int:
    """Print what an error means to a person, a sentence each; returns the exit code."""
    if (code := edge.ended_by_typer(error)) is not None:
        return code
    sentences = str(error) if isinstance(error, RlhfError) else edge.sentence(error)
    if sentences is None:
        if not is_process:
            raise error
        edge.print_traceback(error)
        return 1
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    for line in shown(sentences).splitlines():
        errors.print(line if line.startswith(" ") else Text.assemble(("error: ", "red"), line))
    return EXIT_GUARD if isinstance(error, GuardStopError) else EXIT_MISTAKE


def _stopped() -> int:
    """Say how to go on, unless it was said; returns the exit code of the signal."""
    if words := stopping.last_words():
        console.print(words, highlight=False, soft_wrap=True, style="yellow")
    return stopping.exit_code()


if __name__ == "__main__":
    main()
