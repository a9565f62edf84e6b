"""Sampling a token from logits with one uniform number per row. B rows, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
"""Tokens that are summed together before one of them is looked for."""
MAX_UNIFORM = {torch.float64: 1.0 - 2.0**-52, torch.float32: 1.0 - 2.0**-22}
"""Keeps u · total strictly below the total in that type, so that no token of probability 0 is ever drawn."""


@dataclass(frozen=True)
class Draw:
    """One token for each row."""

    tokens_B: Tensor
    """int64"""
    logprobs_B: Tensor
    """float32, under the distribution sampled from"""
    entropies_B: Tensor
    """float32, nats"""
    support_BV: Tensor | None
    """bool, the tokens that could be drawn; None where all could"""


def truncated_support(logits_BV: Tensor, *, top_k: int | None, top_p: float) -> Tensor | None:
    """The tokens that top-k and top-p (nucleus) leave.

    Args:
        logits_BV: [B, V] float32, already divided by the temperature.
        top_k: keep the k largest; ties at the edge are all kept. None: off.
        top_p: keep the smallest set of largest probabilities whose sum reaches this. 1: off.
    Returns: [B, V] bool with at least one True a row, or None if nothing is cut.
    Raises: ValueError if top_k < 1 or top_p is not in (0, 1].
    Source: Fan et al. 2018 (top-k); Holtzman et al. 2020 (nucleus). As in transformers, k is applied first.
    """
    if (top_k is not None and top_k < 1) or not 0 < top_p <= 1:
        raise ValueError(f"top_k must be at least 1 and top_p in (0, 1]; got {top_k} and {top_p}")
    support = None
    if top_k is not None and top_k < logits_BV.shape[1]:
        threshold_B1 = logits_BV.topk(top_k, dim=1).values[:, -1:]
        support = logits_BV >= threshold_B1
        logits_BV = logits_BV.masked_fill(~support, -torch.inf)
    if top_p < 1:
        sorted_BV, order_BV = logits_BV.softmax(dim=1).sort(dim=1, descending=True, stable=True)
        before_BV = sorted_BV.cumsum(dim=1) - sorted_BV
        keep_BV = torch.zeros_like(sorted_BV, dtype=torch.bool).scatter(1, order_BV, before_BV < top_p)
        support = keep_BV if support is None else support & keep_BV
    return support


def sample(logits_BV: Tensor, uniforms_B: Tensor, *, top_k: int | None = None, top_p: float = 1.0) -> Draw:
    """Draw one token a row by inverting the cumulative distribution at a given uniform number.

        token = min { v : Σ_{w <= v} π(w) > u }

    Args:
        logits_BV: [B, V] float32, already divided by the temperature.
        uniforms_B: [B] float64 in [0, 1). A number of 24 bits, as float32 has, would give a token of a vocabulary of
            150,000 up to 11 % more or less than its probability. mps has no float64: there the number is rounded to 24
            bits, and so is the cumulative distribution.
        top_k: see :func:`truncated_support`.
        top_p: see :func:`truncated_support`.
    Returns: a Draw; log-probs and entropies are those of the (truncated) distribution: NaN where a logit is.
    Raises: ValueError for a bad top_k or top_p.
    Source: inverse transform sampling. One number a row makes a draw a function of (seed, row, step) alone,
        whatever else is in the batch.
    """
    support_BV = truncated_support(logits_BV, top_k=top_k, top_p=top_p)
    if support_BV is not None:
        logits_BV = logits_BV.masked_fill(~support_BV, -torch.inf)
    logprobs_BV = logits_BV.log_softmax(dim=1)
    probs_BV = logprobs_BV.exp()
    tokens_B = _inverted(probs_BV, uniforms_B)
    picked_B = logprobs_BV.gather(1, tokens_B[:, None])[:, 0]
    surprise_BV = logprobs_BV.clamp_(min=torch.finfo(logprobs_BV.dtype).min)  # 0 · -inf is NaN
    return Draw(tokens_B, picked_B, -surprise_BV.mul_(probs_BV).sum(dim=1), support_BV)


def _inverted(probs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """[B] int64: the first token at which the cumulative distribution exceeds u times its total.

    In two steps, first the block of tokens and then the token in it: a running sum over a whole vocabulary is slow
    everywhere, and only one block of it is needed.
    """
    wide = torch.float32 if probs_BV.device.type == "mps" else torch.float64  # mps has no float64
    rows, size = probs_BV.shape
    whole = size - size % BLOCK
    blocks_Bn = probs_BV[:, :whole].view(rows, whole // BLOCK, BLOCK).sum(dim=2, dtype=wide)
    if whole < size:
        blocks_Bn = torch.cat([blocks_Bn, probs_BV[:, whole:].sum(dim=1, keepdim=True, dtype=wide)], dim=1)
    ends_Bn = blocks_Bn.cumsum(dim=1)
    targets_B1 = uniforms_B.to(wide).clamp(max=MAX_UNIFORM[wide])[:, None] * ends_Bn[:, -1:]
    block_B1 = torch.searchsorted(ends_Bn, targets_B1, right=True).clamp_(max=ends_Bn.shape[1] - 1)
    before_B1 = torch.where(block_B1 > 0, ends_Bn.gather(1, (block_B1 - 1).clamp_(min=0)), 0.0)
    tokens_Bk = block_B1 * BLOCK + torch.arange(BLOCK, device=probs_BV.device)
    inside_Bk = probs_BV.gather(1, tokens_Bk.clamp(max=size - 1)).masked_fill_(tokens_Bk >= size, 0.0)
    cumulative_Bk = inside_Bk.cumsum(dim=1, dtype=wide)
    # summed in another order, a block may end a rounding below the target: its last possible token is meant then
    last_B1 = torch.nextafter(cumulative_Bk[:, -1:], torch.zeros((), dtype=wide, device=probs_BV.device))
    place_B1 = torch.searchsorted(cumulative_Bk, torch.minimum(targets_B1 - before_B1, last_B1), right=True)
    # NaN logits find no place: the log-prob tells of them
    return (block_B1 * BLOCK + place_B1).clamp_(max=size - 1)[:, 0]
