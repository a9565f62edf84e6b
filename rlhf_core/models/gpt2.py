"""GPT-2's passes written out: what transformers computes, in a sixth of the operations and without copies between.

For models of this size half of the time goes into calling operations and into reading and writing what lies between
them. Here a whole trunk is one function with a gradient of its own, over packed rows:

    a = LN₁(x);  q, k, v = a W_a + b_a;  x' = x + softmax(q kᵀ / √d + causal) v W_o + b_o
    h = LN₂(x');  u = h W_f + b_f;  x'' = x' + gelu(u) W_p + b_p

In the last layer only the tokens that somebody asks for go on behind attention. A model with anything else in it
(adapters, recomputation, other activations) is left to transformers, and so are long rows, whose scores are too many.

T tokens, N of them asked for, D hidden size, H heads of d, B rows of L at most, C = H · B · L cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from rlhf_core.models.activations import TanhGELU, gelu_gate, gelu_slope
from rlhf_core.models.packing import PackedRows
from rlhf_core.models.untouched import is_untouched

MAX_ROW_LEN = 512
"""Longer rows are left to a kernel that keeps no scores."""


class _Kept(NamedTuple):
    """What one layer keeps for its backward pass."""

    x: Tensor
    a: Tensor
    mean_1: Tensor
    rstd_1: Tensor
    qkv: Tensor
    weights: Tensor
    attended: Tensor
    x_mid: Tensor
    h: Tensor
    mean_2: Tensor
    rstd_2: Tensor
    u: Tensor
    s: Tensor
    g: Tensor


class GPT2Passes:
    """Passes over a ``GPT2Model``, whose parameters they read in place.

    Args:
        module: the trunk.
    """

    def __init__(self, module: Any) -> None:
        self.num_heads = int(module.config.num_attention_heads)
        self.head_dim = int(module.config.hidden_size) // self.num_heads
        self.eps = float(module.config.layer_norm_epsilon)
        self.max_len = min(MAX_ROW_LEN, int(module.config.n_positions))
        self.parameters: tuple[nn.Parameter, ...] = tuple(module.parameters())
        """In the order of the module: token and position embeddings, twelve a layer, the last norm's two."""
        self._modules: tuple[nn.Module, ...] = tuple(module.modules())

    @classmethod
    def of(cls, module: nn.Module) -> GPT2Passes | None:
        """For a trunk that is plain GPT-2 in float32; None for any other."""
        return cls(module) if _is_plain(module) else None

    def takes(self, longest: int) -> bool:
        """Whether rows are short enough, and nothing has been built into the module since, nor was it moved."""
        return longest <= self.max_len and is_untouched(self._modules, self.parameters[0])

    def hidden_states(self, rows: PackedRows, wanted_N: Tensor) -> Tensor:
        """[N, D] of the tokens asked for, each at most once."""
        return cast("Tensor", _Pass.apply(self, rows, wanted_N, torch.is_grad_enabled(), *self.parameters))

    def layers(self) -> Iterator[list[Tensor]]:
        """The twelve weights of each layer, detached."""
        parameters = [p.detach() for p in self.parameters]
        return (parameters[i : i + 12] for i in range(2, len(parameters) - 2, 12))

    def embedded(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Token plus position embedding."""
        tokens_VD, positions_PD = (p.detach() for p in self.parameters[:2])
        return tokens_VD.index_select(0, tokens).add_(positions_PD.index_select(0, positions))

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(normalised, mean, 1 / std)."""
        return torch.native_layer_norm(x, x.shape[-1:], weight, bias, self.eps)


class GPT2Prefix:
    """Prompts and what was drawn after them: keys and values of each layer, in memory for all that may come.

    Args:
        passes: of the policy.
        prompts: Q token lists.
        samples_per_prompt: k copies of each prompt, after one another, read once.
        max_new_tokens: that may follow.
    """

    compact_below, steps_between_checks = 0.85, 1

    def __init__(
        self, passes: GPT2Passes, prompts: Sequence[Sequence[int]], samples_per_prompt: int, max_new_tokens: int
    ) -> None:
        rows = PackedRows.of(prompts)
        self._passes, self._layers = passes, list(passes.layers())
        self._lens_b = rows.lens_B.repeat_interleave(samples_per_prompt)
        self._first, self._step = rows.longest, 0
        cells, x = _Cells(rows, passes.num_heads), passes.embedded(rows.tokens_T, rows.positions_T)
        self._caches: list[Tensor] = []
        for number, layer in enumerate(self._layers):
            is_last = number == len(self._layers) - 1
            x, kept = _forward(passes, layer, x, cells, rows.ends_B if is_last else None)
            shape = (len(prompts), passes.num_heads, rows.longest, passes.head_dim)
            read = kept.qkv[1:].view(2, shape[1], shape[0], *shape[2:]).transpose(1, 2)
            cache = x.new_zeros(2, len(self._lens_b), shape[1], rows.longest + max_new_tokens, shape[3])
            cache[:, :, :, : rows.longest] = read.repeat_interleave(samples_per_prompt, dim=1)
            self._caches.append(cache)
        columns_T = torch.arange(rows.longest + max_new_tokens)
        is_gap_bT = (columns_T >= self._lens_b[:, None]) & (columns_T < rows.longest)
        self._mask_b11T = torch.zeros(is_gap_bT.shape).masked_fill_(is_gap_bT, -torch.inf)[:, None, None]
        self.hidden_bD = self._out(x).repeat_interleave(samples_per_prompt, dim=0)

    def select(self, keep: Tensor) -> None:
        """Go on with these rows alone."""
        self._lens_b, self._mask_b11T = self._lens_b[keep], self._mask_b11T[keep]
        self._caches = [cache.index_select(1, keep) for cache in self._caches]

    def advance(self, tokens_b: Tensor) -> None:
        """Read one more token a row."""
        passes, d = self._passes, self._passes.head_dim
        column, x = self._first + self._step, passes.embedded(tokens_b, self._lens_b + self._step)
        mask_b11t = self._mask_b11T[..., : column + 1]
        for layer, cache in zip(self._layers, self._caches, strict=True):
            a, _, _ = passes.norm(x, *layer[:2])
            qkv_b3Hd = torch.addmm(layer[3], a, layer[2]).view(len(x), 3, -1, d)
            cache[:, :, :, column] = qkv_b3Hd[:, 1:].transpose(0, 1)
            keys, values = cache[..., : column + 1, :].unbind(0)
            attended = scaled_dot_product_attention(qkv_b3Hd[:, 0, :, None], keys, values, attn_mask=mask_b11t)
            x = torch.addmm(layer[5], attended.reshape(len(x), -1), layer[4]).add_(x)
            h, _, _ = passes.norm(x, *layer[6:8])
            u = torch.addmm(layer[9], h, layer[8])
            g = gelu_gate(u).mul_(u)
            x = torch.addmm(layer[11], g, layer[10]).add_(x)
        self._step += 1
        self.hidden_bD = self._out(x)

    def _out(self, x: Tensor) -> Tensor:
        return self._passes.norm(x, *(p.detach() for p in self._passes.parameters[-2:]))[0]


class _Cells:
    """Where heads of tokens stand among padded cells, for q, k and v at once.

    qkv rows of [T · 3 · H, d] -> cells [3, H, B, L, d], and back.
    """

    def __init__(self, rows: PackedRows, num_heads: int) -> None:
        heads = torch.arange(num_heads)[None, :, None]
        kinds = torch.arange(3)[:, None, None]
        self.shape = (num_heads * len(rows.lens_B), rows.longest)
        num_cells = rows.longest * len(rows.lens_B)
        self.of_qkv = (rows.sources_BL * 3 * num_heads + kinds * num_heads + heads).reshape(-1)
        self.to_qkv = ((kinds * num_heads + heads) * num_cells + rows.cells_T).permute(2, 0, 1).reshape(-1)
        self.of_one = (rows.sources_BL * num_heads + heads[0]).reshape(-1)
        self.to_one = (heads[0] * num_cells + rows.cells_T).T.reshape(-1)
        steps_L = torch.arange(rows.longest)
        self.causal_LL = torch.zeros(rows.longest, rows.longest).masked_fill(
            steps_L[None, :] > steps_L[:, None], -torch.inf
        )
        real_BL = steps_L < rows.lens_B[:, None]
        self.real_C1 = None if rows.is_even else real_BL.repeat(num_heads, 1)[..., None]


class _Pass(torch.autograd.Function):
    """The whole trunk as one function with a gradient of its own."""

    @staticmethod
    def forward(
        ctx: Any, passes: GPT2Passes, rows: PackedRows, wanted_N: Tensor, has_gradients: bool, *parameters: Tensor
    ) -> Tensor:
        # needs_input_grad is of the inputs: without the mode beside it, a no_grad pass would keep every activation
        cells, weights = _Cells(rows, passes.num_heads), list(passes.layers())
        x = passes.embedded(rows.tokens_T, rows.positions_T)
        kept: list[Tensor] = []
        for number, layer in enumerate(weights):
            x, of_layer = _forward(passes, layer, x, cells, wanted_N if number == len(weights) - 1 else None)
            if has_gradients and any(ctx.needs_input_grad):
                kept += of_layer
            del of_layer
        out_ND, mean, rstd = passes.norm(x, *parameters[-2:])
        ctx.of_call = (passes, rows, wanted_N, cells)
        ctx.save_for_backward(*parameters, x, mean, rstd, *kept)
        return out_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        passes, rows, wanted_N, cells = ctx.of_call
        count = len(passes.parameters)
        parameters, (x, mean, rstd, *kept) = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        dx, *found = _norm_backward(grads[0].contiguous(), x, mean, rstd, *parameters[-2:])
        num_layers, size = len(kept) // len(_Kept._fields), len(_Kept._fields)
        for number in reversed(range(num_layers)):
            layer, of_layer = (
                parameters[2 + 12 * number : 14 + 12 * number],
                _Kept(*kept[size * number : size * (number + 1)]),
            )
            dx, more = _backward(passes, layer, of_layer, dx, cells, wanted_N if number == num_layers - 1 else None)
            found = [*more, *found]
        embedding = torch.ops.aten.embedding_dense_backward
        of_tokens = embedding(dx, rows.tokens_T, len(parameters[0]), -1, False)
        of_positions = embedding(dx, rows.positions_T, len(parameters[1]), -1, False)
        return None, None, None, None, of_tokens, of_positions, *found


def _forward(
    passes: GPT2Passes, layer: list[Tensor], x: Tensor, cells: _Cells, wanted_N: Tensor | None
) -> tuple[Tensor, _Kept]:
    """One layer: (its output, what backward needs)."""
    weight_1, bias_1, w_a, b_a, w_o, b_o, weight_2, bias_2, w_f, b_f, w_p, b_p = layer
    x_in, d = x, passes.head_dim
    a, mean_1, rstd_1 = passes.norm(x, weight_1, bias_1)
    qkv = torch.addmm(b_a, a, w_a).view(-1, d).index_select(0, cells.of_qkv).view(3, *cells.shape, d)
    q, k, v = qkv.unbind(0)
    weights = torch.baddbmm(cells.causal_LL, q, k.transpose(1, 2), alpha=d**-0.5).softmax(dim=2)
    if cells.real_C1 is not None:
        weights.mul_(cells.real_C1)  # a padded query gives nothing, and gets no gradient
    attended = torch.bmm(weights, v).view(-1, d).index_select(0, cells.to_one).view(len(x), -1)
    if wanted_N is not None:
        attended, x = attended.index_select(0, wanted_N), x.index_select(0, wanted_N)
    x_mid = torch.addmm(b_o, attended, w_o).add_(x)
    h, mean_2, rstd_2 = passes.norm(x_mid, weight_2, bias_2)
    u = torch.addmm(b_f, h, w_f)
    s = gelu_gate(u)
    g = u * s
    out = torch.addmm(b_p, g, w_p).add_(x_mid)
    return out, _Kept(x_in, a, mean_1, rstd_1, qkv, weights, attended, x_mid, h, mean_2, rstd_2, u, s, g)


def _backward(
    passes: GPT2Passes,
    layer: tuple[Tensor, ...],
    kept: _Kept,
    dx: Tensor,
    cells: _Cells,
    wanted_N: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """One layer: (gradient of its input, of its twelve weights). ``dx``, of its output, is used up."""
    weight_1, bias_1, w_a, _, w_o, _, weight_2, bias_2, w_f, _, w_p, _ = layer
    d = passes.head_dim
    d_w_p, d_b_p = kept.g.t().mm(dx), dx.sum(dim=0)
    du = dx.mm(w_p.t()).mul_(gelu_slope(kept.u, kept.s))
    d_w_f, d_b_f = kept.h.t().mm(du), du.sum(dim=0)
    d_mid, d_weight_2, d_bias_2 = _norm_backward(du.mm(w_f.t()), kept.x_mid, kept.mean_2, kept.rstd_2, weight_2, bias_2)
    dx.add_(d_mid)
    d_w_o, d_b_o = kept.attended.t().mm(dx), dx.sum(dim=0)
    d_attended = dx.mm(w_o.t())
    if wanted_N is not None:
        d_attended = d_attended.new_zeros(kept.x.shape).index_copy_(0, wanted_N, d_attended)
        dx = dx.new_zeros(kept.x.shape).index_copy_(0, wanted_N, dx)
    d_cells = d_attended.view(-1, d).index_select(0, cells.of_one).view(*cells.shape, d)
    q, k, v = kept.qkv.unbind(0)
    d_weights = torch.bmm(d_cells, v.transpose(1, 2))
    d_scores = torch._softmax_backward_data(d_weights, kept.weights, 2, torch.float32).mul_(d**-0.5)
    d_qkv = torch.empty_like(kept.qkv)
    torch.bmm(d_scores, k, out=d_qkv[0])
    torch.bmm(d_scores.transpose(1, 2), q, out=d_qkv[1])
    torch.bmm(kept.weights.transpose(1, 2), d_cells, out=d_qkv[2])
    d_a = d_qkv.view(-1, d).index_select(0, cells.to_qkv).view(len(kept.x), -1)
    d_w_a, d_b_a = kept.a.t().mm(d_a), d_a.sum(dim=0)
    d_x, d_weight_1, d_bias_1 = _norm_backward(d_a.mm(w_a.t()), kept.x, kept.mean_1, kept.rstd_1, weight_1, bias_1)
    gradients = [d_weight_1, d_bias_1, d_w_a, d_b_a, d_w_o, d_b_o, d_weight_2, d_bias_2, d_w_f, d_b_f, d_w_p, d_b_p]
    return d_x.add_(dx), gradients


def _norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a layer norm by its input, weight and bias."""
    return torch.ops.aten.native_layer_norm_backward(
        grad, x, list(x.shape[-1:]), mean, rstd, weight, bias, [True, True, True]
    )


def _is_plain(module: nn.Module) -> bool:
    """Whether a trunk is GPT-2 as published, on a CPU in float32, and nothing has been built into it."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block, GPT2Model
    from transformers.pytorch_utils import Conv1D

    if type(module) is not GPT2Model:
        return False
    known = (
        GPT2Model,
        GPT2Block,
        GPT2Attention,
        GPT2MLP,
        Conv1D,
        TanhGELU,
        nn.LayerNorm,
        nn.Embedding,
        nn.Dropout,
        nn.ModuleList,
    )
    config = module.config
    return (
        all(type(m) in known for m in module.modules())
        and all(p.dtype is torch.float32 and p.device.type == "cpu" for p in module.parameters())
        and config.scale_attn_weights
        and not (config.scale_attn_by_inverse_layer_idx or config.reorder_and_upcast_attn or config.add_cross_attention)
        and len(list(module.parameters())) == 4 + 12 * config.n_layer
    )
