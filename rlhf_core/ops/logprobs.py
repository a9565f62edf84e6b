"""Log-probs of given tokens from hidden states, without ever holding all logits.

N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_core.ops.laid_out import Map, laid_out

CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}
"""Logits held at a time, by device: 64 and 512 MiB of float32."""
ALIGNMENT = 8
LARGE = 1 << 22
"""Elements of a weight that is laid out for decoding; smaller ones stay in a cache as they are."""
PIECE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Logits worked on at a time: what stays in a processor's cache; what keeps an accelerator busy."""


@dataclass(frozen=True)
class Projection:
    """The map from hidden states to logits: softcap(scale · (W h + b)) / temperature.

    ``softcap(z) = c · tanh(z / c)`` (Gemma 2); ``scale`` is Cohere's logit_scale or 1 / Granite's logits_scaling.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    dtype: torch.dtype = torch.float32
    """Of hidden states and weights when they are multiplied. Sums are float32: a logit rounded to bfloat16 is off by
    up to a sixteenth at 20, and its token's ratio by as much."""
    num_tokens: int | None = None
    """V, where more rows than that stand in ``weight_VD``; None: all of them."""
    holes_H: Tensor | None = None
    """int64: ids below V that no token has. Their probability is 0."""
    product: Map | None = None
    """h -> W h without gradient, with the weight laid out for many calls; None: by ``weight_VD``."""

    def prepared(self) -> Projection:
        """The same map without gradient, its weight in the type of the product, once for many calls."""
        weight_VD = self.weight_VD.detach().to(self.dtype)
        if self.dtype is not torch.float32:
            if weight_VD.device.type == "cuda":  # the matrix units want rows of logits that begin at multiples of 16 B
                weight_VD = torch.nn.functional.pad(weight_VD, (0, 0, 0, -len(weight_VD) % ALIGNMENT))
            else:
                weight_VD = weight_VD.float()
        is_large = weight_VD.device.type == "cpu" and weight_VD.numel() >= LARGE
        product = laid_out(weight_VD) if is_large else None
        num_tokens = self.num_tokens or len(self.weight_VD)
        return dataclasses.replace(self, weight_VD=weight_VD, num_tokens=num_tokens, product=product)

    def logits(self, hidden_ND: Tensor, temperature: float) -> Tensor:
        """[N, V] float32 logits of a few positions."""
        z_NV = self.raw_logits(hidden_ND)
        if self.scale != 1.0:
            z_NV = z_NV * self.scale
        if self.softcap is not None:
            z_NV = self.softcap * torch.tanh(z_NV / self.softcap)
        if temperature != 1.0:
            z_NV = z_NV / temperature
        return z_NV if self.holes_H is None else z_NV.index_fill(1, self.holes_H, -torch.inf)

    def raw_logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, V] float32: W h + b."""
        hidden_ND = hidden_ND.to(self.dtype)
        z_NV = _product(hidden_ND, self.weight_VD.t()) if self.product is None else self.product(hidden_ND.float())
        z_NV = z_NV[:, : self.num_tokens]
        return z_NV if self.bias_V is None else z_NV.add_(self.bias_V[: self.num_tokens])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The product of two matrices, with sums and result in float32 whatever their types are. No gradient."""
    if left.dtype == right.dtype and left.dtype is not torch.float32 and left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def token_logprobs(
    hidden_ND: Tensor,
    projection: Projection,
    tokens_N: Tensor,
    *,
    temperature: float,
    support_NV: Tensor | None = None,
    chunk_elements: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the given tokens, log π(token), and the entropy of π there, chunk by chunk over positions.

        log π(y) = z_y - log Σ_v e^{z_v};    H = -Σ_v π(v) log π(v);    z = softcap(scale · (W h + b)) / T

    Args:
        hidden_ND: [N, D], the trunk's output at the position before each token; may carry gradient.
        projection: the output head; its weight and bias may carry gradient.
        tokens_N: [N] int64.
        temperature: T > 0.
        support_NV: [N, V] bool, the tokens that sampling could have drawn; None: all.
        chunk_elements: logits held at a time; None: as the device likes it. More positions than that are recomputed
            in the backward pass.
    Returns: (logprobs_N, entropies_N), float32.
    Raises: ValueError if shapes differ or T is not positive.
    Source: definition; gradients in :class:`_TokenLogprobs`. Memory is O(chunk), not O(N · V).
    """
    if hidden_ND.shape[:1] != tokens_N.shape:
        raise ValueError(f"{tuple(hidden_ND.shape)} hidden states and {tuple(tokens_N.shape)} tokens")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    held = chunk_elements or logits_at_a_time(hidden_ND.device.type)
    rows = max(1, held // projection.weight_VD.shape[0])
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return _TokenLogprobs.apply(
            hidden_ND,
            projection.weight_VD,
            projection.bias_V,
            tokens_N,
            support_NV,
            temperature,
            projection.scale,
            projection.softcap,
            projection.dtype,
            rows,
            projection.num_tokens,
            projection.holes_H,
        )


class _TokenLogprobs(torch.autograd.Function):
    """Forward keeps the probabilities only where they fit one chunk; otherwise backward computes them again.

    d log π(y) / d z_v = [v = y] - π(v);      d H / d z_v = -π(v) (log π(v) + H)
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        tokens_N: Tensor,
        support_NV: Tensor | None,
        temperature: float,
        scale: float,
        softcap: float | None,
        dtype: torch.dtype,
        rows: int,
        num_tokens: int | None,
        holes_H: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        projection = Projection(weight_VD, bias_V, scale, softcap, dtype, num_tokens, holes_H).prepared()
        is_kept = len(tokens_N) <= rows and any(ctx.needs_input_grad)
        width = num_tokens or len(weight_VD)
        kept_NV = hidden_ND.new_empty(len(tokens_N), width, dtype=torch.float32) if is_kept else None
        logprobs_N = hidden_ND.new_empty(len(tokens_N), dtype=torch.float32)
        entropies_N = torch.empty_like(logprobs_N)
        for part in _pieces(hidden_ND.device, len(tokens_N), len(weight_VD), rows):
            z_nV = projection.logits(hidden_ND[part], temperature)
            support_nV = None if support_NV is None else support_NV[part]
            out = None if kept_NV is None else kept_NV[part]
            _, logprobs_N[part], entropies_N[part] = _softmax(z_nV, tokens_N[part], support_nV, out, holes_H)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, tokens_N, support_NV, kept_NV, entropies_N)
        ctx.projection, ctx.constants = projection, (temperature, rows)
        ctx.set_materialize_grads(False)
        return logprobs_N, entropies_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, tokens_N, support_NV, kept_NV, entropies_N = ctx.saved_tensors
        projection, (temperature, rows) = ctx.projection, ctx.constants
        scale, softcap, dtype = projection.scale, projection.softcap, projection.dtype
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias_V = None if bias_V is None or not ctx.needs_input_grad[2] else torch.zeros_like(bias_V)
        for part in _pieces(hidden_ND.device, len(tokens_N), len(weight_VD), rows):
            hidden_nD, of_piece = hidden_ND[part], [None if g is None else g[part, None] for g in grads]
            if kept_NV is None:
                z_nV = projection.logits(hidden_nD, temperature)
                support_nV = None if support_NV is None else support_NV[part]
                probs_nV, _, _ = _softmax(z_nV, tokens_N[part], support_nV, None, projection.holes_H)
            else:
                probs_nV = kept_NV[part]
            grad_z_nV = _grad_of_logits(probs_nV, tokens_N[part], entropies_N[part], *of_piece)
            if temperature != 1.0:
                grad_z_nV /= temperature
            if softcap is not None:
                grad_z_nV *= 1.0 - torch.tanh(projection.raw_logits(hidden_nD) * scale / softcap) ** 2
            if scale != 1.0:
                grad_z_nV *= scale
            of_rows_nV = _as_wide(grad_z_nV.to(dtype), len(projection.weight_VD))
            grad_hidden_ND[part] = _product(of_rows_nV, projection.weight_VD)
            if grad_weight_VD is not None:
                grad_weight_VD += _product(of_rows_nV.t(), hidden_nD.to(dtype))[: len(weight_VD)]
            if grad_bias_V is not None:
                grad_bias_V[: grad_z_nV.shape[1]] += grad_z_nV.sum(dim=0).to(grad_bias_V.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_ND, grad_weight_VD, grad_bias_V, *([None] * 9)


def _as_wide(values_nV: Tensor, width: int) -> Tensor:
    """With columns of zeros behind, up to a width."""
    missing = width - values_nV.shape[1]
    return torch.nn.functional.pad(values_nV, (0, missing)) if missing else values_nV


def logits_at_a_time(device: str) -> int:
    """How many logits are held at a time.

    Args:
        device: type of a device: cpu, cuda or mps.
    Returns: a count of numbers, of 4 bytes each.
    Raises: nothing.
    Source: measured; DECISIONS.
    """
    return CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cpu"])


def _pieces(device: torch.device, num_tokens: int, vocabulary: int, rows: int) -> Iterator[slice]:
    """Positions a few at a time: no more than ``rows``, and as many as the device likes."""
    step = min(rows, max(1, PIECE_ELEMENTS.get(device.type, PIECE_ELEMENTS["cpu"]) // vocabulary))
    return (slice(start, start + step) for start in range(0, num_tokens, step))


def _softmax(
    z_nV: Tensor, tokens_n: Tensor, support_nV: Tensor | None, out: Tensor | None, holes_H: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(π, log π(token), H) from logits, which are used up. ``out`` takes π."""
    if support_nV is not None:
        z_nV.masked_fill_(~support_nV, -torch.inf)
    logp_nV = z_nV.log_softmax(dim=1)
    picked_n = logp_nV.gather(1, tokens_n[:, None])[:, 0]
    probs_nV = torch.exp(logp_nV, out=z_nV if out is None else out)
    if support_nV is not None:
        logp_nV.masked_fill_(~support_nV, 0.0)  # a token outside has probability 0: its term is 0, not 0 · -inf
    if holes_H is not None:
        logp_nV.index_fill_(1, holes_H, 0.0)
    return probs_nV, picked_n, -logp_nV.mul_(probs_nV).sum(dim=1)


def _grad_of_logits(
    probs_nV: Tensor,
    tokens_n: Tensor,
    entropies_n: Tensor,
    grad_logprobs_n1: Tensor | None,
    grad_entropies_n1: Tensor | None,
) -> Tensor:
    """The gradient by the logits; the probabilities are used up."""
    by_entropy_nV = None
    if grad_entropies_n1 is not None:
        log_probs_nV = probs_nV.clamp(min=torch.finfo(torch.float32).tiny).log_()
        by_entropy_nV = (log_probs_nV + entropies_n[:, None]).mul_(probs_nV).mul_(grad_entropies_n1)
    if grad_logprobs_n1 is None:
        grad_z_nV = probs_nV.zero_()
    else:
        grad_z_nV = probs_nV.mul_(-grad_logprobs_n1).scatter_add_(1, tokens_n[:, None], grad_logprobs_n1)
    return grad_z_nV if by_entropy_nV is None else grad_z_nV.sub_(by_entropy_nV)
