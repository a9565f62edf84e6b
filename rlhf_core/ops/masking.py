"""Means, variances and whitening over real tokens.

B responses, R response tokens. A mask is True on real tokens, everywhere. Masked entries are excluded by
``where``, never by multiplication: NaN x 0 is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_STD = 1e-6
"""A batch whose std is below this is centred, not divided."""


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over real entries.

    Args:
        values: any shape, floating point; anything, NaN included, where masked.
        mask: bool, same shape.
    Returns: a scalar; 0 if nothing is real.
    Raises: ValueError if shapes differ or the mask is not bool.
    Source: definition.
    """
    _check(values, mask)
    return torch.where(mask, values, 0.0).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over real entries.

    Args:
        values: any shape, floating point.
        mask: bool, same shape.
    Returns: a scalar; 0 if nothing is real.
    Raises: ValueError if shapes differ or the mask is not bool.
    Source: definition.
    """
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def masked_std(values: Tensor, mask: Tensor) -> Tensor:
    """Population standard deviation over real entries, computed in two passes.

    Args:
        values: any shape, floating point.
        mask: bool, same shape.
    Returns: a scalar.
    Raises: ValueError if shapes differ or the mask is not bool.
    Source: definition (divides by n, not n - 1: the batch is the population that is whitened).
    """
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask).sqrt()


def whiten(values: Tensor, mask: Tensor, *, keep_mean: bool) -> tuple[Tensor, bool]:
    """Scale real entries to std 1 around their mean, and shift them to mean 0 unless ``keep_mean``.

        centred:  (x - mean) / std          keep_mean:  (x - mean) / std + mean

    Args:
        values: any shape, float32.
        mask: bool, same shape.
        keep_mean: the mean of the result is that of the values (for rewards): [2, 6] becomes [3, 5].
    Returns: (whitened values, zero where masked; whether the division was left out because the std is
        below MIN_STD or only one entry is real).
    Raises: ValueError if shapes differ or the mask is not bool.
    Source: Ziegler et al. 2019, code (core.py:336 ``whiten``, whose ``shift_mean`` is ``not keep_mean``). Differs: a
        mask, the population std as there (TRL 1.12 and verl 0.9.1 have the sample's), and a constant batch is centred
        instead of being divided by sqrt(0 + 1e-8).
    """
    exact = values.double()  # in float32, the rounding of a large constant looks like a spread
    mean, std = masked_mean(exact, mask), masked_std(exact, mask)
    flat = bool(std < MIN_STD) or int(mask.sum()) < 2
    whitened = (exact - mean) / (torch.ones_like(std) if flat else std)
    if keep_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0).to(values.dtype), flat


def last_real(mask_BR: Tensor) -> Tensor:
    """True on the last real token of each row.

    Args:
        mask_BR: [B, R] bool, right-padded.
    Returns: [B, R] bool; a row without real tokens is all False.
    Raises: ValueError if the mask is not bool.
    Source: definition.
    """
    _check(mask_BR, mask_BR)
    following = torch.nn.functional.pad(mask_BR[:, 1:], (0, 1), value=False)
    return mask_BR & ~following


def _check(values: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask is bool, True = real token; got {mask.dtype}")
    if values.shape != mask.shape:
        raise ValueError(f"values {tuple(values.shape)} and mask {tuple(mask.shape)} differ in shape")
