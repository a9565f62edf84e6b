"""Pearson's correlation: hand-worked, against numpy, and where nothing varies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.ops.correlation import pearson

NUMBERS = st.lists(st.tuples(st.floats(-100, 100, width=32), st.integers(1, 64)), min_size=3, max_size=20)


def test_a_hand_worked_example() -> None:
    """x̄ = 2, ȳ = 3: Σ dx dy = 3, Σ dx² = 2, Σ dy² = 6, r = 3 / √12."""
    r = pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 2, 5]))
    assert float(r) == pytest.approx(3 / 12**0.5, rel=1e-12)


@given(NUMBERS)
def test_it_is_numpys(pairs: list[tuple[float, int]]) -> None:
    x, y = (np.array(values, np.float64) for values in zip(*pairs, strict=True))
    r = float(pearson(torch.tensor(x), torch.tensor(y)))
    if x.std() > 1e-3 and y.std() > 1e-3:
        assert r == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
    assert -1 <= r <= 1


@pytest.mark.parametrize("constant", [[0.0, 0.0, 0.0], [0.1, 0.1, 0.1], [1e8, 1e8, 1e8], [7, 7, 7]])
def test_nothing_goes_with_a_constant(constant: list[float]) -> None:
    moving = torch.tensor([1.0, 2.0, 3.0])
    assert float(pearson(torch.tensor(constant), moving)) == 0.0
    assert float(pearson(moving, torch.tensor(constant))) == 0.0


def test_one_response_or_none_has_no_correlation() -> None:
    assert float(pearson(torch.tensor([1.0]), torch.tensor([2.0]))) == 0.0
    assert float(pearson(torch.tensor([]), torch.tensor([]))) == 0.0


@pytest.mark.parametrize(("x", "y"), [((3,), (2,)), ((3, 1), (3, 1))])
def test_other_shapes_are_refused(x: tuple[int, ...], y: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must both be \[B\]"):
        pearson(torch.zeros(x), torch.zeros(y))
