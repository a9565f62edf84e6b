"""A transformer without its head, over rows of any lengths, in the fastest way that its architecture allows.

Passes that are written out (``gpt2.py``, ``llama.py``); else packed rows through transformers (``packing.py``); else
rows padded on the right. An architecture that loses the packed rows on the way, or counts positions by itself, is found
by a probe.

B rows, L the longest of them, T tokens of all rows, N tokens asked for, D hidden size.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rlhf_core.models.devices import computing_in
from rlhf_core.models.gpt2 import GPT2Passes
from rlhf_core.models.llama import LlamaPasses
from rlhf_core.models.packing import PACKED_ATTENTION, PackedRows, no_mask, register_packed_attention, take_once
from rlhf_core.models.shared_rows import SharedRows, shared_beginnings

PROBE_TOLERANCE, COARSE_TOLERANCE = 1e-4, 0.05
"""Largest difference of a packed and a padded pass, relative to the largest hidden state (at least 1): in float32,
and where anything is of half precision."""


class Trunk:
    """A causal transformer without its head, over rows of any lengths.

    Args:
        module: of transformers; its attention function is exchanged if it can do with ours.
        dtype: of the computation; bfloat16 autocasts, float32 computes in whatever the weights are.
        answering: context in which it is called (adapters).
        adapter: peft's name of the adapter that answers there; None: none.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        dtype: torch.dtype,
        answering: Callable[[], Any] | None = None,
        adapter: str | None = None,
    ) -> None:
        self.module, self.dtype, self.adapter = module, dtype, adapter
        self._answering = answering or contextlib.nullcontext

    def __call__(self, rows: PackedRows, wanted_N: Tensor | None = None) -> Tensor:
        """[T, D] hidden states, or [N, D] of the tokens asked for, each at most once. Keeps gradient."""
        if (passes := self.written_out) is not None and passes.takes(rows.longest):
            every_T = torch.arange(len(rows.tokens_T)) if wanted_N is None else wanted_N
            return passes.hidden_states(rows, every_T)
        if not torch.is_grad_enabled() and (reading := self.reading) is not None and reading.takes(rows.longest):
            return reading.hidden_states(rows, wanted_N)
        window = getattr(cast("Any", self.module).config.get_text_config(), "sliding_window", None)
        is_packed = self.packs and (window is None or rows.longest <= window)
        shares = is_packed and wanted_N is not None and rows.tokens_T.device.type == "cpu"
        if shares and (shared := shared_beginnings(rows, wanted_N)) is not None:
            return take_once(self._packed(shared), shared.places_T[wanted_N])
        hidden_TD = self._packed(rows) if is_packed else self._padded(rows)
        return hidden_TD if wanted_N is None else take_once(hidden_TD, wanted_N)

    @functools.cached_property
    def written_out(self) -> GPT2Passes | None:
        """Our own passes, where the module is one that they know."""
        if self._answering is not contextlib.nullcontext or self.dtype is not torch.float32:
            return None
        return GPT2Passes.of(self.module)

    @functools.cached_property
    def reading(self) -> LlamaPasses | None:
        """Our own passes without gradient, where the module is one that they know."""
        return LlamaPasses.of(self.module, self.adapter) if self.dtype is torch.float32 else None

    def leave_to_transformers(self) -> None:
        """Forget the passes that are written out, which hold on to parameters: others will take their places."""
        assert self.packs is not None, "asked for while the weights are whole"
        self.__dict__["written_out"] = self.__dict__["reading"] = None

    def run(self, weights: dict[str, Tensor] | None = None, **inputs: Any) -> Tensor:
        """[B, L, D]: for whatever transformers takes; ``weights`` stand in for those of their names."""
        with self._answering(), computing_in(self.dtype, next(self.module.parameters()).device):
            out = functional_call(self.module, weights, (), inputs) if weights else self.module(**inputs)
            return cast("Tensor", out.last_hidden_state)

    def weights_as_computed(self) -> dict[str, Tensor]:
        """Copies, in bfloat16, of the weights that autocast would otherwise copy at each call; none in float32."""
        from transformers.pytorch_utils import Conv1D

        if self.dtype is torch.float32:
            return {}
        return {
            f"{name}.{own}": weight.detach().to(self.dtype)
            for name, module in self.module.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
            for own, weight in module.named_parameters(recurse=False)
            if weight.dtype is torch.float32
        }

    @functools.cached_property
    def packs(self) -> bool:
        """Whether the architecture gives the same hidden states for packed rows."""
        config = cast("Any", self.module).config
        before = config._attn_implementation
        if before == PACKED_ATTENTION:  # another view of the same module has asked
            return True
        if before != "sdpa" or not _sees_full_rows(config):
            return False
        register_packed_attention()
        parameter = next(self.module.parameters())
        tokens = [token % config.get_text_config().vocab_size for token in range(2, 10)]
        rows = PackedRows.of([tokens[:5], tokens[5:]], parameter.device)
        with torch.no_grad():
            expected_TD = self._padded(rows)
            config._attn_implementation = PACKED_ATTENTION
            try:
                found_TD = self._packed(rows)
            except Exception:  # it takes no packed rows: whatever it says, it is padded
                found_TD = torch.full_like(expected_TD, torch.inf)
        is_coarse = any(t is not torch.float32 for t in (self.dtype, expected_TD.dtype, parameter.dtype))
        limit = (COARSE_TOLERANCE if is_coarse else PROBE_TOLERANCE) * max(1.0, float(expected_TD.abs().max()))
        if found_TD.shape == expected_TD.shape and float((found_TD - expected_TD).abs().max()) <= limit:
            return True
        config._attn_implementation = before
        return False

    def _packed(self, rows: PackedRows | SharedRows) -> Tensor:
        return self.run(
            input_ids=rows.tokens_T[None],
            position_ids=rows.positions_T[None],
            attention_mask=no_mask(rows.tokens_T.device),
            packed_rows=rows,
            use_cache=False,
        ).squeeze(0)  # an index would make its gradient in two passes

    def _padded(self, rows: PackedRows) -> Tensor:
        """Right padding without a mask: under causal attention a real token never sees it."""
        return rows.packed(self.run(input_ids=rows.padded(rows.tokens_T), use_cache=False))


def trunk_of(model: Any) -> nn.Module:
    """A transformers model without its head: its base model, or what stands for it where its class names none."""
    base: Any = model.base_model
    return cast("nn.Module", getattr(model, "model", model) if base is model else base)


def _sees_full_rows(config: Any) -> bool:
    """Whether every layer attends to all tokens before, or to a window of them."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    return kinds <= {"full_attention", "sliding_attention"} and not getattr(text, "attention_chunk_size", None)
