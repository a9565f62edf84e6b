"""Rows that begin alike are read once, and computed as each alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import decoders, save_random
from tolerances import F32_MODEL
from torch.testing import assert_close

from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.packing import PackedRows
from rlhf_core.models.shared_rows import SharedRows, common_beginning
from rlhf_core.models.tokenizers import load_tokenizer
from rlhf_core.models.trunk import Trunk

HEAD = list(range(10, 20))
CHAT = [*HEAD, *range(30, 39)]


def test_a_head_and_the_prompts_of_groups_are_read_once() -> None:
    rows = PackedRows.of([[*CHAT, 1, 2], [*HEAD, 5], [*CHAT, 3], [*HEAD, 6, 7]])
    shared = SharedRows(rows)
    assert shared.tokens_T.tolist() == [*HEAD, *range(30, 39), 1, 2, 5, 3, 6, 7]
    assert torch.equal(shared.tokens_T[shared.places_T], rows.tokens_T)
    assert torch.equal(shared.positions_T[shared.places_T], rows.positions_T)
    assert shared.is_worth_it


def test_what_somebody_asks_for_stays_each_rows_own() -> None:
    """The last prompt token of each row, from which the first response token is predicted."""
    rows = PackedRows.of([[*CHAT, 1, 2], [*CHAT, 1, 3]])
    asked = torch.tensor([18, 19, 20, 39, 40, 41])
    shared = SharedRows(rows, asked)
    places = shared.places_T[asked].tolist()
    assert len(set(places)) == len(places)
    assert len(shared.tokens_T) == 18 + 2 * 3


@pytest.mark.parametrize("rows", [[[1, 2, 3], [1, 2, 4]], [[1], [2, 3]], [list(range(50))], [[7] * 9, [8] * 9]])
def test_short_beginnings_are_not_worth_it(rows: list[list[int]]) -> None:
    shared = SharedRows(PackedRows.of(rows))
    assert not shared.is_worth_it
    assert len(shared.tokens_T) == sum(map(len, rows))


@pytest.mark.parametrize("seed", range(30))
def test_any_rows_keep_their_tokens_and_attention(seed: int) -> None:
    """Against attention of each row alone, heads that share keys among them."""
    draw = random.Random(seed)
    heads = [[draw.randrange(9) for _ in range(draw.randrange(0, 14))] for _ in range(2)]
    texts = [heads[draw.randrange(2)] + [draw.randrange(3) for _ in range(draw.randrange(1, 12))] for _ in range(7)]
    rows = PackedRows.of(texts)
    shared = SharedRows(rows)
    assert torch.equal(shared.tokens_T[shared.places_T], rows.tokens_T)
    count, generator = len(shared.tokens_T), torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(heads_of, count, 4, generator=generator) for heads_of in (6, 2, 2))
    found = shared.attend(q, k, v, 0.3)[shared.places_T]
    start = 0
    for text in texts:
        own = shared.places_T[start : start + len(text)]
        weights = torch.einsum("hid,hjd->hij", q[:, own], k[:, own].repeat_interleave(3, 0)) * 0.3
        weights = weights.masked_fill(torch.ones(len(text), len(text)).triu(1).bool(), -torch.inf).softmax(-1)
        expected = torch.einsum("hij,hjd->ihd", weights, v[:, own].repeat_interleave(3, 0))
        assert_close(found[start : start + len(text)], expected, **F32_MODEL)
        start += len(text)


def test_common_beginning() -> None:
    assert common_beginning([[1, 2, 3], [1, 2, 4, 5]], [3, 3]) == 2
    assert common_beginning([[1, 2, 3], [1, 2, 3, 5]], [1, 3]) == 1
    assert common_beginning([[1], [2]], [1, 1]) == 0


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt_neox"])
def test_gradients_are_those_of_rows_in_full(
    family: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(str(tiny.policy), field="x")
    folder = save_random(decoders(len(tokenizer))[family], "AutoModelForCausalLM", tmp_path, tokenizer)
    model = LanguageModel.load(str(folder), dtype="float32", device=torch.device("cpu"), trainable=True)
    rows = PackedRows.of([[*CHAT, 1, 2], [*HEAD, 5, 50, 51], [*CHAT, 3, 4, 5], [*HEAD, 6, 7]])
    asked = torch.tensor([19, 20, 31, 32, 33, 53, 54, 55, 67])
    weight = torch.randn(len(asked), model.hidden_size, generator=torch.Generator().manual_seed(1))
    read: list[int] = []
    packed = Trunk._packed
    monkeypatch.setattr(Trunk, "_packed", lambda self, of: (read.append(len(of.tokens_T)), packed(self, of))[1])

    def states_and_gradients() -> tuple[torch.Tensor, list[torch.Tensor]]:
        states = model.hidden_states(rows, asked)
        return states, list(torch.autograd.grad((states * weight).sum(), list(model.trunk.parameters())))

    states, gradients = states_and_gradients()
    monkeypatch.setattr(SharedRows, "is_worth_it", False)
    whole, expected = states_and_gradients()
    assert read[-2] < read[-1] == len(rows.tokens_T)
    assert_close(states, whole, **F32_MODEL)
    for a, b in zip(gradients, expected, strict=True):
        scale = b.abs().max().clamp(min=1e-6)
        assert_close(a / scale, b / scale, **F32_MODEL)
