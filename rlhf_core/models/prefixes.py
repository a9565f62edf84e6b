"""Prompts and what was drawn after them, as a transformers model remembers them.

Q prompts, P tokens of the longest, b rows still going, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor


class Prefix(Protocol):
    """What a decoding loop needs of a model."""

    hidden_bD: Tensor
    """The trunk's output at the newest token of each row."""
    compact_below: float
    """Finished rows are worth dropping once fewer than this share of the rows is still going."""
    steps_between_checks: int
    """How many tokens to read before it is worth asking which rows are still going."""

    def select(self, keep: Tensor) -> None:
        """Go on with these rows alone."""
        ...

    def advance(self, tokens_b: Tensor) -> None:
        """Read one more token a row."""
        ...


class CachedPrefix:
    """Any architecture, through transformers' own cache; prompts are padded on the left.

    Args:
        run_trunk: from what transformers takes to hidden states.
        config: of the model.
        device: where it lives.
        prompts: Q token lists.
        samples_per_prompt: k copies of each prompt, after one another, read once.
        pad_id: fills prompts on the left.
    """

    compact_below, steps_between_checks = 0.85, 1

    def __init__(
        self,
        run_trunk: Callable[..., Tensor],
        config: Any,
        device: torch.device,
        prompts: Sequence[Sequence[int]],
        samples_per_prompt: int,
        *,
        pad_id: int,
    ) -> None:
        from transformers import DynamicCache

        width = max(len(p) for p in prompts)
        tokens_QP = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
        real_QP = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        self._run_trunk, self.cache = run_trunk, DynamicCache(config=config)
        hidden_QPD = run_trunk(
            input_ids=tokens_QP,
            attention_mask=real_QP,
            position_ids=(real_QP.cumsum(dim=1) - 1).clamp(min=0),
            past_key_values=self.cache,
            use_cache=True,
        )
        if samples_per_prompt > 1:
            self._take_rows(torch.arange(len(prompts), device=device).repeat_interleave(samples_per_prompt))
        self.attention_bT = real_QP.repeat_interleave(samples_per_prompt, dim=0)
        self.hidden_bD = hidden_QPD[:, -1].repeat_interleave(samples_per_prompt, dim=0)

    def select(self, keep: Tensor) -> None:
        """Go on with these rows alone."""
        self._take_rows(keep)
        self.attention_bT = self.attention_bT[keep]

    def advance(self, tokens_b: Tensor) -> None:
        """Read one more token a row."""
        self.attention_bT = torch.nn.functional.pad(self.attention_bT, (0, 1), value=1)
        hidden_b1D = self._run_trunk(
            input_ids=tokens_b[:, None],
            attention_mask=self.attention_bT,
            position_ids=self.attention_bT.sum(dim=1, keepdim=True) - 1,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.hidden_bD = hidden_b1D[:, 0]

    def _take_rows(self, rows: Tensor) -> None:
        """Keep these rows of the cache, in this order. Layers of every kind can be reordered, and not all repeated."""
        self.cache.reorder_cache(cast("torch.LongTensor", rows))
