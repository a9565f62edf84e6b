"""Decoding on CUDA: a step that is captured once and replayed, over keys and values that stay where they are.

A step of a small model is hundreds of kernels of a few microseconds each, and calling them from Python takes longer
than running them. A CUDA graph calls all of them at once. What it reads and writes must not move: so there is room for
every token from the start, and where a row's next token goes is told by numbers on the device.

Q prompts, b rows still going, P prompt tokens of the longest, T columns of memory, H heads of d, D hidden size.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from rlhf_core.models.packing import no_mask
from rlhf_core.models.prefixes import CachedPrefix
from rlhf_core.models.trunk import Trunk

log = logging.getLogger(__name__)
FIRST_WIDTH = 256
"""Columns that attention looks at to begin with; doubled when they are full, at the price of a capture."""
ALIGNMENT = 8
"""The fast attention kernels take masks whose rows are a multiple of this."""


class GraphedPrefix:
    """Prompts and what was drawn after them, for any architecture that takes packed rows.

    Args:
        trunk: of the policy.
        begun: the prompts, read.
        max_new_tokens: that may follow.
        captures: False runs each step as it is, which is all that a CPU can do.
    """

    compact_below = 0.5  # a capture takes as long as some ten steps
    steps_between_checks = 16  # a look at the device waits for all that was asked of it

    def __init__(self, trunk: Trunk, begun: CachedPrefix, max_new_tokens: int, *, captures: bool) -> None:
        self._trunk, self._captures = trunk, captures
        self._weights = trunk.weights_as_computed()
        real_bP = begun.attention_bT.bool()
        self._longest, self._room = real_bP.shape[1], _round_up(real_bP.shape[1] + max_new_tokens, ALIGNMENT)
        self._positions_b = real_bP.sum(dim=1)
        self._tokens_b1 = torch.zeros_like(self._positions_b)[:, None]
        sources_bP = torch.arange(self._longest, device=real_bP.device) + (self._longest - self._positions_b)[:, None]
        sources_bP.clamp_(max=self._longest - 1)  # rows move to the left, over their padding
        self._layers = [_FixedLayer(layer, sources_bP, self._room, trunk.dtype) for layer in begun.cache.layers]
        self._cache = Cache(layers=list(self._layers))
        self._begin_rows()
        self._replayed_bD = self.hidden_bD = begun.hidden_bD

    @staticmethod
    def suits(trunk: Trunk, begun: CachedPrefix) -> bool:
        """Whether masks and positions reach the layers, and all keep every key and value: windows do not."""
        return trunk.packs and all(type(layer) is DynamicLayer for layer in begun.cache.layers)

    def select(self, keep: Tensor) -> None:
        """Go on with these rows alone."""
        for layer in self._layers:
            layer.keys, layer.values = layer.keys.index_select(0, keep), layer.values.index_select(0, keep)
        self._positions_b, self._tokens_b1 = self._positions_b[keep], self._tokens_b1[keep]
        self._begin_rows()

    def advance(self, tokens_b: Tensor) -> None:
        """Read one more token a row. ``hidden_bD`` is overwritten by the next call."""
        self._tokens_b1.copy_(tokens_b[:, None])
        if self._longest == self._rows.width:
            self._begin_rows()
        if self._graph is not None:
            self._graph.replay()
            self.hidden_bD = self._replayed_bD
        else:
            self.hidden_bD = self._step()  # libraries set themselves up at a first call, which no capture may see
            self._graph = self._capture()
        self._longest += 1
        self._positions_b += 1

    def _begin_rows(self) -> None:
        """Rows, or a width, that no graph has seen yet."""
        width = self._room if has_kernel(self._positions_b.device) else FIRST_WIDTH
        while width <= self._longest:
            width *= 2
        self._rows = _Rows(self._positions_b, min(width, self._room), self._layers[0].keys.dtype)
        for layer in self._layers:
            layer.rows = self._rows
        self._graph: torch.cuda.CUDAGraph | None = None

    def _step(self) -> Tensor:
        """[b, D]: the same result and the same memory however often it is done."""
        self._rows.begin_step()
        hidden_b1D = self._trunk.run(
            self._weights,
            input_ids=self._tokens_b1,
            position_ids=self._positions_b[:, None],
            past_key_values=self._cache,
            use_cache=True,
            **self._rows.inputs,
        )
        return hidden_b1D[:, 0]

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        """The step as a graph; None where the model looks at numbers on the way, as some mixtures of experts do."""
        if not self._captures:
            return None
        # by hand: the context manager of torch collects garbage and gives memory back first, which takes longer
        try:
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._replayed_bD = self._step()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
            log.warning(
                "decoding without a CUDA graph, several times slower: the model cannot be captured (%s)", reason
            )
            self._captures = False
            return None
        torch.cuda.current_stream().wait_stream(stream)
        return graph


class _Rows:
    """Which columns of memory [b, T, H, d] each row has filled.

    Args:
        positions_b: int64, of the token that is read in a row, which is the number of those before it. Whoever calls
            moves it on in place.
        width: columns that attention looks at, where it looks through a mask.
        dtype: of the mask, which is that of the keys.
    """

    def __init__(self, positions_b: Tensor, width: int, dtype: torch.dtype) -> None:
        device, self.width, self._positions_b = positions_b.device, width, positions_b
        self._rows_b = torch.arange(len(positions_b), device=device)
        self._mask_bT: Tensor | None = None
        if has_kernel(device):
            self.inputs: dict[str, Any] = {"attention_mask": no_mask(device), "kept_rows": self}
            return
        is_unseen_bT = torch.arange(width, device=device) >= positions_b[:, None]
        self._mask_bT = torch.zeros(is_unseen_bT.shape, dtype=dtype, device=device)
        self._mask_bT.masked_fill_(is_unseen_bT, -torch.inf)
        self.inputs = {"attention_mask": self._mask_bT[:, None, None]}

    def begin_step(self) -> None:
        """Let attention see one more token of each row."""
        if self._mask_bT is not None:
            self._mask_bT.scatter_(1, self._positions_b[:, None], 0.0)

    def write(self, memory: Tensor, states_bHd: Tensor) -> None:
        """The newest token of each row, of keys or values."""
        memory[self._rows_b, self._positions_b] = states_bHd

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """[b, 1, H, d] of queries [b, H, 1, d], each over its own row and no further."""
        from rlhf_core.models.token_attention import attend_to_lengths

        return attend_to_lengths(query, key.transpose(1, 2), value.transpose(1, 2), self._positions_b, scaling)


def has_kernel(device: torch.device) -> bool:
    """Whether attention can stop at each row's own length; otherwise all rows are looked at to the same width."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


