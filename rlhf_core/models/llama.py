"""Llama's passes written out, without gradient: for sampling, and for models that only read.

    a = RMS₁(x);  q, k, v = a W_a + b_a;  q, k = rotated;  x' = x + softmax(q kᵀ / √d + causal) v W_o + b_o
    h = RMS₂(x');  x'' = x' + (silu(h W_g) ⊙ h W_u) W_d

transformers spells out each norm and rotation, copies the keys and values of all tokens at each step, and once more for
the heads that share them. Here the projections that read the same input are one product, keys and values have their
place from the start, and the queries of heads that share keys stand beside each other. Mistral, Qwen 2 and Qwen 3 are
the same but for biases and norms of queries and keys. LoRA adapters are added to the weights for as long as they are
read. What else a model has in it is left to transformers.

T tokens, N of them asked for, Q prompts, b rows still going, D hidden size, H heads of d, G of them sharing keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from rlhf_core.models.packing import PackedRows
from rlhf_core.models.shared_rows import SharedRows, shared_beginnings
from rlhf_core.models.untouched import is_untouched
from rlhf_core.ops.laid_out import Map, as_stored, laid_out

KINDS: Final = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
ROPES: Final = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotations that depend on a token's position alone, not on how long its row is."""


class _Layer(NamedTuple):
    """The weights of a layer; an adapter is added."""

    norm_1: Tensor
    qkv: Map
    norm_q: Tensor | None
    norm_k: Tensor | None
    out: Map
    norm_2: Tensor
    gate_up: Map
    down: Map


