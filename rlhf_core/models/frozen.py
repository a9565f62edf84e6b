"""Frozen models: one copy in memory of the same weights, and what happens to it between stages."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from rlhf_core.models.hub import folder_of
from rlhf_core.models.language_model import load_transformers_model


class FrozenModels:
    """Models that are only read: the same folder, class and type is loaded once while anybody holds it."""

    def __init__(self) -> None:
        self._held: weakref.WeakValueDictionary[tuple[str, str, torch.dtype], nn.Module] = weakref.WeakValueDictionary()

    def load(self, auto_class: str, name: str, dtype: torch.dtype, field: str) -> Any:
        """As ``load_transformers_model``, or the copy that is there already. Raises UserError if it does not load."""
        key = (auto_class, str(folder_of(name, field).resolve()), dtype)
        model = self._held.get(key)
        if model is None:
            model = load_transformers_model(auto_class, name, dtype, field).eval().requires_grad_(False)
            self._held[key] = model
        return model


def move_models(holders: object, device: torch.device) -> None:
    """Move frozen models to a device, in place.

    Args:
        holders: a language model, a reward model, or several; what holds no model is left alone.
        device: where to.
    """
    for holder in holders if isinstance(holders, Iterable) else [holders]:
        model = getattr(holder, "model", None)
        if isinstance(model, nn.Module):
            model.to(device)
