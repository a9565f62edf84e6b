"""Ragged columns to padded tensors and back; every batch to its artifact's table and back."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_core.contracts.artifacts import conform
from rlhf_core.contracts.batches import (
    Experience,
    Prompts,
    ReferenceLogprobs,
    Rollouts,
    Scores,
    Support,
    UpdateStatistics,
    check_aligned,
    pad_lists,
    unpad_lists,
)
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.stage_graph import SCHEMAS

EXAMPLES = settings(max_examples=60)
INT32 = st.integers(-(2**31), 2**31 - 1)
FLOAT32 = st.floats(width=32, allow_nan=False)
RAGGED = st.lists(st.lists(INT32, max_size=5), max_size=6)


class TestPadding:
    def test_by_hand(self) -> None:
        tokens, mask = pad_lists(pa.array([[5, 6], [], [7]]), torch.int64)
        assert tokens.tolist() == [[5, 6], [0, 0], [7, 0]]
        assert mask.tolist() == [[True, True], [False, False], [True, False]]
        assert (tokens.dtype, mask.dtype) == (torch.int64, torch.bool)

    @EXAMPLES
    @given(RAGGED)
    def test_unpad_undoes_pad(self, lists: list[list[int]]) -> None:
        column = pa.array(lists, pa.list_(pa.int32()))
        assert unpad_lists(*pad_lists(column, torch.int64), pa.int32()).to_pylist() == lists

    @EXAMPLES
    @given(st.lists(st.lists(FLOAT32, max_size=5), max_size=6))
    def test_float32_is_kept_bit_by_bit(self, lists: list[list[float]]) -> None:
        column = pa.array(lists, pa.list_(pa.float32()))
        back = unpad_lists(*pad_lists(column, torch.float32), pa.float32())
        assert back.flatten().to_numpy().tobytes() == column.flatten().to_numpy().tobytes()

    @EXAMPLES
    @given(RAGGED, st.data())
    def test_a_slice_is_padded_alone(self, lists: list[list[int]], data: st.DataObject) -> None:
        start = data.draw(st.integers(0, len(lists)))
        stop = data.draw(st.integers(start, len(lists)))
        column = pa.array(lists, pa.list_(pa.int32())).slice(start, stop - start)
        tokens, mask = pad_lists(column, torch.int64)
        assert unpad_lists(tokens, mask, pa.int32()).to_pylist() == lists[start:stop]
        assert tokens.shape[1] == max([1, *map(len, lists[start:stop])]), "as wide as the longest, and at least 1"

    @EXAMPLES
    @given(RAGGED, st.integers(1, 3))
    def test_chunks_are_one_column(self, lists: list[list[int]], size: int) -> None:
        kind = pa.list_(pa.int32())
        chunks = pa.chunked_array([pa.array(lists[i : i + size], kind) for i in range(0, len(lists), size)], kind)
        whole = pad_lists(pa.array(lists, kind), torch.int64)
        assert all(map(torch.equal, pad_lists(chunks, torch.int64), whole))

    @EXAMPLES
    @given(RAGGED)
    def test_padding_and_mask(self, lists: list[list[int]]) -> None:
        tokens, mask = pad_lists(pa.array(lists, pa.list_(pa.int32())), torch.int64)
        assert mask.sum(dim=1).tolist() == [len(row) for row in lists]
        assert not tokens[~mask].any(), "padding is zero"
        assert not (mask[:, 1:] & ~mask[:, :-1]).any(), "on the right"

    def test_garbage_in_the_padding_is_not_stored(self) -> None:
        mask = torch.tensor([[True, False], [True, True]])
        tokens = torch.tensor([[1.0, math.nan], [2.0, 3.0]])
        assert unpad_lists(tokens, mask, pa.float32()).to_pylist() == [[1.0], [2.0, 3.0]]

    def test_a_tensor_that_needs_a_gradient(self) -> None:
        mask = torch.tensor([[True]])
        assert unpad_lists(torch.ones(1, 1, requires_grad=True), mask, pa.float32()).to_pylist() == [[1.0]]

    def test_the_tensor_is_its_own_memory(self) -> None:
        """Arrow's buffers may be read-only pages of a file."""
        column = pa.array([[1.0, 2.0]], pa.list_(pa.float32()))
        pad_lists(column, torch.float32)[0].zero_()
        assert column.to_pylist() == [[1.0, 2.0]]


