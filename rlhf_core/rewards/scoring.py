"""What a reward component is, and how all of them score one batch: every value is a finite number or a Failure."""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
from collections.abc import Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, cast

from rlhf_core.contracts.reward_config import FLOAT32_MAX
from rlhf_core.models.reward_text import Conversation, Failure, in_a_line
from rlhf_core.prompts.entries import shown

Outcome = float | Failure


class Component(Protocol):
    """Whatever scores responses: :class:`RewardModel`, :class:`FunctionComponent`, :class:`HttpComponent`."""

    def score(self, conversations: Sequence[Conversation]) -> Any:
        """One number, or Failure, a response, in order; or an awaitable of them. May raise anything."""
        ...


def score_all(components: Sequence[Component], conversations: Sequence[Conversation]) -> list[list[Outcome]]:
    """Let every component score every response.

    Those that compute do so one after the other in this thread; those that wait then do so side by side.

    Args:
        components: one or more.
        conversations: the responses with their prompts.
    Returns: for each component, one outcome a response. Neither None nor NaN is among them.
    """
    begun = [_begin(component, conversations) for component in components]
    waiting = [result for result in begun if not isinstance(result, list)]
    waited = iter(_wait(waiting, len(conversations)))
    return [result if isinstance(result, list) else next(waited) for result in begun]


def checked(values: object, count: int) -> list[Outcome]:
    """Turn what a component gave into outcomes: a wrong number of values spoils all, a wrong value itself.

    Args:
        values: a list, tuple, array or tensor of numbers; Failures may stand among them.
        count: how many there must be.
    """
    items: object = cast("Any", values).tolist() if hasattr(values, "tolist") else values
    if not isinstance(items, list | tuple):
        return [Failure(f"gave {shown(items)}, a {type(items).__name__}, where a list of numbers is needed")] * count
    found = cast("Sequence[object]", items)
    if len(found) != count:
        return [Failure(f"gave {len(found)} values for {count} responses")] * count
    return [_number(value) for value in found]


def _number(value: object) -> Outcome:
    if isinstance(value, Failure):
        return value
    if hasattr(value, "item"):  # a scalar of numpy or torch
        value = cast("Any", value).item()
    if isinstance(value, bool):  # which Python counts as 0 or 1
        return Failure(f"gave {str(value).lower()}, which is no number (a score is 1.0, say),")
    if not isinstance(value, numbers.Real):
        return Failure("gave None" if value is None else f"gave {shown(value)}, a {type(value).__name__},")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        return Failure(f"gave {number}")
    return number if abs(number) <= FLOAT32_MAX else Failure(f"gave {number:g}, which float32 cannot hold,")


def _begin(component: Component, conversations: Sequence[Conversation]) -> list[Outcome] | Awaitable[object]:
    try:
        values = component.score(conversations)
        return values if inspect.isawaitable(values) else checked(values, len(conversations))
    except Exception as error:
        return _raised(error, len(conversations))


def _wait(results: Sequence[Awaitable[object]], count: int) -> list[list[Outcome]]:
    async def one(result: Awaitable[object]) -> list[Outcome]:
        try:
            return checked(await result, count)
        except Exception as error:
            return _raised(error, count)

    async def all_of_them() -> list[list[Outcome]]:
        return await asyncio.gather(*map(one, results))

    if not results:
        return []
    with ThreadPoolExecutor(max_workers=1) as pool:  # this thread may have a loop that runs already, as in a notebook
        return pool.submit(asyncio.run, all_of_them()).result()


def _raised(error: Exception, count: int) -> list[Outcome]:
    text = in_a_line(error)
    return [Failure(f"raised {type(error).__name__}{': ' if text else ''}{text}", error)] * count
