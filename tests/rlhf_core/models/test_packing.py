"""Rows of different lengths, packed and padded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import EXACT, F32_OP
from torch.testing import assert_close

from rlhf_core.models.packing import PackedRows, packed_attention, take_once

ROWS = [[5, 6, 7], [8], [9, 10]]


def test_by_hand() -> None:
    rows = PackedRows.of(ROWS)
    assert rows.tokens_T.tolist() == [5, 6, 7, 8, 9, 10]
    assert rows.positions_T.tolist() == [0, 1, 2, 0, 0, 1]
    assert rows.starts_B.tolist() == [0, 3, 4]
    assert rows.ends_B.tolist() == [2, 3, 5]
    assert rows.padded(rows.tokens_T).tolist() == [[5, 6, 7], [8, 8, 8], [9, 10, 10]]


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 9))
@settings(max_examples=25)
def test_padding_and_packing_are_inverse_and_gradients_know_of_no_padding(lens: list[int], seed: int) -> None:
    rows = PackedRows.of([[0] * n for n in lens])
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(lens), 3, generator=generator, requires_grad=True)
    padded = rows.padded(x)
    assert padded.shape == (len(lens), max(lens), 3)
    assert torch.equal(rows.packed(padded), x)
    weight = torch.randn(padded.shape, generator=generator)  # padding weighs, too
    (grad,) = torch.autograd.grad((padded * weight).sum(), x)
    expected = torch.cat([weight[b, :n] for b, n in enumerate(lens)])
    assert_close(grad, expected, **EXACT)
    (grad,) = torch.autograd.grad((rows.packed(rows.padded(x)) * x.detach()).sum(), x)
    assert_close(grad, x.detach(), **EXACT)


def test_what_is_taken_once_gets_its_gradient_back() -> None:
    x = torch.arange(8.0).reshape(4, 2).requires_grad_()
    taken = take_once(x, torch.tensor([3, 1]))
    assert taken.tolist() == [[6, 7], [2, 3]]
    (grad,) = torch.autograd.grad((taken * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum(), x)
    assert grad.tolist() == [[0, 0], [3, 4], [0, 0], [1, 2]]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_stays_within_its_row(kv_heads: int) -> None:
    """Against softmax(q kᵀ / √d) v of each row alone, in float64."""
    rows, generator = PackedRows.of(ROWS), torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 6, 8, generator=generator)
    k, v = torch.randn(2, 1, kv_heads, 6, 8, generator=generator)
    found, _ = packed_attention(torch.nn.Identity(), q, k, v, None, packed_rows=rows, scaling=8**-0.5)
    assert found.shape == (1, 6, 4, 8)
    for start, end in zip(rows.starts_B.tolist(), (rows.ends_B + 1).tolist(), strict=True):
        for head in range(4):
            mine = head * kv_heads // 4
            scores = q[0, head, start:end].double() @ k[0, mine, start:end].double().T / 8**0.5
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
            expected = scores.softmax(dim=1) @ v[0, mine, start:end].double()
            assert_close(found[0, start:end, head].double(), expected, **F32_OP)


def test_options_that_change_scores_are_refused() -> None:
    rows, x = PackedRows.of(ROWS), torch.zeros(1, 1, 6, 4)
    with pytest.raises(ValueError, match="knows no softcap"):
        packed_attention(torch.nn.Identity(), x, x, x, None, packed_rows=rows, softcap=5.0)
