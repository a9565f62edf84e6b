"""Rows that begin alike, each beginning read once: a system prompt, a template's head, a prompt with its k samples.

In a causal model a token depends on the tokens before it alone. So what rows have in common is computed once, as a
segment of its own, and attention lets the segments that follow see it. There are three levels: the beginning of all
rows, what the rows of a group have in common behind it, and the rest of each row.

B rows, T tokens that are read, H heads of d, n segments of a level, L tokens of the longest, K with all before it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlhf_core.models.packing import PackedRows

WORTH: Final = 0.9
"""Beginnings are shared where at most this part of the tokens is left to read."""
SHORTEST: Final = 8
"""Tokens of a beginning that is worth a segment of its own."""


@dataclass(frozen=True)
class _Segment:
    """Consecutive tokens of one row, or of several rows that have them in common."""

    tokens: list[int]
    before: list[int]
    """Where the tokens before it stand among the T, from the row's first one on."""

    def path(self, first: int) -> list[int]:
        """Where all tokens up to its last one stand, if its own begin at ``first``."""
        return [*self.before, *range(first, first + len(self.tokens))]


@dataclass(frozen=True)
class _Level:
    """Segments that are computed beside each other."""

    first: int
    """Where its tokens begin among the T."""
    segments: PackedRows
    keys_nK: Tensor
    """int64, flat: the token at each position of a segment's row."""
    is_seen_nLK: Tensor
    """bool: position K is not behind the segment's token L."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """[t, H, d] of the level's t tokens, from queries [H, T, d], keys and values [H or fewer, T, d]."""
        heads, kept_heads, size = query.shape[0], key.shape[0], query.shape[2]
        count, longest, width = self.is_seen_nLK.shape
        own_tHd = query[:, self.first : self.first + len(self.segments.tokens_T)].transpose(0, 1)
        q = self.segments.padded(own_tHd).transpose(1, 2)
        q = q.reshape(count, kept_heads, -1, size)  # the queries of a group of heads beside each other
        k, v = (
            states.index_select(1, self.keys_nK).view(kept_heads, count, width, size).transpose(0, 1)
            for states in (key, value)
        )
        is_seen = self.is_seen_nLK.repeat(1, heads // kept_heads, 1)[:, None]
        attended = scaled_dot_product_attention(q, k, v, attn_mask=is_seen, scale=scaling)
        return self.segments.packed(attended.reshape(count, heads, longest, size).transpose(1, 2))


class SharedRows:
    """The tokens of rows, with the beginnings that they share once.

    Args:
        rows: none empty.
        asked_T: which of their tokens somebody asks for: those stay each row's own. None: the last of each row.
    """

    def __init__(self, rows: PackedRows, asked_T: Tensor | None = None) -> None:
        device = rows.tokens_T.device
        texts, limits = _texts_and_limits(rows, asked_T)
        levels, leaves = _segments(texts, limits)
        self.tokens_T = torch.tensor([t for level in levels for s in level for t in s.tokens], device=device)
        self.positions_T = torch.cat([
            torch.arange(len(s.before), len(s.before) + len(s.tokens), device=device) for level in levels for s in level
        ])  # fmt: skip
        self.places_T = torch.tensor([place for path in leaves for place in path], device=device)
        """Where each token of the rows stands here."""
        self._levels: list[_Level] = []
        first = 0
        for level in levels:
            if level:
                self._levels.append(_level(level, first, device))
                first += sum(len(segment.tokens) for segment in level)

    @property
    def is_worth_it(self) -> bool:
        """Whether enough tokens are read once instead of many times."""
        return len(self.tokens_T) <= WORTH * len(self.places_T)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """[T, H, d] of queries [H, T, d], keys and values [H or fewer, T, d]; causal, each token in its own row."""
        return torch.cat([level.attend(query, key, value, scaling) for level in self._levels])


def shared_beginnings(rows: PackedRows, asked_T: Tensor | None = None) -> SharedRows | None:
    """Return the rows with what they share read once, as :class:`SharedRows`; None where that saves too little."""
    if len(rows.lens_B) == 1:
        return None
    shared = SharedRows(rows, asked_T)
    return shared if shared.is_worth_it else None


def common_beginning(texts: Sequence[list[int]], limits: Sequence[int]) -> int:
    """How many tokens all rows have in common at their beginning, at most as many as each row's limit allows."""
    shortest = min(limits)
    low, high = min(texts), max(texts)  # of all in order, the first and the last differ first
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return min(same, shortest)


def _texts_and_limits(rows: PackedRows, asked_T: Tensor | None) -> tuple[list[list[int]], list[int]]:
    """The tokens of each row, and how many of them may be shared."""
    tokens, lens = rows.tokens_T.tolist(), rows.lens_B.tolist()
    starts = rows.starts_B.tolist()
    texts = [tokens[start : start + length] for start, length in zip(starts, lens, strict=True)]
    limits = [length - 1 for length in lens]
    if asked_T is not None:
        is_asked_T = torch.zeros(len(tokens), dtype=torch.bool, device=asked_T.device)
        is_asked_T[asked_T] = True
        asked = is_asked_T.tolist()
        for row, start in enumerate(starts):
            limits[row] = next((i for i in range(limits[row]) if asked[start + i]), limits[row])
    return texts, limits


def _segments(texts: list[list[int]], limits: list[int]) -> tuple[list[list[_Segment]], list[list[int]]]:
    """Segments of three levels, and the path of each row through them."""
    head = common_beginning(texts, limits) if len(texts) > 1 else 0
    head = head if head >= SHORTEST else 0
    levels: list[list[_Segment]] = [[_Segment(texts[0][:head], [])] if head else [], [], []]
    first = head
    groups: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for row, text in enumerate(texts):
        groups[tuple(text[head : min(limits[row], head + SHORTEST)])].append(row)
    before: dict[int, list[int]] = {row: list(range(head)) for row in range(len(texts))}
    for beginning, rows in groups.items():
        if len(rows) > 1 and len(beginning) == SHORTEST:
            end = common_beginning([texts[row] for row in rows], [limits[row] for row in rows])
            segment = _Segment(texts[rows[0]][head:end], before[rows[0]])
            levels[1].append(segment)
            for row in rows:
                before[row] = segment.path(first)
            first += len(segment.tokens)
    leaves: list[list[int]] = []
    for row, text in enumerate(texts):
        segment = _Segment(text[len(before[row]) :], before[row])
        levels[2].append(segment)
        leaves.append(segment.path(first))
        first += len(segment.tokens)
    return levels, leaves


def _level(segments: list[_Segment], first: int, device: torch.device) -> _Level:
    rows = PackedRows.of([segment.tokens for segment in segments], device)
    paths: list[list[int]] = []
    start = first
    for segment in segments:
        paths.append(segment.path(start))
        start += len(segment.tokens)
    width = max(map(len, paths))
    keys_nK = torch.tensor([path + [path[-1]] * (width - len(path)) for path in paths], device=device)
    begins_n = torch.tensor([len(segment.before) for segment in segments], device=device)
    positions_nL = begins_n[:, None] + torch.arange(rows.longest, device=device)
    is_seen_nLK = torch.arange(width, device=device) <= positions_nL[..., None]
    return _Level(first, rows, keys_nK.reshape(-1), is_seen_nLK)
