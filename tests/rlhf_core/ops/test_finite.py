"""The first tensor that is not finite: found wherever it stands, whatever the type."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.ops.finite import first_not_finite


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    where=st.integers(0, 19),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    data=st.data(),
)
def test_one_bad_number_anywhere_names_its_tensor(
    sizes: list[int], where: int, value: float, data: st.DataObject
) -> None:
    named = [(f"t{i}", torch.full((n, 2), -3.4e38)) for i, n in enumerate(sizes)]
    assert first_not_finite(named) is None
    filled = [i for i, n in enumerate(sizes) if n]
    if filled:
        index = data.draw(st.sampled_from(filled))
        tensor = named[index][1].view(-1)
        tensor[where % len(tensor)] = value
        assert first_not_finite(named) == f"t{index}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_every_type_that_a_model_holds(dtype: torch.dtype) -> None:
    assert first_not_finite([("a", torch.ones(3).to(dtype)), ("step", torch.tensor(1.0))]) is None
    assert first_not_finite([("a", torch.ones(3).to(dtype)), ("step", torch.tensor(math.nan))]) == "step"


def test_nothing_is_finite() -> None:
    assert first_not_finite([]) is None
