"""The first value that differs between two tables, and by how much."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.contracts.schemas import GENERATE, PPO_UPDATE, REFERENCE_LOGPROBS, SCORE_REWARDS
from rlhf_core.replay.comparison import ABSENT, Place, compare_tables, ulps

IDS = ["i000000-p000003-s0", "i000000-p000001-s0"]
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def reference(*rows: list[float], ids: list[str] = IDS) -> pa.Table:
    return pa.table({"sample_id": ids[: len(rows)], "ref_logprobs": list(rows)}, schema=REFERENCE_LOGPROBS)


def above(value: float, steps: int = 1) -> float:
    """The float32 that stands so many places further from 0; infinite beyond the largest."""
    found = np.float32(value)
    with np.errstate(over="ignore"):
        for _ in range(steps):
            found = np.nextafter(found, np.float32(np.copysign(np.inf, found)))
    return float(found)


class TestTables:
    def test_equal_ones(self) -> None:
        assert (
            compare_tables("reference_logprobs", reference([-1.0, -2.0], [-3.0]), reference([-1.0, -2.0], [-3.0]))
            is None
        )

    def test_one_value_by_one_ulp(self) -> None:
        found = compare_tables(
            "reference_logprobs", reference([-1.0, -2.0], [-3.0, -4.5]), reference([-1.0, -2.0], [-3.0, above(-4.5)])
        )
        assert found is not None
        (column,) = found.columns
        assert found.first == Place("ref_logprobs", 1, IDS[1], 1, -4.5, above(-4.5))
        assert (column.num_different, column.num_values) == (1, 4)
        assert (column.largest, column.largest_ulp) == (pytest.approx(4.77e-7, rel=1e-2), 1)

    def test_the_largest_is_told_beside_the_first(self) -> None:
        found = compare_tables(
            "reference_logprobs", reference([-1.0, -2.0], [-3.0]), reference([above(-1.0), -2.0], [above(-3.0, 7)])
        )
        assert found is not None
        assert found.first.row == 0
        assert found.columns[0].largest_ulp == 7

    def test_a_response_of_another_length(self) -> None:
        found = compare_tables("reference_logprobs", reference([-1.0, -2.0]), reference([-1.0]))
        assert found is not None
        assert found.first == Place("ref_logprobs", 0, IDS[0], 1, -2.0, ABSENT)
        assert found.columns[0].num_different == 1

    def test_minus_zero_is_another_number(self) -> None:
        found = compare_tables("reference_logprobs", reference([0.0]), reference([-0.0]))
        assert found is not None
        assert (found.columns[0].largest, found.columns[0].largest_ulp) == (0.0, 0)

    def test_other_rows_are_told_instead_of_their_values(self) -> None:
        found = compare_tables("reference_logprobs", reference([-1.0], [-2.0]), reference([-9.0], ids=IDS[1:]))
        assert found is not None
        (column,) = found.columns
        assert column.first == Place("sample_id", 0, IDS[0], None, IDS[0], IDS[1])
        assert column.num_different == 2

    def test_tokens_are_told_before_texts(self) -> None:
        def rollouts(text: str, tokens: list[int]) -> pa.Table:
            row: dict[str, Any] = {
                "sample_id": IDS[0], "prompt_id": 3, "sample_index": 0, "response_text": text,
                "response_tokens": tokens, "logprobs": [-1.0] * 2, "entropies": [1.0] * 2, "values": [],
                "support_tokens": [], "support_lens": [],
                "finish_reason": "eos",
            }  # fmt: skip
            return pa.Table.from_pylist([row], schema=GENERATE)

        found = compare_tables("generate", rollouts("ab", [5, 6]), rollouts("ac", [5, 7]))
        assert found is not None
        assert [column.first.column for column in found.columns] == ["response_tokens", "response_text"]
        assert found.first == Place("response_tokens", 0, IDS[0], 1, 6, 7)
        assert found.columns[0].largest is None, "how far apart two token ids are says nothing"

    def test_a_component_by_its_name(self) -> None:
        def scores(value: float) -> pa.Table:
            row = {"sample_id": IDS[0], "components": [{"name": "a", "score": 1.0}, {"name": "b", "score": value}],
                   "score": 1.0 + value}  # fmt: skip
            return pa.Table.from_pylist([row], schema=SCORE_REWARDS)

        found = compare_tables("score_rewards", scores(2.0), scores(above(2.0)))
        assert found is not None
        assert found.first == Place("components.score", 0, IDS[0], 1, 2.0, above(2.0))

    def test_a_step_is_named_by_its_number(self) -> None:
        def steps(*losses: float) -> pa.Table:
            rows = [
                {field.name: False if pa.types.is_boolean(field.type) else 0 for field in PPO_UPDATE} for _ in losses
            ]
            rows = [row | {"step": i, "loss": loss} for i, (row, loss) in enumerate(zip(rows, losses, strict=True))]
            return pa.Table.from_pylist(rows, schema=PPO_UPDATE)

        found = compare_tables("ppo_update", steps(1.0, 2.0), steps(1.0, 2.5))
        assert found is not None
        assert found.first == Place("loss", 1, "1", None, 2.0, 2.5)


class TestUlps:
    @given(FLOATS, st.integers(0, 50))
    def test_counts_the_numbers_between(self, value: float, steps: int) -> None:
        a, b = np.float32(value), np.float32(above(value, steps))
        if np.isfinite(b):
            assert ulps(np.array([a]), np.array([b])) == [steps]

    def test_across_zero(self) -> None:
        least = np.nextafter(np.float32(0), np.float32(1))
        assert ulps(np.array([-least]), np.array([least])) == [2]

    @given(FLOATS, FLOATS)
    def test_both_ways_the_same(self, a: float, b: float) -> None:
        one, other = np.array([a], np.float32), np.array([b], np.float32)
        assert ulps(one, other) == ulps(other, one)