def padded(lists: list[list[float]], dtype: torch.dtype = torch.float32) -> Tensor:
    kind = pa.float32() if dtype.is_floating_point else pa.int32()
    return pad_lists(pa.array(lists, pa.list_(kind)), dtype)[0]


MASK_BR = torch.tensor([[True, True], [True, False], [True, True]])
IDS = ["i000000-p000004-s0", "i000000-p000004-s1", "i000000-p000009-s0"]
PROMPTS = Prompts(
    prompt_ids=[4, 9],
    texts=["Hi", "café 🙂\n"],
    messages=[[], [{"role": "user", "content": "café 🙂\n"}]],
    tokens_QP=torch.tensor([[1, 2, 0], [3, 4, 5]]),
    mask_QP=torch.tensor([[True, True, False], [True, True, True]]),
    num_truncated=[0, 2],
    columns=[{"answer": "café 🙂\n", "level": 2}, {"answer": None, "level": 0.1}],
)
ROLLOUTS = Rollouts(
    sample_ids=IDS,
    prompt_ids=[4, 4, 9],
    prompt_rows=torch.tensor([0, 0, 1]),
    sample_indices=[0, 1, 0],
    texts=["a b", "", "c"],
    tokens_BR=torch.tensor([[7, 8], [0, 0], [9, 0]]),  # a 0 may be a real token
    response_mask_BR=MASK_BR,
    logprobs_BR=padded([[-0.5, -1.25], [-0.0], [-3.0, -1e-30]]),
    entropies_BR=padded([[1.0, 2.0], [0.0], [4.5, 0.1]]),
    values_BR=padded([[0.1, -0.2], [0.0], [0.3, 0.4]]),
    supports=[
        Support(torch.tensor([7, 1, 8]), torch.tensor([2, 1])),
        Support(torch.tensor([0]), torch.tensor([1])),
        Support(torch.tensor([9, 0, 2]), torch.tensor([1, 2])),
    ],
    finish_reasons=["length", "eos", "stop"],
)
SCORES = Scores(
    IDS,
    ["help", "harm"],
    torch.tensor([[1.5, -2.0], [0.1, 0.0], [3.0, 4.0]]),
    torch.tensor([[True, True], [True, False], [True, True]]),
    torch.tensor([0.5, 0.1, 7.0]),
)
REFERENCE = ReferenceLogprobs(IDS, padded([[-0.5, -1.5], [-9.0], [-3.0, -2.0]]), MASK_BR)
EXPERIENCE = Experience(
    sample_ids=IDS,
    score_B=torch.tensor([0.5, 0.1, 7.0]),
    score_normalized_B=torch.tensor([0.25, 0.0, 1.0]),
    score_clipped_B=torch.tensor([0.25, 0.0, 0.5]),
    score_shaped_B=torch.tensor([0.25, -1.0, 0.5]),
    kl_B=torch.tensor([0.25, 9.0, -1.0]),
    k3_B=torch.tensor([0.125, 8.0, 0.75]),
    rlhf_reward_B=torch.tensor([0.2, -2.0, 0.6]),
    token_kl_BR=padded([[0.0, 0.25], [9.0], [0.0, -1.0]]),
    rewards_BR=padded([[0.0, 0.2], [-2.0], [0.0, 0.6]]),
    advantages_BR=padded([[1.0, -1.0], [0.0], [0.5, 0.25]]),
    returns_BR=padded([[1.1, -1.2], [0.0], [0.8, 0.65]]),
    response_mask_BR=MASK_BR,
)
STEP: dict[str, Any] = {
    field.name: True if pa.types.is_boolean(field.type) else 2 if pa.types.is_integer(field.type) else 0.5
    for field in SCHEMAS["ppo_update"]
}


def assert_same(found: Any, expected: Any) -> None:
    """Field by field, tensors with their types."""
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    elif hasattr(expected, "__dataclass_fields__"):
        for field in fields(expected):
            assert_same(getattr(found, field.name), getattr(expected, field.name))
    else:
        assert found == expected


