"""LoRA in the config: which knobs go together, and what the reference is."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_core.contracts.config_io import build_config, config_digest, config_template, parse_yaml
from rlhf_core.contracts.errors import UserError

REFERENCES: dict[str, tuple[dict[str, Any], str | None, bool, bool]] = {
    # case: (sections, adapter of the reference, shares the trunk, starts at the reference)
    "whole weights": ({}, None, False, True),
    "fresh adapter": ({"policy": {"lora": {"rank": 8}}}, None, True, True),
    "sft adapter": ({"policy": {"adapter": "a"}}, "a", True, True),
    "sft adapter, base as reference": ({"policy": {"adapter": "a"}, "reference": {"model": "p"}}, None, True, False),
    "sft adapter, another one": ({"policy": {"adapter": "a"}, "reference": {"adapter": "b"}}, "b", True, False),
    "sft adapter, itself": ({"policy": {"adapter": "a"}, "reference": {"model": "p", "adapter": "a"}}, "a", True, True),
    "fresh adapter, another model": (
        {"policy": {"lora": {"rank": 8}}, "reference": {"model": "r"}},
        None,
        False,
        False,
    ),
    "sft adapter, another model": ({"policy": {"adapter": "a"}, "reference": {"model": "r"}}, None, False, False),
    "fresh adapter, other dtype": (
        {"policy": {"lora": {"rank": 8}}, "reference": {"dtype": "bfloat16"}},
        None,
        False,
        True,
    ),
    "fresh adapter, same dtype": (
        {"policy": {"lora": {"rank": 8}, "dtype": "bfloat16"}, "reference": {"dtype": "bfloat16"}},
        None,
        True,
        True,
    ),
    "whole weights, sft as reference": ({"reference": {"adapter": "b"}}, "b", False, False),
}


@pytest.mark.parametrize(("sections", "adapter", "shares", "starts"), REFERENCES.values(), ids=REFERENCES.keys())
def test_what_the_reference_is(sections: dict[str, Any], adapter: str | None, shares: bool, starts: bool) -> None:
    config = build_config({**sections, "policy": {"model": "p", **sections.get("policy", {})}})
    assert config.reference_adapter == adapter
    assert config.reference_shares_trunk == shares
    assert config.starts_at_reference == starts


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "two shapes": (
        {"adapter": "a", "lora": {"rank": 8}},
        "policy.lora.rank is 8, but policy.adapter 'a' brings a rank of its own; set policy.lora.rank null, or merge "
        "that adapter into policy.model",
    ),
    "alpha for nothing": (
        {"lora": {"alpha": 16.0}},
        "policy.lora.alpha is 16.0, but policy.lora.rank is null: there is no adapter; set policy.lora.rank, or leave "
        "policy.lora.alpha out",
    ),
    "targets of an adapter that has its own": (
        {"adapter": "a", "lora": {"target_modules": ["q_proj"]}},
        "policy.lora.target_modules is ['q_proj'], but policy.lora.rank is null: policy.adapter brings its own; set "
        "policy.lora.rank, or leave policy.lora.target_modules out",
    ),
    "all and some": (
        {"lora": {"rank": 8, "target_modules": ["all-linear", "q_proj"]}},
        "policy.lora.target_modules is ['all-linear', 'q_proj']: all-linear stands alone; name the layers, or use "
        "all-linear",
    ),
    "no targets": (
        {"lora": {"rank": 8, "target_modules": []}},
        "policy.lora.target_modules is empty; name the layers, or use all-linear",
    ),
    "dropout": (
        {"lora": {"rank": 8, "dropout": 0.1}},
        "policy.lora.dropout is not a known key; known keys: rank, alpha, target_modules, save",
    ),
    "rank 0": ({"lora": {"rank": 0}}, "policy.lora.rank is 0: input should be greater than 0"),
}


@pytest.mark.parametrize(("policy", "sentence"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_one_sentence(policy: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        build_config({"policy": {"model": "p", **policy}})
    assert list(caught.value.problems) == [sentence]


def test_score_normalization_by_the_reference_needs_to_start_there() -> None:
    sections = {"policy": {"model": "p", "adapter": "a"}, "shaping": {"score_normalization": "reference"}}
    build_config(sections)
    with pytest.raises(UserError) as caught:
        build_config(sections, ["reference.model=p"])
    assert "policy.model 'p' with adapter 'a', not from reference.model 'p'; use running" in caught.value.problems[0]


def test_one_target_needs_no_brackets() -> None:
    config = build_config({}, ["policy.lora.rank=2", "policy.lora.target_modules=c_attn"])
    assert config.policy.lora.target_modules == ["c_attn"]
    assert build_config(parse_yaml(config_template(config), origin="template")).policy == config.policy


def test_where_frozen_models_are_kept_is_no_part_of_a_runs_identity() -> None:
    keep, disk, recomputed = (
        config_digest(build_config({}, [override]))
        for override in ("frozen_models=keep", "frozen_models=disk", "policy.gradient_checkpointing=true")
    )
    assert keep == disk != recomputed
