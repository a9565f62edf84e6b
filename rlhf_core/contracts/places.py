"""Which fields of a config name a model, and the same config with other names in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.reward_config import ModelReward


def model_places(config: RunConfig) -> dict[str, str]:
    """Field -> folder or hub id of every model, adapter and tokenizer that a config names."""
    places: dict[str, str | None] = {
        "policy.model": config.policy.model,
        "policy.adapter": config.policy.adapter,
        "reference.model": config.reference.model,
        "reference.adapter": config.reference.adapter,
    }
    for index, component in enumerate(config.reward.components):
        if isinstance(component, ModelReward):
            places[f"reward.components.{index}.model"] = component.model
            places[f"reward.components.{index}.tokenizer"] = component.tokenizer
    return {field: place for field, place in places.items() if place}


def place_of(key: str) -> str:
    """The field whose name a revision belongs to: ``policy.revision`` -> ``policy.model``; any other key itself."""
    section, _, knob = key.rpartition(".")
    if knob == "revision":
        return f"{section}.{'source' if section == 'prompts' else 'model'}"
    return key.removesuffix("_revision")


def with_places(config: RunConfig, places: Mapping[str, str | None]) -> RunConfig:
    """The config with other values in some fields: ``{"policy.model": FOLDER}``."""
    if not places:
        return config
    tree: dict[str, Any] = config.model_dump()
    for field, value in places.items():
        put_place(tree, field, value)
    return build_config(tree)


def put_place(tree: Any, field: str, value: str | None) -> None:
    """Set one field of a config's tree, in place; numbers in its name reach into lists."""
    *path, last = field.split(".")
    for part in path:
        tree = tree[int(part)] if part.isdecimal() else tree[part]
    tree[last] = value
