"""Whether a transformer reads from left to right: asked of the model itself, since configs do not tell."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

CAUSAL_TOLERANCE = 1e-4


@torch.no_grad()
def is_causal(trunk: Any) -> bool:
    """Whether a later token leaves the hidden states of earlier ones as they are: so it is in a decoder alone.

    Args:
        trunk: a transformer without its head.
    """
    device = next(trunk.parameters()).device
    tokens_2L = torch.tensor([[2, 3, 4, 0], [2, 3, 4, 1]], device=device) % int(
        trunk.config.get_text_config().vocab_size
    )
    first_LD, second_LD = cast("Tensor", trunk(input_ids=tokens_2L, use_cache=False).last_hidden_state).float()
    scale = max(1.0, float(first_LD.abs().max()))
    return float((first_LD[:-1] - second_LD[:-1]).abs().max()) <= CAUSAL_TOLERANCE * scale
