"""Gradient checkpointing: a layer's activations are computed again in the backward pass instead of being kept.

transformers ties it to training mode, in which dropout would be on. Here each layer is wrapped by itself, so
that every module stays in eval mode, and nothing changes without gradient (decoding with a cache, a reference).
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.utils.checkpoint import checkpoint

from rlhf_core.contracts.errors import UserError


def recompute_activations(trunk: Any, *, field: str) -> None:
    """Turn it on for every layer of a transformer that supports it.

    Args:
        trunk: changed in place.
        field: whose model it is, named in errors.
    Raises: UserError if its architecture has no such layers.
    """
    for layer in recomputable_layers(trunk, field=field):
        _recompute(layer)


def recomputable_layers(trunk: Any, *, field: str) -> list[nn.Module]:
    """The layers that can be recomputed. Raises UserError if there are none."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [layer for layer in cast("nn.Module", trunk).modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"policy.gradient_checkpointing is true, but {field} is of architecture {trunk.config.model_type!r}, which "
            "has no layers that can be recomputed; set policy.gradient_checkpointing false"
        )
    return cast("list[nn.Module]", layers)


def _recompute(layer: nn.Module) -> None:
    plain = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(plain, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    layer.forward = forward