class LlamaPasses:
    """Passes over a trunk of transformers, whose parameters they read in place.

    Args:
        module: the trunk.
        adapter: peft's name of the adapter that answers; None: none.
    """

    def __init__(self, module: nn.Module, adapter: str | None) -> None:
        self._module, self._adapter = cast("Any", module), adapter
        config = self._module.config
        self.num_heads, self.num_kept = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // self.num_heads)
        self.eps = float(config.rms_norm_eps)
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        self.max_len = int(window or config.max_position_embeddings)
        self._modules = tuple(module.modules())

    @classmethod
    def of(cls, module: nn.Module, adapter: str | None) -> LlamaPasses | None:
        """For a trunk of this kind in float32; None for any other."""
        return cls(module, adapter) if _is_known(module) else None

    def takes(self, longest: int) -> bool:
        """Whether rows are short enough, and nothing has been built into the module since, nor was it moved."""
        return longest <= self.max_len and is_untouched(self._modules, self._module.embed_tokens.weight)

    @torch.no_grad()
    def hidden_states(self, rows: PackedRows, wanted_N: Tensor | None) -> Tensor:
        """[T, D], or [N, D] of the tokens asked for."""
        read: PackedRows | SharedRows = rows
        if (shared := shared_beginnings(rows, wanted_N)) is not None:
            read, wanted_N = shared, shared.places_T if wanted_N is None else shared.places_T[wanted_N]
        x = self.embedded(read.tokens_T)
        cos_Td, sin_Td = self.rotation(read.positions_T)
        layers = list(self._module.layers)
        for number, module in enumerate(layers):
            layer = self._layer(module)
            q, k, v = self.qkv(layer, x, cos_Td, sin_Td)
            attended = read.attend(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), None)
            if number == len(layers) - 1 and wanted_N is not None:
                x, attended, wanted_N = x[wanted_N], attended[wanted_N], None
            x = self.behind_attention(layer, x, attended.reshape(len(x), -1))
        out = self.normed(x)
        return out if wanted_N is None else out[wanted_N]

    @torch.no_grad()
    def layers(self) -> Iterator[_Layer]:
        """The weights of each layer, copied, and laid out for many steps."""
        return (self._layer(module, laid_out) for module in self._module.layers)

    def embedded(self, tokens: Tensor) -> Tensor:
        """[T, D] of token ids."""
        return cast("Tensor", self._module.embed_tokens.weight.detach().index_select(0, tokens))

    def normed(self, x: Tensor) -> Tensor:
        """[T, D]: the last norm."""
        return rms_norm(x, x.shape[-1:], self._module.norm.weight, self.eps)

    def rotation(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), [T, 1, d] each, by transformers' own frequencies."""
        like = self._module.embed_tokens.weight[:1, :1]
        cos_1Td, sin_1Td = self._module.rotary_emb(like, position_ids=positions_T[None])
        return cos_1Td[0][:, None], sin_1Td[0][:, None]

    def qkv(self, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, d], keys and values [T, H / G, d] of x [T, D]."""
        states = layer.qkv(rms_norm(x, x.shape[-1:], layer.norm_1, self.eps))
        states = states.view(len(x), -1, self.head_dim)
        q, k, v = states.split([self.num_heads, self.num_kept, self.num_kept], dim=1)
        if layer.norm_q is not None and layer.norm_k is not None:
            q, k = (rms_norm(s, s.shape[-1:], w, self.eps) for s, w in ((q, layer.norm_q), (k, layer.norm_k)))
        return _rotated(q, cos, sin), _rotated(k, cos, sin), v

    def behind_attention(self, layer: _Layer, x: Tensor, attended: Tensor) -> Tensor:
        """[T, D]: x with what attention [T, H · d] and the feed-forward part add to it."""
        x = layer.out(attended).add_(x)
        h = rms_norm(x, x.shape[-1:], layer.norm_2, self.eps)
        gate, up = layer.gate_up(h).chunk(2, dim=-1)
        return layer.down(silu(gate).mul_(up)).add_(x)

    def _layer(self, module: Any, made: Callable[[Tensor, Tensor | None], Map] = as_stored) -> _Layer:
        attention, mlp = module.self_attn, module.mlp
        norm_q, norm_k = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        return _Layer(
            module.input_layernorm.weight.detach(),
            made(*self._joined(attention.q_proj, attention.k_proj, attention.v_proj)),
            None if norm_q is None else norm_q.weight.detach(),
            None if norm_k is None else norm_k.weight.detach(),
            made(*self._joined(attention.o_proj)),
            module.post_attention_layernorm.weight.detach(),
            made(*self._joined(mlp.gate_proj, mlp.up_proj)),
            made(*self._joined(mlp.down_proj)),
        )

    def _joined(self, *modules: Any) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of projections that read the same input, as one."""
        weights, biases = zip(*map(self._linear, modules), strict=True)
        there = [bias for bias in biases if bias is not None]
        return weights[0] if len(weights) == 1 else torch.cat(weights), torch.cat(there) if there else None

    def _linear(self, module: Any) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, with W + s B A where the adapter is on the layer."""
        base = getattr(module, "base_layer", module)
        weight, bias = base.weight.detach(), None if base.bias is None else base.bias.detach()
        if self._adapter is not None and base is not module and self._adapter in module.lora_A:
            down, up = module.lora_A[self._adapter].weight, module.lora_B[self._adapter].weight
            weight = torch.addmm(weight, up.detach(), down.detach(), alpha=float(module.scaling[self._adapter]))
        return weight, bias


class LlamaPrefix:
    """Prompts and what was drawn after them: keys and values of each layer, in memory for all that may come.

    Args:
        passes: of the policy.
        prompts: Q token lists.
        samples_per_prompt: k copies of each prompt, after one another, read once.
        max_new_tokens: that may follow.
    """

    compact_below, steps_between_checks = 0.85, 1

    def __init__(
        self, passes: LlamaPasses, prompts: Sequence[Sequence[int]], samples_per_prompt: int, max_new_tokens: int
    ) -> None:
        rows = PackedRows.of(prompts)
        shared = shared_beginnings(rows)
        read, places_T = (rows, torch.arange(len(rows.tokens_T))) if shared is None else (shared, shared.places_T)
        self._passes, self._layers = passes, list(passes.layers())
        self._lens_b = rows.lens_B.repeat_interleave(samples_per_prompt)
        self._first, self._step = rows.longest, 0
        ends_Q, room = places_T[rows.ends_B], rows.longest + max_new_tokens
        x, (cos_Td, sin_Td) = passes.embedded(read.tokens_T), passes.rotation(read.positions_T)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        for number, layer in enumerate(self._layers):
            q, k, v = passes.qkv(layer, x, cos_Td, sin_Td)
            for caches, states in ((self._keys, k), (self._values, v)):
                of_prompts = rows.padded(states.index_select(0, places_T)).transpose(1, 2)
                cache = states.new_zeros(len(self._lens_b), passes.num_kept, room, passes.head_dim)
                cache[:, :, : rows.longest] = of_prompts.repeat_interleave(samples_per_prompt, dim=0)
                caches.append(cache)
            attended = read.attend(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), None)
            if number == len(self._layers) - 1:
                x, attended = x[ends_Q], attended[ends_Q]
            x = passes.behind_attention(layer, x, attended.reshape(len(x), -1))
        columns_T = torch.arange(room)
        is_gap_bT = (columns_T >= self._lens_b[:, None]) & (columns_T < rows.longest)
        self._mask_b11T = torch.zeros(is_gap_bT.shape).masked_fill_(is_gap_bT, -torch.inf)[:, None, None]
        self._cos_T1d, self._sin_T1d = passes.rotation(columns_T)
        self.hidden_bD = passes.normed(x).repeat_interleave(samples_per_prompt, dim=0)

    def select(self, keep: Tensor) -> None:
        """Go on with these rows alone."""
        self._lens_b, self._mask_b11T = self._lens_b[keep], self._mask_b11T[keep]
        for caches in (self._keys, self._values):
            for number, cache in enumerate(caches):
                caches[number] = cache.index_select(0, keep)

    def advance(self, tokens_b: Tensor) -> None:
        """Read one more token a row."""
        passes, column = self._passes, self._first + self._step
        positions_b = self._lens_b + self._step
        x, cos, sin = passes.embedded(tokens_b), self._cos_T1d[positions_b], self._sin_T1d[positions_b]
        mask_b11t = self._mask_b11T[..., : column + 1]
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            q_bHd, k_bHd, v_bHd = passes.qkv(layer, x, cos, sin)
            keys[:, :, column], values[:, :, column] = k_bHd, v_bHd
            attended = scaled_dot_product_attention(
                q_bHd.view(len(x), passes.num_kept, -1, passes.head_dim),
                keys[:, :, : column + 1],
                values[:, :, : column + 1],
                attn_mask=mask_b11t,
            )
            x = passes.behind_attention(layer, x, attended.reshape(len(x), -1))
        self._step += 1
        self.hidden_bD = passes.normed(x)


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[T, H, d]: the pairs (i, i + d / 2) turned by their token's angles."""
    first, second = states.chunk(2, dim=-1)
    return torch.addcmul(states * cos, torch.cat((-second, first), dim=-1), sin)


