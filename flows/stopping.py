"""Ctrl-C and SIGTERM: the process ends within five seconds, and Prefect knows how.

What is on disk can be resumed at any moment, so an orderly end is a courtesy, and its time is bounded:

    the signal      raises in the main thread; the stage at work is abandoned, Prefect is told in a thread
    after REPORT_S  that thread begins at the latest, and asks until Prefect says that the flow run has ended
    after GRACE_S   whatever still runs (a stage in a thread, a tracker that hangs) is left: the process exits
    a second Ctrl-C exits at once
    the very end    is ours too: exit handlers run, the interpreter's threads are not torn down (:func:`ends_here`)

A flow run ends Cancelled by Ctrl-C and Crashed by SIGTERM, unless Prefect itself sent the signal to cancel it, or the
flow had come to its end. Where Prefect does not answer in time, a person reads that it may show the run as running.
The thread that keeps the time is woken by the kernel's signal itself (``signal.set_wakeup_fd``), so it works while
the main thread is busy in a library, and whoever has put a handler of his own in place.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

REPORT_S = 0.8
"""Until Prefect is told, if a flow run has not ended by then."""
GRACE_S = 3.5
"""Until the process exits."""
TELLING_S = 2.5
"""Seconds that an interrupted flow waits for Prefect to confirm its end."""
AGAIN_S = 0.1
"""Pause before Prefect is told again. Its own client pauses for two seconds and more when the server is busy (503)."""
NOT_TOLD = "\nPrefect did not answer in time, and may show this flow run as running"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_S = 15.0
"""For Prefect to send its last words after an ordinary end."""
EXIT_WITHOUT_API_S = 1.0
"""The same, where nobody hears them."""


class _Stop:
    """What this process knows of being told to stop."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.time_runs = False
        self.told = False
        self.flow_run_id: str | None = None
        self.is_complete = False
        self.reporter: threading.Thread | None = None
        self.prefect_knows = False
        self.api: str | None = None
        self.is_at_work = False
        self.sentence: Callable[[], str] = lambda: "stopped before it began; the same command begins again"


_stop = _Stop()
_code: int | None = None
"""Of the process, once it is known; see :func:`ends_here`."""


def received() -> int | None:
    """The signal that told this process to stop, if one has."""
    return _stop.received


def exit_code() -> int:
    """The exit code that says which signal it was: 130 or 143."""
    return 128 + (_stop.received or signal.SIGINT)


def on_stop(sentence: Callable[[], str]) -> None:
    """What a person is told when the process ends by a signal: that it has stopped, and how to go on."""
    _stop.sentence, _stop.is_at_work = sentence, True


def is_at_work() -> bool:
    """Whether the command has something that can be continued."""
    return _stop.is_at_work


def last_words() -> str:
    """That sentence, to be printed by the caller; empty if it was printed already. Waits until Prefect knows."""
    if _stop.received is not None and _stop.reporter is not None:
        _stop.reporter.join(TELLING_S)  # the time of the process may end meanwhile, which prints it too
    return _words()


def _words() -> str:
    told, _stop.told = _stop.told, True
    if told:
        return ""
    untold = _stop.reporter is not None and not _stop.prefect_knows
    return _stop.sentence() + (NOT_TOLD if untold else "")


@contextlib.contextmanager
def watching_signals(*, until_the_end: bool = False) -> Iterator[None]:
    """Around a command: SIGTERM interrupts like Ctrl-C, and either ends the process in time.

    Args:
        until_the_end: the process ends after it; once stopped, it hears no more than a second Ctrl-C (Prefect passes
            on the SIGTERM that it has caught, which would end the process before its exit code is told).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _timekeeper():
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, _interrupt)
        try:
            yield
        finally:
            for number, handler in before.items():
                is_ending = until_the_end and _stop.received is not None
                signal.signal(number, (lambda *_: None) if is_ending else handler)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Around the body of a flow: Prefect learns how it was stopped, also where the time does not suffice."""
    from prefect.runtime import flow_run
    from prefect.settings import PREFECT_API_URL

    if not flow_run.id or threading.current_thread() is not threading.main_thread():
        yield
        return
    with _timekeeper():
        around = _stop.flow_run_id, _stop.is_complete
        _stop.flow_run_id, _stop.api, _stop.is_complete = str(flow_run.id), PREFECT_API_URL.value(), False
        try:
            yield
        except KeyboardInterrupt:
            _stop.received = _stop.received or signal.SIGINT
            _cancel_this_run()
            raise
        except Exception as error:
            if _was_interrupted():  # what was at work failed on its way out, as calls of a closed pool do
                _cancel_this_run()
                raise KeyboardInterrupt from error
            _stop.flow_run_id, _stop.is_complete = around
            raise
        _stop.is_complete = True  # Prefect has still to be told, by its engine


def ends_here() -> None:
    """Call first in a process of its own: after all exit handlers it ends, with the code of :func:`end_in_time`.

    An interpreter that is torn down unwinds its daemon threads, and one that is inside a C++ library then aborts the
    process ("FATAL: exception not rethrown"): two of 120 signals ended with code 134 instead of their own.
    """
    atexit.register(_end)  # the first to be registered is the last to run


def _end() -> None:
    if _code is not None:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        _exit(_code)


def end_in_time(code: int) -> None:
    """Let the process end by itself, but in time: Prefect would wait minutes for an API that is gone."""
    global _code  # noqa: PLW0603 - a process ends once
    _code = code
    outages = sys.modules.get("flows.outages")
    gone = outages is not None and outages.outage.lasts

    def wait() -> None:
        time.sleep(EXIT_WITHOUT_API_S if gone else EXIT_S)
        _exit(code)

    threading.Thread(target=wait, name="last end", daemon=True).start()


