"""How repetitive responses are. B responses, R response tokens."""

from __future__ import annotations

from torch import Tensor


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
    if ngram < 1:
        raise ValueError(f"ngram must be at least 1, got {ngram}")
    shares: list[float] = []
    for row, mask in zip(tokens_BR, mask_BR, strict=True):
        ids: list[int] = row[mask].tolist()
        grams = [tuple(ids[i : i + ngram]) for i in range(len(ids) - ngram + 1)]
        shares.append(1.0 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / max(len(shares), 1)
