"""Ready-made reward functions, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import FunctionReward
from rlhf_core.models.reward_model import Conversation
from rlhf_core.rewards.function import load_function
from rlhf_core.rewards.numbers import last_number
from rlhf_core.rewards.ready_made import READY_MADE


def scores(function: str, responses: list[str], columns: dict[str, list[Any]] | None = None, **params: Any) -> Any:
    """By the way a run takes: loaded with its params checked, and called with what it takes; a token is a character."""
    columns = columns or {}
    config = FunctionReward(function=function, params=params)
    component = load_function(config, field="reward.components.0", columns=list(columns))
    return component.score(
        [
            Conversation(
                "ask", text, [], [1, 2, *map(ord, text)], 2, {name: cells[i] for name, cells in columns.items()}
            )
            for i, text in enumerate(responses)
        ]
    )


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [7.0, 0.0]),
        ({"unit": "tokens"}, [7.0, 0.0]),
        ({"unit": "characters"}, [7.0, 0.0]),
        ({"unit": "words"}, [3.0, 0.0]),
        ({"unit": "words", "target": 4}, [-0.25, -1.0]),
        ({"unit": "words", "target": 2.0}, [-0.5, -1.0]),
    ],
)
def test_length(params: dict[str, Any], expected: list[float]) -> None:
    assert scores("length", ["a b  cd", ""], **params) == expected


def test_length_counts_tokens_and_not_characters() -> None:
    component = load_function(FunctionReward(function="length"), field="x", columns=[])
    assert component.score([Conversation("ask", "abc", [], [1, 2, 3, 4, 5], 2)]) == [3.0]
    assert component.score([Conversation("ask", "abc", [], [1, 2, 3, 4, 5], 4)]) == [1.0]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"pattern": "a.c"}, [1.0, 1.0, 0.0, 0.0, 0.0]),
        ({"pattern": "a.c", "ignore_case": True}, [1.0, 1.0, 1.0, 0.0, 0.0]),
        ({"pattern": "a.c", "dot_all": True}, [1.0, 1.0, 0.0, 1.0, 0.0]),
        ({"pattern": "a.c", "mode": "whole"}, [1.0, 0.0, 0.0, 0.0, 0.0]),
        ({"pattern": "a.c", "mode": "count"}, [1.0, 2.0, 0.0, 0.0, 0.0]),
    ],
)
def test_regex(params: dict[str, Any], expected: list[float]) -> None:
    assert scores("regex", [" abc\n", "abcabc", "ABC", "a\nc", ""], **params) == expected


def test_format() -> None:
    right = "<think>so\nand so</think>\n<answer>4</answer>"
    wrong = [
        f"{right} or",
        f"Well, {right}",
        right.replace("</think>", ""),
        f"<think>one</think>{right}",
        "<think>a<think>b</think><answer>4</answer>",
        "",
    ]
    assert scores("format", [right, f"\n{right}  ", *wrong]) == [1.0, 1.0, *[0.0] * 6]
    assert scores("format", ["{1,\n2}", "[1]"], pattern=r"\{.*\}") == [1.0, 0.0]
    rest = right.removeprefix("<think>")
    assert scores("format", [rest, right], opened=True) == [1.0, 0.0]
    assert scores("format", ["<answer>4</answer>", rest], opened="<think>\n\n</think>\n\n") == [1.0, 0.0]


@pytest.mark.parametrize(
    ("response", "answer", "params", "expected"),
    [
        (" Paris \n", "Paris", {}, 1.0),
        ("Paris", "paris", {}, 0.0),
        ("Paris", "paris", {"ignore_case": True}, 1.0),
        ("New   York", "New York", {}, 1.0),
        ("It is Paris", "Paris", {}, 0.0),
        ("", "Paris", {}, 0.0),
        ("7", 7, {}, 1.0),
        ("Paris", None, {}, None),
        (r"\boxed{3} no, \boxed{4}", "4", {"extract": r"\\boxed\{(.*?)\}"}, 1.0),
        (r"\boxed{3} no, \boxed{4}", "3", {"extract": r"\\boxed\{(.*?)\}"}, 0.0),
        ("4", "4", {"extract": r"\\boxed\{(.*?)\}"}, 0.0),
        ("I say yes", "yes", {"extract": "yes|no"}, 1.0),
    ],
)
def test_exact_match(response: str, answer: Any, params: dict[str, Any], expected: float | None) -> None:
    assert scores("exact_match", [response], {"answer": [answer]}, **params) == [expected]
    assert scores("exact_match", [response], {"gold": [answer]}, column="gold", **params) == [expected]


@pytest.mark.parametrize(
    ("response", "answer", "params", "expected"),
    [
        ("so 3 + 4 = 7.", 7, {}, 1.0),
        ("so 3 + 4 = 7.", 4, {}, 0.0),
        ("the result is 1,200 dollars", "48 × 25 = 1200\n#### 1200", {}, 1.0),
        ("1200", "#### 1,200", {}, 1.0),
        ("-3", "-3.0", {}, 1.0),
        ("3", "-3", {}, 0.0),
        ("no number", 0, {}, 0.0),
        ("4", None, {}, None),
        ("4", "none", {}, None),
        ("3.14", 3.14159, {}, 0.0),
        ("3.14", 3.14159, {"tolerance": 0.01}, 1.0),
        ("314", 314.159, {"relative_tolerance": 0.01}, 1.0),
        ("3", 3.0000005, {}, 1.0),
    ],
)
def test_numeric_match(response: str, answer: Any, params: dict[str, Any], expected: float | None) -> None:
    assert scores("numeric_match", [response], {"answer": [answer]}, **params) == [expected]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5-3", 3.0),
        ("x = -3", -3.0),
        ("(−3)", -3.0),
        ("a) +2", 2.0),
        (".5", 0.5),
        ("1e-3", 0.001),
        ("2.5E2", 250.0),
        ("1,234,567.8", 1234567.8),
        ("1,2345", None),
        ("12.", 12.0),
        ("50 %", 50.0),
        ("9" * 400, None),
        ("", None),
        ("twelve", None),
    ],
)
def test_the_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number
    assert last_number(f"7 and then {text}") == (number if any(c.isdigit() for c in text) else 7.0)


def test_sentiment() -> None:
    liked, hated, neither, not_liked = scores(
        "sentiment", ["A wonderful, moving film!", "A dull and awful film.", "A film.", "The film was not good."]
    )
    # Hutto & Gilbert 2014: wonderful is 2.7, "!" adds 0.292; x / √(x² + 15)
    assert liked == pytest.approx(2.992 / (2.992**2 + 15) ** 0.5, abs=1e-4)
    assert hated < -0.5
    assert neither == 0.0
    assert not_liked < 0.0


@pytest.mark.parametrize(
    ("text", "params", "expected"),
    [
        ("a b c d", {}, 0.0),
        ("a b", {}, 0.0),
        ("A b a B", {"ngram": 2}, -1 / 3),  # ab ba ab: two of three are different
        ("aaaa", {"ngram": 1, "unit": "tokens"}, -0.75),
        ("aaaa", {"ngram": 1}, 0.0),
    ],
)
def test_repetition(text: str, params: dict[str, Any], expected: float) -> None:
    assert scores("repetition", [text], **params) == [pytest.approx(expected)]


@pytest.mark.parametrize(
    ("function", "params", "sentence"),
    [
        ("length", {"unit": "lines"}, "unit is 'lines'; known are tokens, words, characters"),
        ("length", {"target": 0}, "target is 0; give a number above 0"),
        ("length", {"target": "a"}, "target is 'a'; give a number above 0"),
        ("length", {"target": True}, "target is True; give a number above 0"),
        ("regex", {}, "pattern is None; give a regular expression"),
        ("regex", {"pattern": "("}, "pattern '(' is no regular expression: missing ), unterminated subpattern at"),
        ("regex", {"pattern": "a", "mode": "find"}, "mode is 'find'; known are search, whole, count"),
        ("regex", {"pattern": "a", "dot_all": 1}, "dot_all is 1; give true or false"),
        ("format", {"pattern": "["}, "pattern '[' is no regular expression"),
        ("format", {"opened": 1}, "opened is 1; give true, false, or the text that the prompt ends with"),
        ("exact_match", {}, "column is 'answer', which is not among prompts.columns"),
        ("exact_match", {"column": "prompts"}, "column is 'prompts', which is not among prompts.columns"),
        ("exact_match", {"column": "gold", "extract": 3}, "extract is 3; give a regular expression"),
        ("exact_match", {"column": "gold", "ignore_case": "no"}, "ignore_case is 'no'; give true or false"),
        ("numeric_match", {"column": ["gold"]}, "column is ['gold'], which is not among"),
        ("numeric_match", {"column": "gold", "tolerance": -1}, "tolerance is -1; give a number of at least 0"),
        ("numeric_match", {"column": "gold", "relative_tolerance": "a"}, "relative_tolerance is 'a'; give a number"),
        ("repetition", {"ngram": 0}, "ngram is 0; give a whole number of at least 1"),
        ("repetition", {"unit": "characters"}, "unit is 'characters'; known are words, tokens"),
    ],
)
def test_a_bad_param_is_told_before_anything_is_scored(function: str, params: dict[str, Any], sentence: str) -> None:
    config = FunctionReward(function=function, params=params)
    with pytest.raises(UserError) as caught:
        load_function(config, field="reward.components.0", columns=["gold"])
    assert str(caught.value).startswith(f"reward.components.0.params: {sentence}")


def test_the_config_names_all_of_them() -> None:
    assert f"module:callable, or {', '.join(READY_MADE)}" == FunctionReward.model_fields["function"].description
