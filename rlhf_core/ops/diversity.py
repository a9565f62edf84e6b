"""How repetitive responses are. B responses, R response tokens."""

from __future__ import annotations

from torch import Tensor

NGram = tuple[int, ...]


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
    shares = [1.0 - len(set(grams)) / len(grams) if grams else 0.0 for grams in _ngrams(tokens_BR, mask_BR, ngram)]
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
    grams = [gram for row in _ngrams(tokens_BR, mask_BR, ngram) for gram in row]
    return len(set(grams)) / len(grams) if grams else 1.0


def _ngrams(tokens_BR: Tensor, mask_BR: Tensor, ngram: int) -> list[list[NGram]]:
    if ngram < 1:
        raise ValueError(f"ngram must be at least 1, got {ngram}")
    rows: list[list[int]] = [row[mask].tolist() for row, mask in zip(tokens_BR, mask_BR, strict=True)]
    return [[tuple(ids[i : i + ngram]) for i in range(len(ids) - ngram + 1)] for ids in rows]
