"""The small files of a model: its configs, and whether it has a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def place_of(name: str) -> str:
    """Where transformers finds a model: its folder, or a hub id."""
    return str(Path(name).expanduser())


def config_of(name: str) -> Any:
    """The transformers config of a model; None where there is none that loads, which is told where it is read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(place_of(name), trust_remote_code=False)
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
    """The first of some files that a folder or hub id has."""
    from transformers.utils.hub import cached_file

    for file in files:
        try:
            if cached_file(place_of(name), file, _raise_exceptions_for_missing_entries=False) is not None:
                return file
        except (OSError, ValueError):
            return None
    return None
