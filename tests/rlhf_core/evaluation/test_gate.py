"""The gate of a chain: it counts the unfavourable end of each interval, and a mistake in it is one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_core.contracts.errors import UserError
from rlhf_core.evaluation.gate import Gate, gate_of


def numbers(win: tuple[float, float], kl: tuple[float, float]) -> dict[str, Any]:
    """(mean, unfavourable end) of both."""
    return {
        "win_rate": {"mean": win[0], "low": win[1], "high": 1.0},
        "kl": {"mean": kl[0], "low": 0.0, "high": kl[1]},
    }


@pytest.mark.parametrize(
    ("win", "kl", "passed"),
    [
        ((0.70, 0.60), (3.0, 4.0), [True, True]),
        ((0.70, 0.59), (3.0, 4.0), [False, True]),  # a mean above it is not enough
        ((0.70, 0.65), (3.0, 4.1), [True, False]),
        ((0.50, 0.40), (5.0, 6.0), [False, False]),
    ],
)
def test_both_bounds_count(win: tuple[float, float], kl: tuple[float, float], passed: list[bool]) -> None:
    gate = Gate(prompts="x.jsonl", min_win_rate=0.6, max_kl=4.0)
    assert [check.passed for check in gate.judge(numbers(win, kl))] == passed


def test_a_check_says_what_it_saw_and_what_was_wanted() -> None:
    wins, kl = Gate(prompts="x", min_win_rate=0.6, max_kl=4).judge(numbers((0.7, 0.59), (3.0, 4.5)))
    assert wins.sentence == "win rate 0.700, at the low end of its interval 0.590; at least 0.6 is wanted"
    assert kl.sentence == "KL 3.000, at the high end of its interval 4.500; at most 4 is wanted"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"min_win_rate": 1.5}, "min_win_rate is 1.5: Input should be less than or equal to 1"),
        ({"min_win_rate": -0.1}, "min_win_rate is -0.1: Input should be greater than or equal to 0"),
        ({"max_kl": 0.0}, "max_kl is 0.0: Input should be greater than 0"),
        ({"max_kl": float("nan")}, "max_kl is nan: Input should be"),
        ({"num_prompts": 1}, "num_prompts is 1: Input should be greater than or equal to 2"),
        ({"frontier_samples": 5}, "frontier_samples is 5: Input should be greater than or equal to 20"),
        ({"prompts": ""}, "prompts is '': String should have at least 1 character"),
        ({"alias": "newest"}, "alias is 'newest': it has another meaning; choose a name like production"),
        ({"alias": "v3"}, "alias is 'v3': it has another meaning"),
        ({"alias": "a b"}, "alias is 'a b': String should match pattern"),
    ],
)
def test_a_mistake_is_one_sentence(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as mistake:
        gate_of(**{"prompts": "x.jsonl", **values})
    (sentence,) = mistake.value.problems
    assert sentence.startswith(f"gate.{said}")


def test_what_is_not_given_is_the_default() -> None:
    assert gate_of(prompts="x.jsonl", min_win_rate=None, alias=None) == Gate(prompts="x.jsonl")


def test_it_asks_for_the_newest_checkpoint() -> None:
    request = Gate(prompts="x.jsonl", column="text", num_prompts=5, samples=3).request("runs/a")
    assert (request.target, request.checkpoint, request.prompts) == ("runs/a", "newest", "x.jsonl")
    assert (request.column, request.num_prompts, request.samples) == ("text", 5, 3)