def _is_known(module: nn.Module) -> bool:
    """Whether a trunk is one of these as published, on a CPU in float32, with nothing but LoRA built into it."""
    from transformers.activations import SiLUActivation

    kind = type(module).__name__
    config = cast("Any", module).config
    if kind not in KINDS or not type(module).__module__.startswith("transformers.models."):
        return False
    stem = kind.removesuffix("Model")
    parts = {f"{stem}{part}" for part in ("Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")}
    plain = (nn.Linear, nn.Embedding, nn.ModuleList, nn.SiLU, SiLUActivation)
    inside_lora: set[int] = set()
    for part in module.modules():
        if id(part) in inside_lora:
            continue
        if _is_lora(part):
            inside_lora |= {id(child) for child in part.modules()}
        elif type(part).__name__ not in parts and type(part) not in plain:
            return False
    return (
        all(p.dtype is torch.float32 and p.device.type == "cpu" for p in module.parameters())
        and config.rope_parameters.get("rope_type", "default") in ROPES
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
        and config.hidden_act == "silu"
    )


def _is_lora(part: nn.Module) -> bool:
    """Whether it is peft's plain LoRA around a linear layer, its adapters apart from the weights."""
    if type(part).__name__ != "Linear" or not type(part).__module__.startswith("peft.tuners.lora"):
        return False
    layer = cast("Any", part)
    return type(layer.base_layer) is nn.Linear and not layer.merged and not any(layer.use_dora.values())
