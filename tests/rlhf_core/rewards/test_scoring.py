"""What components give, checked; and what becomes of what they cannot score."""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_core.contracts.errors import NumericalError
from rlhf_core.contracts.reward_config import FunctionReward, ModelReward
from rlhf_core.models.reward_model import Conversation
from rlhf_core.rewards.policies import settle
from rlhf_core.rewards.scoring import Failure, Outcome, checked, score_all

TWO = [Conversation("ask", "a", [], []), Conversation("ask", "b", [], [])]
IDS = [f"i000000-p{i:06d}-s0" for i in range(5)]


class Gives:
    def __init__(self, values: object) -> None:
        self.values = values

    def score(self, conversations: Sequence[Conversation]) -> Any:
        if isinstance(self.values, Exception):
            raise self.values
        return self.values


class GivesLater(Gives):
    def __init__(
        self, values: object, *, after: asyncio.Event | None = None, before: asyncio.Event | None = None
    ) -> None:
        super().__init__(values)
        self.after, self.before = after, before

    async def score(self, conversations: Sequence[Conversation]) -> Any:
        if self.after:
            await asyncio.wait_for(self.after.wait(), 5)
        if self.before:
            self.before.set()
        return super().score(conversations)


@pytest.mark.parametrize(
    "values",
    [
        [1, 2.5],
        (1.0, 2.5),
        np.array([1, 2.5]),
        [np.float32(1), np.float64(2.5)],
        [np.int64(1), torch.tensor(2.5)],
        torch.tensor([1, 2.5], dtype=torch.bfloat16),
    ],
)
def test_numbers_of_any_library(values: object) -> None:
    found = checked(values, 2)
    assert found == [1.0, 2.5]
    assert [type(value) for value in found] == [float, float]


def test_true_and_false_are_no_numbers() -> None:
    for value in checked([True, np.bool_(False)], 2) + checked(torch.tensor([True, False]), 2):
        assert isinstance(value, Failure)
        assert re.fullmatch(r"gave (true|false), which is no number .*", value.reason)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "gave None"),
        (math.nan, "gave nan"),
        (np.float32("nan"), "gave nan"),
        (torch.tensor(math.inf), "gave inf"),
        (-math.inf, "gave -inf"),
        ("good", "gave 'good', a str,"),
        ("1.0", "gave '1.0', a str,"),
        ([1.0], "gave [1.0], a list,"),
        (1 + 2j, "gave (1+2j), a complex,"),
        (10**400, "gave inf"),
        (1e39, "gave 1e+39, which float32 cannot hold,"),
    ],
)
def test_a_value_that_is_no_score_fails_its_own_response(value: object, reason: str) -> None:
    assert checked([0.5, value], 2) == [0.5, Failure(reason)]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([1.0], "gave 1 values for 2 responses"),
        ([1.0, 2.0, 3.0], "gave 3 values for 2 responses"),
        ([], "gave 0 values for 2 responses"),
        (None, "gave None, a NoneType, where a list of numbers is needed"),
        ("ab", "gave 'ab', a str, where a list of numbers is needed"),
        (1.0, "gave 1.0, a float, where a list of numbers is needed"),
        (torch.tensor(1.0), "gave 1.0, a float, where a list of numbers is needed"),
        ({"a": 1, "b": 2}, "gave {'a': 1, 'b': 2}, a dict, where a list of numbers is needed"),
    ],
)
@pytest.mark.parametrize("component", [Gives, GivesLater])
def test_what_is_no_list_of_that_length_fails_every_response(component: Any, values: object, reason: str) -> None:
    assert score_all([component(values)], TWO) == [[Failure(reason)] * 2]


@pytest.mark.parametrize("component", [Gives, GivesLater])
def test_an_exception_fails_every_response_and_no_other_component(component: Any) -> None:
    error = KeyError("x")
    found = score_all([Gives([1.0, 2.0]), component(error), GivesLater([3.0, 4.0])], TWO)
    assert found == [[1.0, 2.0], [Failure("raised KeyError: 'x'", error)] * 2, [3.0, 4.0]]
    assert found[1][0].error is error  # pyright: ignore[reportAttributeAccessIssue]


def test_an_exception_is_told_in_one_line_of_moderate_length() -> None:
    ((failure, _),) = score_all([Gives(ValueError("a\n  b" + "c" * 1000))], TWO)
    assert isinstance(failure, Failure)
    assert failure.reason.startswith("raised ValueError: a bccc")
    assert len(failure.reason) < 350
    assert score_all([Gives(ValueError())], TWO)[0][0].reason == "raised ValueError"  # pyright: ignore[reportAttributeAccessIssue]


def test_those_that_wait_do_so_side_by_side_and_keep_their_order() -> None:
    """The first one waits for the second."""
    event = asyncio.Event()
    first, second = GivesLater([1.0, 2.0], after=event), GivesLater([3.0, 4.0], before=event)
    assert score_all([first, Gives([5.0, 6.0]), second], TWO) == [[1.0, 2.0], [5.0, 6.0], [3.0, 4.0]]


def test_inside_a_loop_that_runs_as_in_a_notebook() -> None:
    async def cell() -> list[list[Outcome]]:
        return score_all([GivesLater([1.0, 2.0])], TWO)

    assert asyncio.run(cell()) == [[1.0, 2.0]]


OUTCOMES: list[Outcome] = [1.5, Failure("gave nan"), -2.0, Failure("gave None"), 0.25]


def test_policy_fail_names_component_samples_and_cause() -> None:
    error = ValueError("why")
    outcomes: list[Outcome] = [1.0, *[Failure("raised ValueError: why", error)] * 4]
    with pytest.raises(NumericalError) as caught:
        settle("taste", FunctionReward(), outcomes, IDS)
    assert str(caught.value) == (
        "reward component taste raised ValueError: why for 4 of 5 samples (i000000-p000001-s0, i000000-p000002-s0, "
        "i000000-p000003-s0 …); a score must be finite: mend it, or set its on_error to drop or substitute"
    )
    assert caught.value.__cause__ is error
    with pytest.raises(NumericalError, match="check the model's weights and dtype"):
        settle("taste", ModelReward(), outcomes, IDS)


def test_policy_drop_masks_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        values_B, mask_B = settle("taste", FunctionReward(on_error="drop"), OUTCOMES, IDS)
    assert values_B.tolist() == [1.5, 0.0, -2.0, 0.0, 0.25]
    assert mask_B.tolist() == [True, False, True, False, True]
    assert (values_B.dtype, mask_B.dtype) == (torch.float32, torch.bool)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "reward component taste gave nan for 2 of 5 samples (i000000-p000001-s0, i000000-p000003-s0); left out there"
    )


def test_policy_substitute_puts_the_value_in_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    config = FunctionReward(on_error="substitute", substitute=-7.5)
    with caplog.at_level(logging.WARNING):
        values_B, mask_B = settle("taste", config, OUTCOMES, IDS)
    assert values_B.tolist() == [1.5, -7.5, -2.0, -7.5, 0.25]
    assert bool(mask_B.all())
    assert [record.getMessage().partition("; ")[2] for record in caplog.records] == ["-7.5 stands in"]


def test_what_is_all_scored_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    for policy in ("fail", "drop"):
        values_B, mask_B = settle("taste", FunctionReward(on_error=policy), [1.0, 2.0], IDS[:2])
        assert (values_B.tolist(), mask_B.tolist()) == ([1.0, 2.0], [True, True])
    assert not caplog.records
