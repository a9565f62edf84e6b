"""Python functions as components: what they are called with, and what is refused before a run."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import GIVEN, FunctionReward
from rlhf_core.models.reward_model import Conversation
from rlhf_core.rewards.function import FunctionComponent, function_digest, load_function
from rlhf_core.rewards.scoring import score_all

CHAT = [{"role": "system", "content": "be short"}, {"role": "user", "content": "well?"}]
TEXT_AND_CHAT = [
    Conversation("ask", "answer", [], [1, 2, 3, 4, 5], 2, {"gold": "a", "meta": {"level": [1]}}),
    Conversation("rendered chat", "good", CHAT, [6, 7], 1, {"gold": None, "meta": {"level": []}}),
]
COLUMNS = ["gold", "meta"]
MODULE = """
import functools

calls = []

def everything(**kwargs):
    calls.append(kwargs)
    return [0.0] * len(kwargs["responses"])

def some(completions, gold, factor, bonus=0.5):
    calls.append({"completions": completions, "gold": gold, "factor": factor, "bonus": bonus})
    return [factor] * len(completions)

async def later(prompts, responses, **kwargs):
    return [float(len(r)) for r in responses]

def spoils(prompts, completions, meta):
    for i in range(len(prompts)):
        prompts[i] = completions[i] = None
        meta[i]["level"] = "spoilt"
    return [1.0] * len(prompts)

def spoils_deep(prompts, completions, **kwargs):
    prompts[1][0]["content"] = completions[1][0]["content"] = kwargs["weights"][0] = "spoilt"
    return [1.0, 2.0]

class Judge:
    def __init__(self, score): self.score = score
    def __call__(self, responses): return [self.score] * len(responses)
    def method(self, responses): return [2 * self.score] * len(responses)

judge = Judge(3.0)
partly = functools.partial(some, factor=4.0)

