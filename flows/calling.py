"""How a flow and its tasks are called: through Prefect, or as plain functions where Prefect is not there.

A task's work is the same either way, and so is what it writes: Prefect shows and retries, the files decide.
A stage that is committed is not computed again, so calling one twice is safe.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.flows import Flow
from prefect.runtime import flow_run
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Completed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner
from prefect.tasks import Task
from prefect.utilities.callables import get_call_parameters

from flows.outages import GOES_ON, NOT_SHOWN, NOT_TOLD, api_answers, no_server_is_wanted, outage
from flows.stopping import received, stoppable
from flows.temporary_server import bind_temporary_server
from rlhf_core.contracts.search_path import settle_search_path

Result = TypeVar("Result")

PATIENCE_S = 10.0
"""How long the end of a flow waits for an API that is gone, to tell it that the work is done."""

_without_prefect = False
bind_temporary_server()  # also of a flow that is called directly, not by run_flow


def call(task: Task[..., Result], *arguments: Any, after: Any = None) -> Result:
    """Run a task and return its result. Where Prefect fails, it runs as the function that it is.

    Args:
        task: to run.
        arguments: of it.
        after: the result of a task that this one depends on through the run folder, for Prefect's graph; None: none.
    """
    if is_bare():
        return task.fn(*arguments)
    try:
        return task(*arguments, wait_for=None if after is None else [after])
    except Exception as error:
        return _instead(error, task, arguments)


def call_both(
    first: tuple[Task[..., Result], tuple[Any, ...]], second: tuple[Task[..., Result], tuple[Any, ...]]
) -> tuple[Result, Result]:
    """Run two tasks that do not depend on each other, side by side where Prefect runs them; both results."""
    if is_bare():
        return call(first[0], *first[1]), call(second[0], *second[1])
    running = [_submit(*each) for each in (first, second)]
    found = [_outcome(wait, *each) for wait, each in zip(running, (first, second), strict=True)]
    return found[0](), found[1]()


def call_all(calls: Sequence[tuple[Task[..., Result], tuple[Any, ...]]], *, at_once: int) -> list[Result]:
    """Run tasks that do not depend on each other, so many at a time; their results in order, or the first error."""
    if is_bare():
        with ThreadPoolExecutor(at_once) as threads:
            return list(threads.map(lambda one: one[0].fn(*one[1]), calls))
    with ThreadPoolTaskRunner(max_workers=at_once) as runner:
        running = [_submit(*one, runner) for one in calls]
        found = [_outcome(wait, *one) for wait, one in zip(running, calls, strict=True)]
    return [outcome() for outcome in found]


def is_bare() -> bool:
    """Whether tasks run as plain functions now: told so, no flow run around, or no answer from the API."""
    return _without_prefect or not flow_run.id or outage.lasts


@contextlib.contextmanager
def without_prefect() -> Iterator[None]:
    """Let flows call their tasks as plain functions: no server, no state, no retry."""
    global _without_prefect  # noqa: PLW0603 - one orchestrator a process
    before, _without_prefect = _without_prefect, True
    try:
        yield
    finally:
        _without_prefect = before


@dataclass
class _Body:
    """How the body of this process's newest flow run ended: Prefect may fail before and after it."""

    entered: bool = False
    ended: bool = False
    result: Any = None
    error: BaseException | None = None
    flow_run_id: str | None = None
    hurry: contextlib.ExitStack | None = None
    """Where ``run_flow`` has begun it: settings for an API that is gone, taken back when the flow has ended."""


_body = _Body()


@contextlib.contextmanager
def flow_body() -> Iterator[Callable[[Result], Result]]:
    """Around the body of a flow: remember how it ended, and end in time when this process is told to stop.

    Yields: a function that takes the flow's result, and gives it back.
    """

    def ended_with(result: Result) -> Result:
        _body.result = result
        return result

    settle_search_path()
    _body.entered, _body.flow_run_id = True, flow_run.id
    try:
        with stoppable():
            yield ended_with
        _body.ended = True
    except BaseException as error:
        _body.error = error
        raise
    finally:
        if _body.hurry is not None and not api_answers():
            _body.hurry.enter_context(temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}))


def run_flow(flow: Flow[..., Result], *arguments: Any, **named: Any) -> Result:
    """Run a flow; if Prefect fails before, in or after it, its work is done all the same.

    Raises: whatever the flow's own body raises.
    """
    global _body  # noqa: PLW0603 - one flow at a time
    if no_server_is_wanted():
        _body = _Body()
        with without_prefect():
            return cast("Result", flow.fn(*arguments, **named))
    if not api_answers():
        return _run_bare(flow, arguments, named, None)
    _body = _Body(hurry=contextlib.ExitStack())
    bind_temporary_server()
    try:
        with cast("contextlib.ExitStack", _body.hurry):
            return cast("Result", flow(*arguments, **named))
    except Exception as error:
        if received() is not None:  # Prefect has wrapped what the signal has interrupted
            raise KeyboardInterrupt from error
        if not _body.entered:
            return _run_bare(flow, arguments, named, error)
        if not _body.ended:
            if error is not _body.error and not isinstance(_body.error, KeyboardInterrupt):
                outage.begins(NOT_TOLD, error)
            raise (_body.error or error) from None
        if not _told_completed():
            outage.begins(NOT_TOLD, error)
        return cast("Result", _body.result)


def _told_completed() -> bool:
    """Tell the API, if it is back in time, that the flow run is complete: Prefect may even have said Failed."""
    until = time.monotonic() + PATIENCE_S
    while not api_answers():
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    with contextlib.suppress(Exception), get_client(sync_client=True) as client:
        client.set_flow_run_state(UUID(_body.flow_run_id or ""), Completed(), force=True)
        return True
    return False


def _run_bare(
    flow: Flow[..., Result], arguments: tuple[Any, ...], named: Mapping[str, Any], error: Exception | None
) -> Result:
    global _body  # noqa: PLW0603 - one flow at a time
    outage.begins(NOT_SHOWN, error)
    _body = _Body()  # of no flow run: nothing of an earlier one's may be found in it
    with without_prefect():
        return cast("Result", flow.fn(*arguments, **named))


def _submit(
    task: Task[..., Result], arguments: tuple[Any, ...], runner: TaskRunner[Any] | None = None
) -> Callable[[], Result]:
    """Start a task in a thread; returns what waits for it. What cannot be started fails when it is waited for.

    Args:
        task: to run.
        arguments: of it.
        runner: that has begun; None: that of the flow.
    """
    try:
        if runner is None:
            return task.submit(*arguments).result
        return runner.submit(task, get_call_parameters(task.fn, arguments, {})).result
    except Exception as error:
        failed = error

        def fail() -> Result:
            raise failed

        return fail


def _outcome(wait: Callable[[], Result], task: Task[..., Result], arguments: tuple[Any, ...]) -> Callable[[], Result]:
    """Wait for a task; returns what gives its result, or does it here where Prefect has failed, or raises."""
    try:
        result = wait()
    except Exception as error:
        return functools.partial(_instead, error, task, arguments)
    return lambda: result


def _instead(error: Exception, task: Task[..., Result], arguments: tuple[Any, ...]) -> Result:
    """Do a task's work here, if only Prefect has failed. Raises the error if it is the work's own."""
    if _is_of_the_work(error, task):
        raise error
    outage.begins(GOES_ON, error)
    return task.fn(*arguments)


def _is_of_the_work(error: BaseException, task: Task[..., Any]) -> bool:
    """Whether an error has come through the task's own function."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code is task.fn.__code__:
            return True
        frame = frame.tb_next
    return False
