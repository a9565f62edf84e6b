"""Whether any of many tensors holds NaN or infinity."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity.

    Args:
        named: names and tensors of any shape and number type.
    Returns: its name; None if all numbers are finite.
    Raises: nothing.
    Source: definition. The extremes of a tensor are NaN or infinite if one of its numbers is: one pass, no copy.
    """
    pairs = [(name, torch.stack(torch.aminmax(tensor))) for name, tensor in named if tensor.numel()]
    finite = [torch.isfinite(extremes).all() for _, extremes in pairs]  # asked for all before one is waited for
    return next((name for (name, _), good in zip(pairs, finite, strict=True) if not bool(good)), None)