class TestBatches:
    """``conform`` stands between: what comes back has been through the exact schema of the artifact."""

    def test_prompts(self) -> None:
        assert_same(Prompts.from_table(conform(PROMPTS.to_table(), "sample_prompts")), PROMPTS)

    def test_rollouts(self) -> None:
        table = conform(ROLLOUTS.to_table(), "generate")
        assert table["prompt_id"].to_pylist() == [4, 4, 9]
        assert table["response_tokens"].to_pylist() == [[7, 8], [0], [9, 0]]
        assert_same(Rollouts.from_table(table, PROMPTS), ROLLOUTS)

    def test_rollouts_without_critic_and_truncation(self) -> None:
        plain = replace(ROLLOUTS, values_BR=None, supports=None)
        table = conform(plain.to_table(), "generate")
        assert table["values"].to_pylist() == table["support_tokens"].to_pylist() == [[], [], []]
        assert_same(Rollouts.from_table(table, PROMPTS), plain)

    def test_prompt_columns_are_json_text(self) -> None:
        table = conform(PROMPTS.to_table(), "sample_prompts")
        assert table["columns"].to_pylist() == [
            '{"answer":"café 🙂\\n","level":2}',
            '{"answer":null,"level":0.1}',
        ]

    def test_scores(self) -> None:
        table = conform(SCORES.to_table(), "score_rewards")
        assert table["components"][0].as_py() == [{"name": "help", "score": 1.5}, {"name": "harm", "score": -2.0}]
        assert table["components"][1].as_py() == [{"name": "help", "score": pytest.approx(0.1)}], "harm was dropped"
        assert_same(Scores.from_table(table), SCORES)

    def test_scores_whose_first_row_lacks_a_component(self) -> None:
        turned = replace(SCORES, components_mask_BC=torch.tensor([[False, True], [True, False], [False, True]]))
        found = Scores.from_table(conform(turned.to_table(), "score_rewards"))
        assert found.names == ["harm", "help"]
        assert torch.equal(found.components_mask_BC, turned.components_mask_BC[:, [1, 0]])
        assert torch.equal(found.components_BC, torch.tensor([[-2.0, 0.0], [0.0, 0.1], [4.0, 0.0]]))

    def test_reference_logprobs(self) -> None:
        assert_same(ReferenceLogprobs.from_table(conform(REFERENCE.to_table(), "reference_logprobs")), REFERENCE)

    def test_experience(self) -> None:
        assert_same(Experience.from_table(conform(EXPERIENCE.to_table(), "shape_rewards")), EXPERIENCE)

    def test_experience_without_critic(self) -> None:
        plain = replace(EXPERIENCE, returns_BR=None)
        table = conform(plain.to_table(), "shape_rewards")
        assert table["returns"].to_pylist() == [[], [], []]
        assert_same(Experience.from_table(table), plain)

    def test_update_statistics(self) -> None:
        steps = [STEP, {**STEP, "step": 3, "skipped": False, "loss": math.nan}]
        rows = conform(UpdateStatistics(steps).to_table(), "ppo_update").to_pylist()
        assert rows[0] == STEP
        assert (rows[1]["step"], rows[1]["skipped"], math.isnan(rows[1]["loss"])) == (3, False, True)

    def test_a_response_to_a_prompt_that_was_not_sampled(self) -> None:
        table = conform(ROLLOUTS.to_table(), "generate")
        with pytest.raises(IntegrityError, match=r"rollouts name prompts that were not sampled: \[9\]"):
            Rollouts.from_table(table, replace(PROMPTS, prompt_ids=[4, 5]))

    @pytest.mark.parametrize("other", [IDS[:2], IDS[::-1], [*IDS[:2], "i000001-p000009-s0"]])
    def test_alignment(self, other: list[str]) -> None:
        check_aligned(IDS, list(IDS), tuple(IDS))
        with pytest.raises(IntegrityError, match="different samples or another order"):
            check_aligned(IDS, IDS, other)

    @EXAMPLES
    @given(st.lists(st.lists(FLOAT32, min_size=1, max_size=4), min_size=1, max_size=5))
    def test_any_shape_of_experience(self, rows: list[list[float]]) -> None:
        values_BR, mask_BR = pad_lists(pa.array(rows, pa.list_(pa.float32())), torch.float32)
        score_B = torch.from_numpy(np.array([row[0] for row in rows], np.float32))
        column = {"_B": score_B, "BR": values_BR}
        tensors = {f.name: column[f.name[-2:]] for f in fields(Experience) if f.name.endswith(("_B", "_BR"))}
        ids = [f"s{i}" for i in range(len(rows))]
        batch = Experience(sample_ids=ids, **tensors | {"response_mask_BR": mask_BR})
        assert_same(Experience.from_table(conform(batch.to_table(), "shape_rewards")), batch)