class _FixedLayer(DynamicLayer):
    """Keys and values of one layer, [b, T, H, d], with room for all that may come.

    Args:
        begun: what the prompts left, [b, H, P, d].
        sources_bP: the column there of each column here.
        room: T.
        dtype: of the computation; in bfloat16 attention would round them at every step.
    """

    rows: _Rows
    keys: Tensor
    values: Tensor

    def __init__(self, begun: Any, sources_bP: Tensor, room: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.keys, self.values = (
            _moved(states if dtype is torch.float32 else states.to(dtype), sources_bP, room)
            for states in (begun.keys, begun.values)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write one token a row; returns what attention looks at, [b, H, width, d]."""
        seen: list[Tensor] = []
        for memory, states in ((self.keys, key_states), (self.values, value_states)):
            self.rows.write(memory, states[:, :, 0].to(memory.dtype))
            seen.append(memory[:, : self.rows.width].transpose(1, 2))
        return seen[0], seen[1]


def _moved(states: Tensor, sources_bP: Tensor, room: int) -> Tensor:
    """[b, H, P, d] -> [b, T, H, d]."""
    wide = states.new_zeros(len(states), room, states.shape[1], states.shape[3])
    index = sources_bP[:, :, None, None].expand(-1, -1, states.shape[1], states.shape[3])
    torch.gather(states.transpose(1, 2), 1, index, out=wide[:, : sources_bP.shape[1]])
    return wide


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
