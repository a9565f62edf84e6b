"""Names of the hub and their revisions, as a config takes them."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.hub import split_revision
from rlhf_core.contracts.places import model_places, place_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("gpt2", ("gpt2", None)),
        ("owner/name", ("owner/name", None)),
        ("owner/name@main", ("owner/name", "main")),
        ("owner/name@refs/pr/3", ("owner/name", "refs/pr/3")),
        (f"owner/na.me-2@{COMMIT}", ("owner/na.me-2", COMMIT)),
        ("./owner/name@main", ("./owner/name@main", None)),
        ("/data/model@v2", ("/data/model@v2", None)),
        ("owner/name@../../etc", ("owner/name@../../etc", None)),
        ("owner/name@", ("owner/name@", None)),
    ],
)
def test_a_name_and_its_revision(name: str, parts: tuple[str, str | None]) -> None:
    assert split_revision(name) == parts


def tree(**sections: Any) -> dict[str, Any]:
    return {"policy": {"model": "o/policy"}, **sections}


@pytest.mark.parametrize(
    ("sections", "field", "name"),
    [
        ({"policy": {"model": "o/n", "revision": "v1"}}, "policy.model", "o/n@v1"),
        ({"policy": {"model": "o/n@v1", "revision": "v1"}}, "policy.model", "o/n@v1"),
        ({"policy": {"model": "o/n@v1"}}, "policy.model", "o/n@v1"),
        ({"policy": {"model": "o/n", "adapter": "o/a", "adapter_revision": "v1"}}, "policy.adapter", "o/a@v1"),
        ({"reference": {"model": "o/n", "revision": COMMIT}}, "reference.model", f"o/n@{COMMIT}"),
        (
            {
                "policy": {"model": "o/n", "lora": {"rank": 2}},
                "reference": {"adapter": "o/a", "adapter_revision": "v1"},
            },
            "reference.adapter",
            "o/a@v1",
        ),
        ({"reward": {"components": [{"model": "o/n", "revision": "v1"}]}}, "reward.components.0.model", "o/n@v1"),
        (
            {"reward": {"components": [{"model": "o/n", "tokenizer": "o/t", "tokenizer_revision": "v1"}]}},
            "reward.components.0.tokenizer",
            "o/t@v1",
        ),
    ],
)
def test_a_revision_is_written_into_the_name(sections: dict[str, Any], field: str, name: str) -> None:
    config = build_config(tree(**sections))

    assert model_places(config)[field] == name
    assert build_config(config.model_dump()) == config


def test_prompts_have_a_revision_too() -> None:
    config = build_config(tree(prompts={"source": "o/data", "revision": "v1"}))

    assert config.prompts.source == "o/data@v1"


def test_the_reference_is_the_policy_at_its_revision() -> None:
    config = build_config({"policy": {"model": "o/n", "revision": "v1"}})

    assert (config.reference_model, config.starts_at_reference) == ("o/n@v1", True)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"policy": {"model": "/data/n", "revision": "v1"}}, "revision is 'v1', but model '/data/n' is a path"),
        ({"policy": {"model": "~/n", "revision": "v1"}}, "is a path"),
        ({"policy": {"model": "o/n@v2", "revision": "v1"}}, "model 'o/n@v2' names another revision"),
        ({"policy": {"revision": "v1"}}, "revision is 'v1', but model is not set"),
        ({"policy": {"model": "o/n", "revision": "../v1"}}, "revision '../v1' is no branch, tag or commit"),
        ({"policy": {"model": "o/n", "revision": ""}}, "revision '' is no branch, tag or commit"),
        ({"policy": {"model": "o/n", "revision": 7}}, "policy.revision is 7"),
        ({"reference": {"revision": "v1"}}, "revision is 'v1', but model is not set"),
        ({"prompts": {"source": "a/b/c.jsonl", "revision": "v1"}}, "source 'a/b/c.jsonl' is a path"),
        ({"prompts": {"template_date": "28.11.2026"}}, "'28.11.2026' is not a day of the calendar"),
        ({"prompts": {"template_date": "2026-11-31"}}, "'2026-11-31' is not a day of the calendar"),
        ({"prompts": {"template_date": "20261128"}}, "'20261128' is not a day of the calendar"),
    ],
)
def test_what_is_no_revision_and_no_date(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        build_config(tree(**sections))

    (problem,) = caught.value.problems
    assert said in problem


@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("policy.revision", "policy.model"),
        ("policy.adapter_revision", "policy.adapter"),
        ("reward.components.1.revision", "reward.components.1.model"),
        ("reward.components.1.tokenizer_revision", "reward.components.1.tokenizer"),
        ("prompts.revision", "prompts.source"),
        ("kl.coef", "kl.coef"),
    ],
)
def test_whose_revision_a_knob_is(key: str, field: str) -> None:
    assert place_of(key) == field
