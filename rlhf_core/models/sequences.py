"""Prompt and response as one row, for a teacher-forced pass.

B rows, P prompt tokens, R response tokens, L = longest prompt + response, N real response tokens of all rows,
T tokens that are read.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_core.contracts.batches import Prompts, Rollouts, Support
from rlhf_core.models.packing import PackedRows


@dataclass(frozen=True)
class Sequences:
    """Right-padded rows of prompt and response, and what of them is a response."""

    tokens_BL: Tensor
    """int64; 0 where padded"""
    prompt_lens_B: Tensor
    response_tokens_BR: Tensor
    response_mask_BR: Tensor
    supports: Sequence[Support] | None = None

    @classmethod
    def build(cls, prompts: Prompts, rollouts: Rollouts) -> Sequences:
        """The rows of an iteration's rollouts."""
        prompt_tokens_BP = prompts.tokens_QP[rollouts.prompt_rows]
        prompt_mask_BP = prompts.mask_QP[rollouts.prompt_rows]
        prompt_lens_B = prompt_mask_BP.sum(dim=1)
        response_lens_B = rollouts.response_mask_BR.sum(dim=1)
        tokens_BL = torch.zeros(len(prompt_lens_B), int((prompt_lens_B + response_lens_B).max()), dtype=torch.int64)
        columns_L = torch.arange(tokens_BL.shape[1])[None, :]
        is_prompt_BL = columns_L < prompt_lens_B[:, None]
        is_response_BL = ~is_prompt_BL & (columns_L < (prompt_lens_B + response_lens_B)[:, None])
        tokens_BL[is_prompt_BL] = prompt_tokens_BP[prompt_mask_BP]
        tokens_BL[is_response_BL] = rollouts.tokens_BR[rollouts.response_mask_BR]
        return cls(tokens_BL, prompt_lens_B, rollouts.tokens_BR, rollouts.response_mask_BR, rollouts.supports)

    def __len__(self) -> int:
        return len(self.tokens_BL)

    @property
    def lens_B(self) -> Tensor:
        """Prompt and response tokens of each row."""
        return self.prompt_lens_B + self.response_mask_BR.sum(dim=1)

    def rows(self, index: Tensor) -> Sequences:
        """Some rows, padded to the longest of them."""
        width, response = int(self.lens_B[index].max()), int(self.response_mask_BR[index].sum(dim=1).max())
        return Sequences(
            self.tokens_BL[index, :width],
            self.prompt_lens_B[index],
            self.response_tokens_BR[index, :response],
            self.response_mask_BR[index, :response],
            None if self.supports is None else [self.supports[i] for i in index.tolist()],
        )

    def to(self, device: torch.device) -> Sequences:
        """The same rows on a device; supports stay where they are until they are needed."""
        return Sequences(
            self.tokens_BL.to(device),
            self.prompt_lens_B.to(device),
            self.response_tokens_BR.to(device),
            self.response_mask_BR.to(device),
            self.supports,
        )

    @functools.cached_property
    def read(self) -> PackedRows:
        """The tokens that something is predicted from: all but the last of each row."""
        lens_B = (self.lens_B - 1).clamp(min=1)
        columns_L = torch.arange(self.tokens_BL.shape[1], device=lens_B.device)
        return PackedRows(self.tokens_BL[columns_L < lens_B[:, None]], lens_B)

    @functools.cached_property
    def before_response_N(self) -> Tensor:
        """Where among the T tokens read the one before each real response token stands, row after row."""
        steps_R = torch.arange(self.response_mask_BR.shape[1], device=self.tokens_BL.device)
        firsts_B = self.read.starts_B + self.prompt_lens_B - 1
        return (firsts_B[:, None] + steps_R)[self.response_mask_BR]

    def scatter(self, values_N: Tensor) -> Tensor:
        """[B, R]: one value per real response token back in its place, zero elsewhere. Keeps gradient."""
        padded_BR = values_N.new_zeros(self.response_mask_BR.shape)
        return padded_BR.masked_scatter(self.response_mask_BR, values_N)

    def support_mask(self, num_tokens: int) -> Tensor | None:
        """[N, V] bool: the tokens each response token could have been drawn from; None where all could."""
        if self.supports is None:
            return None
        tokens = torch.cat([support.tokens for support in self.supports]).to(self.tokens_BL.device)
        lens = torch.cat([support.lens for support in self.supports]).to(self.tokens_BL.device)
        mask_NV = torch.zeros(len(lens), num_tokens, dtype=torch.bool, device=self.tokens_BL.device)
        mask_NV[torch.repeat_interleave(torch.arange(len(lens), device=lens.device), lens), tokens] = True
        return mask_NV


def by_length(lens_B: Tensor, batch_size: int) -> list[Tensor]:
    """Row indices in batches of similar length, shortest first: little padding, and a fixed composition."""
    order_B = torch.argsort(lens_B, stable=True)
    return list(order_B.split(batch_size))
