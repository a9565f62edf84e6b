"""The small files of a model: its configs, and whether it has a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_core.contracts.errors import UserError
from rlhf_core.models.hub import folder_of
from rlhf_core.models.untrusted import transformers_config


def place_of(name: str) -> str:
    """The folder of a model, or of a hub id's commit. Raises UserError where there is neither."""
    return str(folder_of(name, "model"))


def config_of(name: str) -> Any:
    """The transformers config of a model; None where there is none that loads, which is told where it is read."""
    try:
        return transformers_config(place_of(name))
    except Exception:
        return None


def generation_config_of(name: str) -> Any:
    """The generation_config.json of a model; None without one. Raises whatever one that does not load raises."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(place_of(name))
    except OSError:  # the file is optional
        return None


def first_file(name: str, files: Sequence[str]) -> str | None:
    """The first of some files that a folder or hub id has; None where it has none of them, or cannot be found."""
    try:
        folder = folder_of(name, "model")
    except UserError:
        return None
    return next((file for file in files if (folder / file).is_file()), None)
