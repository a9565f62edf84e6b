"""Repetition, by hand."""

from __future__ import annotations

import pytest
import torch

from rlhf_core.ops.diversity import repetition


def measure(*rows: list[int], ngram: int = 2) -> float:
    width = max(len(row) for row in rows)
    tokens = torch.tensor([row + [7] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return repetition(tokens, mask, ngram=ngram)


def test_all_new_is_0_and_a_loop_tends_to_1() -> None:
    assert measure([1, 2, 3, 4]) == 0.0
    assert measure([5, 5, 5, 5, 5]) == pytest.approx(3 / 4)  # one distinct bigram of four
    assert measure([1, 2, 1, 2, 1]) == pytest.approx(2 / 4)


def test_it_is_a_mean_over_responses_and_padding_is_no_repetition() -> None:
    assert measure([5, 5, 5], [1]) == pytest.approx((1 / 2 + 0) / 2)
    assert measure([1, 2], [1, 2, 3, 4, 5, 6]) == 0.0


def test_longer_ngrams() -> None:
    assert measure([1, 2, 1, 2], ngram=3) == 0.0
    with pytest.raises(ValueError, match="at least 1"):
        measure([1], ngram=0)
