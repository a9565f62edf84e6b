"""Best-of-n: every subset counted, and a distribution whose maximum is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import F64_OP, SIGMAS
from torch.testing import assert_close

from rlhf_core.ops.best_of_n import best_of_n_kl, best_of_n_score

EXAMPLES = settings(max_examples=30)
SCORES = st.lists(st.integers(-5, 5), min_size=1, max_size=7)


@given(SCORES)
@EXAMPLES
def test_it_is_the_mean_maximum_of_all_subsets(scores: list[int]) -> None:
    score_QN = torch.tensor([scores, scores[::-1]], dtype=torch.float32)
    for n in range(1, len(scores) + 1):
        subsets = list(itertools.combinations(scores, n))
        expected = sum(map(max, subsets)) / len(subsets)
        assert_close(best_of_n_score(score_QN, n), torch.tensor([expected] * 2, dtype=torch.float64), **F64_OP)


def test_uniform_scores_have_a_mean_maximum_of_n_by_n_plus_1() -> None:
    generator = torch.Generator().manual_seed(0)
    score_QN = torch.rand(400, 256, generator=generator, dtype=torch.float64)
    for n in (1, 2, 8, 32):
        found_Q = best_of_n_score(score_QN, n)
        assert abs(float(found_Q.mean()) - n / (n + 1)) < SIGMAS * float(found_Q.std()) / math.sqrt(400)


def test_it_stays_exact_with_thousands_of_samples() -> None:
    ranks = torch.arange(1.0, 4097.0, dtype=torch.float64)[None, :]  # mean maximum of n of 1 .. N: n (N + 1) / (n + 1)
    for n in (1, 2, 64, 1024, 4096):
        assert float(best_of_n_score(ranks, n)) == pytest.approx(n * 4097 / (n + 1), rel=1e-9)


def test_more_than_there_are_is_refused() -> None:
    for n in (0, 4):
        with pytest.raises(ValueError, match="between 1 and the 3 samples"):
            best_of_n_score(torch.zeros(2, 3), n)
    with pytest.raises(ValueError, match="at least 1"):
        best_of_n_kl(0)


def test_its_kl_is_that_of_continuous_scores() -> None:
    """∫ n u^(n-1) log(n u^(n-1)) du over u in [0, 1], by a fine sum."""
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for n in (1, 2, 4, 16):
        density = n * u ** (n - 1)
        assert best_of_n_kl(n) == pytest.approx(float((density * density.log()).mean()), abs=1e-4)
