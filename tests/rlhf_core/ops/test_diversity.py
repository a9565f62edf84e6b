"""Repetition, by hand."""

from __future__ import annotations

import pytest
import torch

from rlhf_core.ops.diversity import distinct, repetition


def padded(*rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    tokens = torch.tensor([row + [7] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return tokens, mask


def measure(*rows: list[int], ngram: int = 2) -> float:
    return repetition(*padded(*rows), ngram=ngram)


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


def test_distinct_counts_over_the_whole_batch() -> None:
    assert distinct(*padded([1, 2, 3], [1, 2, 3]), ngram=2) == pytest.approx(2 / 4)  # nothing repeats within a row
    assert distinct(*padded([1, 2, 3], [3, 2, 1]), ngram=2) == 1.0
    assert distinct(*padded([1, 2, 1], [1]), ngram=1) == pytest.approx(2 / 4)
    assert distinct(*padded([1], [2]), ngram=2) == 1.0
    with pytest.raises(ValueError, match="at least 1"):
        distinct(*padded([1]), ngram=0)


def test_counts_are_those_of_sets_of_tuples() -> None:
    """Also where the numbers of n-grams outgrow 64 bits and are given anew."""
    generator = torch.Generator().manual_seed(1)
    for vocabulary, ngram in [(3, 1), (3, 2), (4, 5), (50_000, 2), (50_000, 6)]:
        rows = [
            torch.randint(vocabulary, (int(length),), generator=generator).tolist()
            for length in torch.randint(1, 40, (20,), generator=generator)
        ]
        rows += [rows[0] + rows[0]]
        grams = [[tuple(row[i : i + ngram]) for i in range(len(row) - ngram + 1)] for row in rows]
        shares = [1 - len(set(row)) / len(row) if row else 0.0 for row in grams]
        assert measure(*rows, ngram=ngram) == pytest.approx(sum(shares) / len(rows))
        together = [gram for row in grams for gram in row]
        assert distinct(*padded(*rows), ngram=ngram) == pytest.approx(len(set(together)) / len(together))