def _interrupt(number: int, _frame: FrameType | None) -> None:
    """Any signal is a KeyboardInterrupt; which one it was stands in ``received``."""
    _stop.received, _stop.time_runs = _stop.received or number, True
    raise KeyboardInterrupt


def _was_interrupted() -> bool:
    """Return whether a signal was received that this module answers: in a worker, Prefect may answer it itself."""
    return _stop.received is not None and signal.getsignal(_stop.received) is _interrupt


@contextlib.contextmanager
def _timekeeper() -> Iterator[None]:
    """A thread that hears of every signal and ends the process in time. One is enough: the outermost."""
    global _stop  # noqa: PLW0603 - one main thread a process
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    if before != -1:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)
        yield
        return
    _stop = _Stop()
    threading.Thread(target=_keep_time, args=(reader,), name="timekeeper", daemon=True).start()
    try:
        yield
    finally:
        if not _stop.time_runs:  # else it runs on, until the process has ended
            signal.set_wakeup_fd(-1)
            os.close(writer)


def _keep_time(reader: int) -> None:
    """Wait for signals. A second SIGTERM says nothing: Prefect passes on to the process what it has caught."""
    ends = False
    while number := os.read(reader, 1):
        if number[0] in SIGNALS and not ends:
            ends, _stop.time_runs = True, True
            _stop.received = _stop.received or number[0]
            threading.Thread(target=_end_in_time, name="end in time", daemon=True).start()
        elif number[0] == signal.SIGINT:
            _exit(exit_code())
    os.close(reader)


def _end_in_time() -> None:
    time.sleep(REPORT_S)
    _begin_report()
    time.sleep(GRACE_S - REPORT_S)
    _exit(exit_code())


def _exit(code: int) -> None:
    """End the process now, with its last words and without the temporary server it may have started."""
    if _stop.received is not None and (words := _words()):
        show_cursor = b"\x1b[?25h" if os.isatty(1) else b""
        with contextlib.suppress(OSError):
            os.write(1, show_cursor + b"\n" + words.encode() + b"\n")
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    # no import statement: it would wait for a main thread that is in the middle of importing that very module
    servers = getattr(sys.modules.get("prefect.server.api.server"), "SubprocessASGIServer", None)
    server = None if servers is None else servers().server_process
    if server is not None:
        server.terminate()
    os._exit(code)


def _begin_report() -> threading.Thread | None:
    """Tell Prefect from a thread, which may hang; one for all who ask. None where no flow run has begun."""
    if _stop.flow_run_id is not None and _stop.reporter is None:
        _stop.reporter = threading.Thread(target=_report, args=(_stop,), name="last report", daemon=True)
        _stop.reporter.start()
    return _stop.reporter


def _report(stop: _Stop) -> None:
    """Tell Prefect how the flow run ended, until it knows; the process ends meanwhile if this takes too long."""
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_CLIENT_MAX_RETRIES,
        PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED,
        temporary_settings,
    )

    known: dict[Any, Any] = {PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED: False, PREFECT_CLIENT_MAX_RETRIES: 0}
    if stop.api:
        known[PREFECT_API_URL] = stop.api
    until = time.monotonic() + EXIT_S  # of a process that was not told to end, and so goes on
    with temporary_settings(known):
        while not stop.prefect_knows and time.monotonic() < until:
            with contextlib.suppress(Exception):
                stop.prefect_knows = _tell(stop)
            time.sleep(0 if stop.prefect_knows else AGAIN_S)


def _tell(stop: _Stop) -> bool:
    """Ask Prefect to end the flow run unless it has ended. Returns whether it has, by Prefect's own answer."""
    from uuid import UUID

    from prefect.client.orchestration import get_client

    def is_busy(response: Any) -> None:
        response.headers["Retry-After"] = "0"  # the pauses are this module's

    flow_run_id = UUID(stop.flow_run_id or "")
    with get_client(sync_client=True, httpx_settings={"event_hooks": {"response": [is_busy]}}) as client:
        for has_asked in (False, True):
            state = client.read_flow_run(flow_run_id).state
            if state is not None and (state.is_final() or state.is_cancelling()):
                return True
            if not has_asked:
                client.set_flow_run_state(flow_run_id, _end_state(stop))
    return False


def _cancel_this_run() -> None:
    """Tell Prefect, in bounded time, that this flow run was interrupted.

    The engine calls a run whose state is final its own affair no more, so it is given one only once Prefect knows:
    otherwise it tells Prefect of a crash itself, for as long as the process lasts.
    """
    from prefect.context import FlowRunContext

    if (reporter := _begin_report()) is not None:
        reporter.join(TELLING_S)
    context = FlowRunContext.get()
    if _stop.prefect_knows and context is not None and context.flow_run is not None:
        context.flow_run.state = _end_state(_stop)


def _end_state(stop: _Stop):  # noqa: ANN202 - prefect's State, which is not imported at start-up
    from prefect.states import Cancelled, Completed, Crashed

    if stop.is_complete:
        return Completed(message="Complete; the process was told to end before it had told so.")
    if (stop.received or signal.SIGINT) == signal.SIGINT:
        return Cancelled(message="Interrupted by a person (SIGINT). The run folder can be resumed.")
    return Crashed(message="Told to end (SIGTERM). The run folder can be resumed.")
