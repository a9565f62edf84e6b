"""How two numbers of a response go together. B responses."""

from __future__ import annotations

import torch
from torch import Tensor


def pearson(x_B: Tensor, y_B: Tensor) -> Tensor:
    """Pearson's correlation over a batch.

        r = Σ (x - x̄)(y - ȳ) / √(Σ (x - x̄)² · Σ (y - ȳ)²)

    Args:
        x_B: [B] any number type.
        y_B: [B] any number type.
    Returns: a float64 scalar in [-1, 1]; 0 where either is constant (to 1e-6 of its size), as nothing goes with it.
    Raises: ValueError if shapes differ or are not [B].
    Source: definition.
    """
    if x_B.shape != y_B.shape or x_B.dim() != 1:
        raise ValueError(f"shapes must both be [B], got {tuple(x_B.shape)} and {tuple(y_B.shape)}")
    x_B, y_B = x_B.double(), y_B.double()
    dx_B, dy_B = x_B - x_B.mean(), y_B - y_B.mean()
    for values_B, differences_B in ((x_B, dx_B), (y_B, dy_B)):
        if len(values_B) == 0 or bool(differences_B.abs().max() <= 1e-6 * values_B.abs().max()):
            return torch.zeros((), dtype=torch.float64)
    return ((dx_B * dy_B).sum() / (dx_B.norm() * dy_B.norm())).clamp(-1.0, 1.0)
