"""The `reward` section: three kinds of components, what they refuse, and how they are printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config, config_template, flat_params, load_config
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import FunctionReward, HttpReward, ModelReward, RewardConfig

KINDS = [{"kind": "model", "model": "m"}, {"kind": "function", "function": "length", "params": {"target": 5}}]
HTTP = {"kind": "http", "url": "http://localhost:8000/score"}
HTTP_TREE = {"reward": {"components": [*KINDS, HTTP], "allowed_hosts": ["localhost:8000"]}}


def problems(component: Any, **reward: Any) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        build_config({"reward": {"components": [{"model": "m"}, component], **reward}})
    return tuple(caught.value.problems)


def test_each_kind_is_its_own_section() -> None:
    config = build_config(HTTP_TREE).reward
    assert [type(c) for c in config.components] == [ModelReward, FunctionReward, HttpReward]
    assert config.names == ["reward0", "reward1", "reward2"]
    assert config.first_model is config.components[0]
    assert build_config({"reward": {"components": KINDS[1:]}}).reward.first_model is None


def test_a_component_without_kind_is_a_model() -> None:
    assert build_config({"reward": {"components": [{"model": "m"}]}}).reward.components == [ModelReward(model="m")]


@pytest.mark.parametrize(
    ("component", "kind"),
    [
        ({"function": "a:b"}, "function"),
        ({"function": "length", "params": {"target": 3}}, "function"),
        ({"url": "http://localhost:8000/score"}, "http"),
        ({"weight": 2.0}, "model"),
    ],
)
def test_the_kind_may_be_told_by_what_scores(component: Any, kind: str) -> None:
    reward = build_config({"reward": {"components": [component], "allowed_hosts": ["localhost"]}}).reward
    assert [c.kind for c in reward.components] == [kind]


def test_set_reaches_into_any_kind() -> None:
    overrides = ["reward.components.1.params.target=7", "reward.components.2.retries=0", "reward.components.0.weight=2"]
    first, second, third = build_config(HTTP_TREE, overrides).reward.components
    assert (first.weight, second, third) == (
        2.0,
        FunctionReward(function="length", params={"target": 7}),
        HttpReward(url=HTTP["url"], retries=0),
    )
    (only,) = build_config(
        {}, ["reward.components.0.kind=function", "reward.components.0.function=a:b"]
    ).reward.components
    assert only == FunctionReward(function="a:b")


@pytest.mark.parametrize(
    ("component", "sentence"),
    [
        (
            {"kind": "models"},
            "reward.components.1.kind is 'models', which is no kind of component; known are model, function and http; "
            "did you mean model?",
        ),
        (
            {"kind": 3},
            "reward.components.1.kind is 3, which is no kind of component; known are model, function and http",
        ),
        (
            {"kind": None},
            "reward.components.1.kind is null, which is no kind of component; known are model, function and http",
        ),
        (5, "reward.components.1 is 5: it is a section, so a mapping of keys is needed"),
        (
            {"kind": "function", "functions": "a:b"},
            "reward.components.1.functions is not a known key; did you mean function?",
        ),
        (
            {"kind": "function", "model": "m"},
            "reward.components.1.model is a key of the kind model, and reward.components.1.kind is function; set "
            "reward.components.1.kind: model",
        ),
        (
            {"kind": "http", "timeout_s": 0.0},
            "reward.components.1.timeout_s is 0.0: input should be greater than 0",
        ),
        (
            {"kind": "http", "retries": -1},
            "reward.components.1.retries is -1: input should be greater than or equal to 0",
        ),
        (
            {"kind": "http", "token_env": "Bearer abc"},
            "reward.components.1.token_env is not the name of an environment variable (and is not shown: it may be the "
            "token itself); put the token into a variable, and name that here",
        ),
        (
            {"on_error": "substitute"},
            "reward.components.1: on_error is substitute and substitute is null; give the score that stands in",
        ),
        (
            {"substitute": 0.0},
            "reward.components.1: substitute is 0 and on_error is fail, which does not use it; "
            "set on_error: substitute or leave substitute out",
        ),
        (
            {"on_error": "substitute", "substitute": 1e39},
            "reward.components.1.substitute is 1e+39: input should be less than or equal to "
            f"34028234663852886{'0' * 22}",
        ),
        (
            {"on_error": "ignore"},
            "reward.components.1.on_error is 'ignore': input should be 'fail', 'drop' or 'substitute'",
        ),
        (
            {"name": "reward0_failed"},
            "reward.components are named reward0 and reward0_failed, which is a metric of the first",
        ),
    ],
)
def test_refused(component: Any, sentence: str) -> None:
    assert problems(component) == (sentence,)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_param_that_is_not_finite(number: float) -> None:
    assert problems({"kind": "function", "params": {"a": [{"b": number}]}}) == (
        "reward.components.1.params: a param is not plain JSON, or a number in it is not finite",
    )


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://localhost/",
        "file:///etc/passwd",
        "http://",
        "http://local host/",
        "http://localhost/#x",
        "http://localhost:99999/",
        "http://localhost:0/",
        "http://localhost/\n",
        "http://lôcalhost/",
    ],
)
def test_an_address_that_parsers_could_read_differently(url: str) -> None:
    (sentence,) = problems({"kind": "http", "url": url}, allowed_hosts=["localhost"])
    assert sentence == (
        f"reward.components.1.url: the address {url!r} is not plain http or https, as http://localhost:8000/score"
    )


@pytest.mark.parametrize(
    "url", ["http://user:secret@localhost/", "http://localhost\\@evil/", "http:/a:secret@localhost"]
)
def test_an_address_with_a_user_is_refused_and_not_shown(url: str) -> None:
    (sentence,) = problems({"kind": "http", "url": url}, allowed_hosts=["localhost"])
    assert sentence.startswith("reward.components.1.url")
    assert "user name or password" in sentence or "not shown: a password may be in it" in sentence
    assert url not in sentence
    assert "secret@" not in sentence


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("http://localhost:8000/a?b=c", ["localhost"]),
        ("http://localhost:8000/", ["localhost:8000"]),
        ("HTTP://LocalHost:8000", ["localhost:8000"]),
        ("http://judge.example", ["judge.example:80"]),
        ("https://judge.example", ["other", "judge.example:443"]),
        ("http://[::1]:8000/", ["[::1]:8000"]),
        ("http://[::1]/", ["[::1]"]),
    ],
)
def test_a_host_that_is_allowed(url: str, allowed: list[str]) -> None:
    build_config({"reward": {"components": [{"kind": "http", "url": url}], "allowed_hosts": allowed}})


@pytest.mark.parametrize(
    ("url", "allowed", "host", "port"),
    [
        ("http://localhost:8000/", [], "localhost", 8000),
        ("http://localhost:8000/", ["localhost:8001"], "localhost", 8000),
        ("https://judge.example/", ["judge.example:80"], "judge.example", 443),
        ("http://evil.judge.example/", ["judge.example"], "evil.judge.example", 80),
        ("http://judge.example.evil/", ["judge.example"], "judge.example.evil", 80),
        ("http://[::1]:8000/", ["[::2]"], "[::1]", 8000),
    ],
)
def test_a_host_that_is_not_allowed(url: str, allowed: list[str], host: str, port: int) -> None:
    assert problems({"kind": "http", "url": url}, allowed_hosts=allowed) == (
        f"reward.components.1.url {url!r} leads to {host}:{port}, which is not in reward.allowed_hosts "
        f"({', '.join(allowed) or 'empty'}); add {host!r} or '{host}:{port}' if responses may be sent there",
    )


@pytest.mark.parametrize("entry", ["http://localhost", "localhost/", "LOCALHOST", "*", "", "localhost:", "a b"])
def test_an_entry_that_is_no_host(entry: str) -> None:
    assert problems({}, allowed_hosts=[entry]) == (
        f"reward.allowed_hosts: the entry {entry!r} is not host or host:port in small letters, as localhost:8000",
    )


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        (["completions"], "'completions' has another meaning for reward functions; rename that column"),
        (["answer", "answer"], "the column 'answer' is named twice"),
    ],
)
def test_columns_that_could_not_be_passed(columns: list[str], reason: str) -> None:
    with pytest.raises(UserError) as caught:
        build_config({"prompts": {"columns": columns}})
    assert caught.value.problems == (f"prompts.columns: {reason}",)


def test_a_config_of_all_kinds_is_printed_and_read_back(tmp_path: Path) -> None:
    config = build_config(HTTP_TREE)
    (tmp_path / "run.yaml").write_text(config_template(config))
    assert load_config(tmp_path / "run.yaml") == config
    assert flat_params(config)["reward.components.1.params.target"] == 5
    assert flat_params(config)["reward.allowed_hosts"] == ["localhost:8000"]


def test_the_other_kinds_of_the_template_are_examples_that_can_be_uncommented(tmp_path: Path) -> None:
    plain = [
        line.replace("    # ", "    ", 1) if line.startswith("    # ") else line
        for line in config_template().splitlines()
    ]
    (tmp_path / "run.yaml").write_text("\n".join(plain))
    assert load_config(tmp_path / "run.yaml").reward.components == [ModelReward(), FunctionReward(), HttpReward()]
    assert "# - kind" not in config_template(RunConfig())


def test_the_schema_offers_each_kind_as_an_alternative() -> None:
    """A form draws anyOf; with oneOf a component whose keys all kinds have would fit more than one."""
    items = RunConfig.model_json_schema()["$defs"]["RewardConfig"]["properties"]["components"]["items"]
    assert [choice["$ref"].rpartition("/")[2] for choice in items["anyOf"]] == [
        kind.__name__ for kind in RewardConfig.KINDS.values()
    ]
    assert "oneOf" not in items
    assert list(RewardConfig.KINDS) == [kind.model_fields["kind"].default for kind in RewardConfig.KINDS.values()]
