"""Log-probs of given tokens from hidden states, without ever holding all logits.

N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24
"""Logits held at a time: 64 MiB of float32."""


@dataclass(frozen=True)
class Projection:
    """The map from hidden states to logits: softcap(scale · (W h + b)) / temperature.

    ``softcap(z) = c · tanh(z / c)`` (Gemma 2); ``scale`` is Cohere's logit_scale or 1 / Granite's logits_scaling.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_ND: Tensor, temperature: float) -> Tensor:
        """[N, V] float32 logits of a few positions."""
        bias = None if self.bias_V is None else self.bias_V.to(hidden_ND.dtype)
        z_NV = torch.nn.functional.linear(hidden_ND, self.weight_VD.to(hidden_ND.dtype), bias).float()
        if self.scale != 1.0:
            z_NV = z_NV * self.scale
        if self.softcap is not None:
            z_NV = self.softcap * torch.tanh(z_NV / self.softcap)
        return z_NV if temperature == 1.0 else z_NV / temperature


def token_logprobs(
    hidden_ND: Tensor,
    projection: Projection,
    tokens_N: Tensor,
    *,
    temperature: float,
    support_NV: Tensor | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the given tokens, log π(token), and the entropy of π there, chunk by chunk over positions.

        log π(y) = z_y - log Σ_v e^{z_v};    H = -Σ_v π(v) log π(v);    z = softcap(scale · (W h + b)) / T

    Args:
        hidden_ND: [N, D], the trunk's output at the position before each token; may carry gradient.
        projection: the output head; its weight and bias may carry gradient.
        tokens_N: [N] int64.
        temperature: T > 0.
        support_NV: [N, V] bool, the tokens that sampling could have drawn; None: all.
        chunk_elements: logits held at a time. More positions than that are recomputed in the backward pass.
    Returns: (logprobs_N, entropies_N), float32.
    Raises: ValueError if shapes differ or T is not positive.
    Source: definition; gradients in :class:`_TokenLogprobs`. Memory is O(chunk), not O(N · V).
    """
    if hidden_ND.shape[:1] != tokens_N.shape:
        raise ValueError(f"{tuple(hidden_ND.shape)} hidden states and {tuple(tokens_N.shape)} tokens")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    rows = max(1, chunk_elements // projection.weight_VD.shape[0])
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
            rows,
        )


class _TokenLogprobs(torch.autograd.Function):
    """Forward keeps log-softmax only when it fits one chunk; otherwise backward computes it again.

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
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        projection = Projection(weight_VD, bias_V, scale, softcap)
        kept: Tensor | None = None
        logprobs, entropies = [hidden_ND.new_zeros(0, dtype=torch.float32)], []
        entropies.append(logprobs[0])
        for start in range(0, len(tokens_N), rows):
            part = slice(start, start + rows)
            logp_nV = _log_softmax(projection, hidden_ND[part], _rows(support_NV, part), temperature)
            logprobs.append(logp_nV.gather(1, tokens_N[part, None])[:, 0])
            entropies.append(_entropy(logp_nV))
            kept = logp_nV if len(tokens_N) <= rows else None
        entropies_N = torch.cat(entropies)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, tokens_N, support_NV, kept, entropies_N)
        ctx.constants = (temperature, scale, softcap, rows)
        ctx.set_materialize_grads(False)
        return torch.cat(logprobs), entropies_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, tokens_N, support_NV, kept, entropies_N = ctx.saved_tensors
        temperature, scale, softcap, rows = ctx.constants
        grad_logprobs_N, grad_entropies_N = grads
        projection = Projection(weight_VD, bias_V, scale, softcap)
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias_V = None if bias_V is None or not ctx.needs_input_grad[2] else torch.zeros_like(bias_V)
        for start in range(0, len(tokens_N), rows):
            part = slice(start, start + rows)
            hidden_nD = hidden_ND[part]
            logp_nV = kept
            if logp_nV is None:
                logp_nV = _log_softmax(projection, hidden_nD, _rows(support_NV, part), temperature)
            probs_nV = logp_nV.exp()
            grad_z_nV = torch.zeros_like(probs_nV)
            if grad_logprobs_N is not None:
                g_n1 = grad_logprobs_N[part, None]
                grad_z_nV = probs_nV * -g_n1
                grad_z_nV.scatter_add_(1, tokens_N[part, None], g_n1)
            if grad_entropies_N is not None:
                surprise_nV = logp_nV if support_NV is None else logp_nV.clamp(min=torch.finfo(torch.float32).min)
                grad_z_nV -= probs_nV * (surprise_nV + entropies_N[part, None]) * grad_entropies_N[part, None]
            if temperature != 1.0:
                grad_z_nV /= temperature
            if softcap is not None:
                z_nV = torch.nn.functional.linear(hidden_nD, weight_VD.to(hidden_nD.dtype)).float()
                z_nV = z_nV if bias_V is None else z_nV + bias_V
                grad_z_nV *= 1.0 - torch.tanh(z_nV * scale / softcap) ** 2
            if scale != 1.0:
                grad_z_nV *= scale
            grad_z_nV = grad_z_nV.to(hidden_nD.dtype)
            grad_hidden_ND[part] = grad_z_nV @ weight_VD.to(hidden_nD.dtype)
            if grad_weight_VD is not None:
                grad_weight_VD += grad_z_nV.T @ hidden_nD
            if grad_bias_V is not None:
                grad_bias_V += grad_z_nV.sum(dim=0).to(grad_bias_V.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_ND, grad_weight_VD, grad_bias_V, None, None, None, None, None, None


def _rows(support_NV: Tensor | None, part: slice) -> Tensor | None:
    return None if support_NV is None else support_NV[part]


def _log_softmax(projection: Projection, hidden_nD: Tensor, support_nV: Tensor | None, temperature: float) -> Tensor:
    z_nV = projection.logits(hidden_nD, temperature)
    if support_nV is not None:
        z_nV = z_nV.masked_fill(~support_nV, -torch.inf)
    return z_nV.log_softmax(dim=1)


def _entropy(logp_nV: Tensor) -> Tensor:
    # a token outside the support has log-prob -inf and probability 0: its term is 0, not NaN
    return -(logp_nV.exp() * logp_nV.clamp(min=torch.finfo(torch.float32).min)).sum(dim=1)