def needs(responses, solution): ...
def by_position(responses, /): ...
def no_arguments(): return [1.0, 2.0]
number = 3
largest = max
from os import system as run
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``my_rewards.py`` in the working folder."""
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("import json\nimport no_such_library\n")
    (tmp_path / "script_rewards.py").write_text("raise SystemExit('usage: ...')\n")
    (tmp_path / "wrong_rewards.py").write_text("def f(:\n")
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('this hides a library')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    load("everything")
    yield sys.modules["my_rewards"]
    for name in [name for name in sys.modules if name.endswith("_rewards")]:
        del sys.modules[name]


def load(function: str, **params: Any) -> FunctionComponent:
    config = FunctionReward(function=f"my_rewards:{function}", params=params)
    return load_function(config, field="reward.components.1", columns=COLUMNS)


def test_a_function_of_any_arguments_gets_all_there_are_in_trls_form(module: Any) -> None:
    load("everything", top=3).score(TEXT_AND_CHAT)
    assert module.calls == [
        {
            "prompts": ["ask", CHAT],
            "completions": ["answer", [{"role": "assistant", "content": "good"}]],
            "responses": ["answer", "good"],
            "prompt_ids": [[1, 2], [6]],
            "completion_ids": [[3, 4, 5], [7]],
            "gold": ["a", None],
            "meta": [{"level": [1]}, {"level": []}],
            "top": 3,
        }
    ]
    assert set(GIVEN) < set(module.calls[0])


def test_a_function_of_some_arguments_gets_these(module: Any) -> None:
    found = score_all([load("some", factor=2.0)], TEXT_AND_CHAT)
    assert found == [[2.0, 2.0]]
    assert [call.keys() for call in module.calls] == [{"completions", "gold", "factor", "bonus"}]
    assert (module.calls[0]["factor"], module.calls[0]["bonus"]) == (2.0, 0.5)
    load("some", factor=2.0, bonus=1.0).score(TEXT_AND_CHAT)
    assert module.calls[1]["bonus"] == 1.0


def test_an_async_function() -> None:
    assert score_all([load("later")], TEXT_AND_CHAT) == [[6.0, 4.0]]


def test_instances_methods_and_partials() -> None:
    components = [load("judge"), load("judge.method"), load("partly"), load("no_arguments")]
    assert score_all(components, TEXT_AND_CHAT) == [[3.0, 3.0], [6.0, 6.0], [4.0, 4.0], [1.0, 2.0]]


def test_what_a_function_changes_no_other_sees(module: Any) -> None:
    weights = [1, 2]
    components = [load("spoils"), load("spoils_deep", weights=weights), load("everything")]
    assert score_all(components, TEXT_AND_CHAT)[0] == [1.0, 1.0]
    seen = module.calls[0]
    assert seen["prompts"] == ["ask", CHAT]
    assert seen["completions"][1] == [{"role": "assistant", "content": "good"}]
    assert seen["meta"] == [{"level": [1]}, {"level": []}]
    assert CHAT[0]["content"] == "be short"
    assert weights == [1, 2]


def test_a_library_is_not_hidden_by_a_file_in_the_working_folder() -> None:
    sys.modules.pop("colorsys", None)
    load("everything")
    import colorsys

    assert colorsys.rgb_to_hsv(0, 0, 1) == (2 / 3, 1, 1)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("", "function is not set; give module:callable, or one of length, regex, "),
        ("lengths", "function 'lengths' is neither module:callable nor one of length, regex"),
        ("my_rewards", "function 'my_rewards' is neither module:callable nor one of"),
        ("my_rewards:", "function 'my_rewards:' is neither module:callable nor"),
        ("no_rewards:f", "function 'no_rewards:f': there is no module no_rewards, neither installed nor in the"),
        ("my_rewards.sub:f", "function 'my_rewards.sub:f': there is no module my_rewards.sub, neither"),
        ("broken_rewards:f", "function 'broken_rewards:f': importing broken_rewards fails with ModuleNotFoundError"),
        ("script_rewards:f", "function 'script_rewards:f': importing script_rewards fails with SystemExit: usage: ..."),
        ("wrong_rewards:f", "function 'wrong_rewards:f': importing wrong_rewards fails with SyntaxError: "),
        ("my_rewards:f", "function 'my_rewards:f': there is no 'f' in the module my_rewards"),
        ("my_rewards:judge.f", "function 'my_rewards:judge.f': there is no 'judge.f' in the module my_rewards"),
        ("my_rewards:number", "function 'my_rewards:number' is an object of the type int; a function is needed"),
        ("my_rewards:Judge", "function 'my_rewards:Judge' is a class; a function is needed"),
        (
            "my_rewards:needs",
            "function 'my_rewards:needs' needs the argument 'solution', which nothing fills; name a dataset column of "
            "that name in prompts.columns, or set it in params (there are prompts, completions, responses, prompt_ids, "
            "completion_ids, gold, meta)",
        ),
        ("my_rewards:by_position", "function 'my_rewards:by_position' takes 'responses' by position alone"),
        (
            "my_rewards:largest",
            "function 'my_rewards:largest' does not tell its arguments; wrap it in a Python function",
        ),
        ("os:system", "function 'os:system' is in Python's own library, where nothing scores responses"),
        ("my_rewards:functools.os.system", "function 'my_rewards:functools.os.system': there is no"),
        ("my_rewards:run", "function 'my_rewards:run' is a function of a library that takes none of prompts, "),
        ("torch:hub.load", "function 'torch:hub.load' is a function of a library that takes none of prompts, "),
    ],
)
def test_refused(function: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_function(FunctionReward(function=function), field="reward.components.1", columns=COLUMNS)
    (problem,) = caught.value.problems
    assert problem.startswith(f"reward.components.1.{sentence}")
    assert "\n" not in problem


def test_a_close_name_is_a_hint() -> None:
    with pytest.raises(UserError, match=r"did you mean length\?$"):
        load_function(FunctionReward(function="lengths"), field="x", columns=[])


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"factor": 1, "bonsu": 2}, "params has 'bonsu', which my_rewards:some does not take; did you mean bonus?"),
        (
            {"factor": 1, "x": 2},
            "params has 'x', which my_rewards:some does not take; its own arguments: bonus, factor",
        ),
        ({"factor": 1, "gold": 2}, "params has 'gold', a name that is a dataset column in prompts.columns; rename it"),
        ({"factor": 1, "prompts": 2}, "params has 'prompts', a name that every function gets; rename it"),
    ],
)
def test_params_that_do_not_fit(params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load("some", **params)
    assert caught.value.problems == (f"reward.components.1.{sentence}",)


def test_the_identity_of_a_function_is_its_file(tmp_path: Path) -> None:
    digest = hashlib.sha256(MODULE.encode()).hexdigest()
    for name in ("everything", "later", "judge", "judge.method", "partly"):
        assert function_digest(FunctionReward(function=f"my_rewards:{name}")) == digest
    (tmp_path / "my_rewards.py").write_text(MODULE + "\n")
    assert function_digest(FunctionReward(function="my_rewards:everything")) != digest
    (tmp_path / "other_rewards.py").write_text("from my_rewards import everything\n")
    other = hashlib.sha256(b"from my_rewards import everything\n").hexdigest()
    mine = hashlib.sha256((MODULE + "\n").encode()).hexdigest()
    both = {"my_rewards.py": mine, "other_rewards.py": other}
    assert function_digest(FunctionReward(function="other_rewards:everything")) == both
    assert function_digest(FunctionReward(function="length")) == "length"
    assert function_digest(FunctionReward(function="sentiment")) == "sentiment 3.3.2"
