"""Token rows of different lengths in one pass, without padding.

Everything in a transformer but attention looks at one token at a time: it sees the T real tokens of all rows, one
after the other, as one row of a batch of one. Attention alone sees rows, padded on the right, where causality hides
the padding. transformers takes the attention function by name from a registry, and hands it our ``PackedRows``.

B rows, L the longest of them, T tokens of all rows, H heads, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

PACKED_ATTENTION = "rlhf_packed"
"""Our name in transformers' registry of attention functions."""


@dataclass(frozen=True)
class PackedRows:
    """The tokens of all rows, and where each row ends.

    Example: ``PackedRows.of([[5, 6, 7], [8]])`` has tokens_T 5 6 7 8 and lens_B 3 1.
    """

    tokens_T: Tensor
    """int64"""
    lens_B: Tensor
    """int64, at least 1 each"""

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], device: torch.device | None = None) -> PackedRows:
        """From lists of token ids, none empty."""
        tokens = [token for row in rows for token in row]
        return cls(torch.tensor(tokens, device=device), torch.tensor([len(row) for row in rows], device=device))

    @functools.cached_property
    def starts_B(self) -> Tensor:
        """Where each row begins among the T tokens."""
        return self.lens_B.cumsum(dim=0) - self.lens_B

    @property
    def ends_B(self) -> Tensor:
        """Where the last token of each row stands."""
        return self.starts_B + self.lens_B - 1

    @functools.cached_property
    def longest(self) -> int:
        """L."""
        return int(self.lens_B.max())

    @functools.cached_property
    def positions_T(self) -> Tensor:
        """Of each token in its row, from 0."""
        return torch.arange(len(self.tokens_T), device=self.lens_B.device) - self._of_each_token(self.starts_B)

    @functools.cached_property
    def cells_T(self) -> Tensor:
        """Where each token stands in the flattened [B, L] of padded rows."""
        rows_B = torch.arange(len(self.lens_B), device=self.lens_B.device)
        return self._of_each_token(rows_B) * self.longest + self.positions_T

    @functools.cached_property
    def sources_BL(self) -> Tensor:
        """Flattened [B, L]: the token in each cell; the row's last one again where it is padded."""
        columns_L = torch.arange(self.longest, device=self.lens_B.device)
        return (self.starts_B[:, None] + columns_L).minimum(self.ends_B[:, None]).reshape(-1)

    @property
    def is_even(self) -> bool:
        """Whether all rows are equally long."""
        return len(self.lens_B) * self.longest == len(self.tokens_T)

    def padded(self, values_TX: Tensor) -> Tensor:
        """[T, ...] -> [B, L, ...]; keeps gradient."""
        cells = values_TX if self.is_even else _Spread.apply(values_TX, self.sources_BL, self.cells_T)
        return cells.reshape(len(self.lens_B), self.longest, *values_TX.shape[1:])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """[T, H, d] of queries [H, T, d], keys and values [H or fewer, T, d]; causal, each token in its own row."""
        q, k, v = (self.padded(states.transpose(0, 1)).transpose(1, 2) for states in (query, key, value))
        attended_BHLd = scaled_dot_product_attention(
            q, k, v, scale=scaling, is_causal=True, enable_gqa=query.shape[0] != key.shape[0]
        )
        return self.packed(attended_BHLd.transpose(1, 2))

    def packed(self, values_BLX: Tensor) -> Tensor:
        """[B, L, ...] -> [T, ...]; keeps gradient."""
        cells = values_BLX.reshape(-1, *values_BLX.shape[2:])
        return cells if self.is_even else take_once(cells, self.cells_T)

    def _of_each_token(self, values_B: Tensor) -> Tensor:
        return values_B.repeat_interleave(self.lens_B, output_size=len(self.tokens_T))


@functools.cache
def no_mask(device: torch.device) -> Tensor:
    """A mask of four dimensions is handed on as it is, so that none is built."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


class ReadRows(Protocol):
    """All tokens of rows, which attention keeps apart."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """[T, H, d] of queries [H, T, d], keys and values [H or fewer, T, d]."""
        ...


class KeptRows(Protocol):
    """Rows that go on by a token at a time, over keys and values that stay where they are."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """[b, 1, H, d / H] of queries [b, H, 1, d / H]."""
        ...


class _Spread(torch.autograd.Function):
    """Copy tokens into cells. What padding would give back as gradient is nobody's."""

    @staticmethod
    def forward(ctx: Any, values_TX: Tensor, sources_BL: Tensor, cells_T: Tensor) -> Tensor:
        ctx.cells_T = cells_T
        return values_TX.index_select(0, sources_BL)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.cells_T), None, None


def take_once(values: Tensor, index: Tensor) -> Tensor:
    """Some rows of a tensor, each at most once, so that their gradients are put back without adding up.

    Args:
        values: [T, ...].
        index: [N] int64, no number twice.
    Returns: [N, ...].
    """
    return cast("Tensor", _TakeOnce.apply(values, index))


class _TakeOnce(torch.autograd.Function):
    """A gather whose gradient is a copy."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor) -> Tensor:
        ctx.index, ctx.num_rows = index, len(values)
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad_values = grads[0].new_zeros(ctx.num_rows, *grads[0].shape[1:])
        return grad_values.index_copy_(0, ctx.index, grads[0]), None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_rows: ReadRows | None = None,
    kept_rows: KeptRows | None = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row, of all its tokens or of the newest alone.

    Args:
        module: the attention layer.
        query: [1, H, T, D / H].
        key: [1, H or fewer, T, D / H].
        value: as key.
        attention_mask: of no meaning for packed rows, which say all there is to say.
        packed_rows: all tokens of the rows.
        kept_rows: where the newest tokens are, and what came before them. With neither it is a call of another kind,
            which transformers' own function answers.
        scaling: of the scores.
        options: whatever else the layer says.
    Returns: ([1, T, H, D / H], None).
    Raises: ValueError for an option that changes the scores, such as soft-capping.
    """
    if packed_rows is None and kept_rows is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]:
        raise ValueError(f"packed attention knows no {', '.join(unknown)}")
    if packed_rows is None:
        assert kept_rows is not None, "seen above"
        return kept_rows.attend(query, key, value, scaling), None
    return packed_rows.attend(query.squeeze(0), key.squeeze(0), value.squeeze(0), scaling).unsqueeze(0), None


@functools.cache
def register_packed_attention() -> None:
    """Make the function known to transformers under its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
