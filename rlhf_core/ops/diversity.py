"""How repetitive responses are. B responses, R response tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
LARGEST = int(np.iinfo(np.int64).max)


def repetition(tokens_BR: Tensor, mask_BR: Tensor, *, ngram: int = 2) -> float:
    """Mean share of a response's n-grams that it has used before: 0 all new, towards 1 a loop.

        1 - |distinct n-grams| / |n-grams|

    Args:
        tokens_BR: [B, R] int64.
        mask_BR: [B, R] bool, right-padded.
        ngram: n, at least 1.
    Returns: the mean over responses; one shorter than n tokens counts as 0.
    Raises: ValueError if n < 1.
    Source: distinct-n, Li et al. 2016 (arXiv 1510.03055), per response and turned round.
    """
    codes_Bn, is_real_Bn = _ngrams(tokens_BR, mask_BR, ngram)
    sorted_Bn = np.sort(np.where(is_real_Bn, codes_Bn, -1), axis=1)
    new_B = (np.diff(sorted_Bn, axis=1, prepend=-1) != 0).sum(axis=1).tolist()
    all_B = is_real_Bn.sum(axis=1).tolist()
    shares = [1.0 - new / count if count else 0.0 for new, count in zip(new_B, all_B, strict=True)]
    return sum(shares) / max(len(shares), 1)


def distinct(tokens_BR: Tensor, mask_BR: Tensor, *, ngram: int = 2) -> float:
    """Distinct n-grams of all responses together, as a share of all their n-grams: low when they resemble each other.

        distinct-n = |distinct n-grams of the batch| / |n-grams of the batch|

    Args:
        tokens_BR: [B, R] int64.
        mask_BR: [B, R] bool, right-padded.
        ngram: n, at least 1.
    Returns: in (0, 1]; 1 where no response has n tokens. It falls with the number of tokens: compare like with like.
    Raises: ValueError if n < 1.
    Source: distinct-n, Li et al. 2016 (arXiv 1510.03055).
    """
    codes_Bn, is_real_Bn = _ngrams(tokens_BR, mask_BR, ngram)
    count = int(is_real_Bn.sum())
    return len(np.unique(codes_Bn[is_real_Bn])) / count if count else 1.0


def _ngrams(tokens_BR: Tensor, mask_BR: Tensor, ngram: int) -> tuple[Integers, Flags]:
    """(a number from 0 for each n-gram, the same for the same tokens; whether its tokens are real)."""
    if ngram < 1:
        raise ValueError(f"ngram must be at least 1, got {ngram}")
    tokens, places = tokens_BR.numpy(), max(0, tokens_BR.shape[1] - ngram + 1)
    base = int(tokens.max(initial=0)) + 1
    codes = tokens[:, :places].astype(np.int64)
    for offset in range(1, ngram):
        if int(codes.max(initial=0)) > LARGEST // base - 1:  # numbered anew, or they would not fit
            codes = np.unique(codes, return_inverse=True)[1].reshape(codes.shape)
        codes = codes * base + tokens[:, offset : offset + places]
    return codes, mask_BR.numpy()[:, ngram - 1 :]
