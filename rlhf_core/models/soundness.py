"""Whether a model computes a row the same way in every company: beside other rows, from a cache, and alone.

A row alone, without padding, through transformers is what is right. Everything else is compared with it: rows of
different lengths together, and prompts padded on the left that go on from a cache. Architectures that mix rows
(padding without a mask, expert capacities, frequencies that follow the longest row) or lose their state fail here.

T tokens of all rows, L tokens of one row, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor

from rlhf_core.models.packing import PackedRows
from rlhf_core.models.prefixes import Prefix

ROW_TOLERANCE: Final = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Largest distance of two hidden states of one token, relative to their length. Another batch, padding or cache moves
float32 by 1e-6 to 1e-4 and bfloat16 by some hundredths; an architecture that mixes rows moves them by tenths."""
SHORT_ROWS: Final = (9, 4)
STEPS: Final = 3
Alone = Callable[[list[int]], Tensor]
"""From a row to its hidden states [L, D], by transformers, without padding or cache."""


def plain_tokens(config: Any, count: int) -> list[int]:
    """Different token ids, as far as there are enough, that a config gives no meaning: no EOS, PAD or image token."""
    special: set[int] = set()
    for part in (config, config.get_text_config()):
        for key, value in cast("Mapping[str, Any]", part.to_dict()).items():
            if key.endswith(("token_id", "token_ids", "token_index")):
                special |= {v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)}
    size = int(config.get_text_config().vocab_size)
    usable = [token for token in range(2, min(size, 4 * count + 64)) if token not in special] or [0]
    return [usable[i % len(usable)] for i in range(count)]


def rows_of(tokens: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Rows of these lengths, each from another place of the tokens, which repeat."""
    return [[tokens[(7 * i + j) % len(tokens)] for j in range(length)] for i, length in enumerate(lengths)]


def distance(found_LD: Tensor, right_LD: Tensor) -> float:
    """The largest relative distance of two hidden states of one token; infinite where one is not finite."""
    if found_LD.shape != right_LD.shape:
        return float("inf")
    found, right = found_LD.float(), right_LD.float()
    scale = right.norm(dim=-1).clamp(min=1e-6)
    worst = ((found - right).norm(dim=-1) / scale).max()
    return float(worst) if bool(torch.isfinite(worst)) else float("inf")


def row_distance(together: Callable[[PackedRows], Tensor], alone: Alone, rows: Sequence[list[int]]) -> float:
    """How far rows are from themselves alone when they are computed together.

    Args:
        together: from rows to hidden states [T, D].
        alone: the judge.
        rows: of different lengths.
    """
    right = [alone(row) for row in rows]
    packed = PackedRows.of(rows, right[0].device)
    found = together(packed).split([len(row) for row in rows])
    return max(map(distance, found, right))


def causal_distance(alone: Alone, row: list[int]) -> float:
    """How far a later token moves the hidden states before it: 0 where a model reads from left to right."""
    half = max(1, len(row) // 2)
    return distance(alone(row)[:half], alone(row[:half]))


def decoding_distance(
    begin: Callable[[Sequence[Sequence[int]]], Prefix], alone: Alone, rows: Sequence[list[int]], steps: int
) -> float:
    """How far prompts that go on from a cache are from the same texts in one pass.

    Args:
        begin: from prompts to a prefix that goes on, one sample or several of each prompt.
        alone: the judge.
        rows: prompts with what follows them.
        steps: how many tokens at each end are read one at a time.
    """
    right = [alone(row)[-steps - 1 :] for row in rows]
    prefix = begin([row[:-steps] for row in rows])
    worst, of_row = 0.0, list(range(len(rows))) * (len(prefix.hidden_bD) // len(rows))
    of_row.sort()
    for step in range(steps + 1):
        hidden_bD = prefix.hidden_bD
        worst = max(worst, *(distance(hidden_bD[b][None], right[row][step][None]) for b, row in enumerate(of_row)))
        if step == steps:
            break
        if step == 1:  # the second half of the samples leaves, as finished responses do
            kept = [b for b in range(len(of_row)) if b == 0 or of_row[b] != of_row[b - 1]]
            prefix.select(torch.tensor(kept, device=hidden_bD.device))
            of_row = [of_row[b] for b in kept]
        tokens = [rows[row][len(rows[row]) - steps + step] for row in of_row]
        prefix.advance(torch.tensor(tokens, device=hidden_bD.device))
    return worst
