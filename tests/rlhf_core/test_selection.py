"""Responses chosen from a run, and how their numbers are spread."""

from __future__ import annotations

from itertools import pairwise

import pyarrow as pa
import pytest

from rlhf_core.contracts.errors import UserError
from rlhf_core.selection import BARS, SPREADS, Selection, select_samples, spread
from rlhf_core.tables import SAMPLES

VALUES = {
    "score": [1.0, 3.0, 2.0, 3.0],
    "kl": [0.5, -0.5, 4.0, 1.0],
    "finish_reason": ["eos", "length", "length", "stop"],
    "response_text": ["A fine film", "bad <b>film</b>", "fine ﬁne", "Well"],
    "response_tokens": [[1, 2], [3], [4, 5, 6], []],
    "logprobs": [[-1.0, -2.0], [-3.0], [-1.0, -1.0, -1.0], []],
    "ref_logprobs": [[-2.0, -1.0], [-3.5], [-1.0, -4.0, -1.0], []],
}


def samples(iteration: int = 0) -> pa.Table:
    """Four responses, whatever is not in VALUES empty or zero."""
    ids = [f"i{iteration:06d}-p{i:06d}-s0" for i in range(4)]
    lens = [len(tokens) for tokens in VALUES["response_tokens"]]
    own = VALUES | {"sample_id": ids, "iteration": [iteration] * 4, "num_tokens": lens}

    def column(field: pa.Field) -> pa.Array:
        if field.name in own:
            return pa.array(own[field.name], field.type)
        if field.name in ("components", "values", "returns"):
            return pa.array([[]] * 4, field.type)
        if pa.types.is_list(field.type):
            return pa.array([[0.0] * num for num in lens], field.type)
        return pa.array(["" if pa.types.is_string(field.type) else 0] * 4, field.type)

    return pa.table([column(field) for field in SAMPLES], schema=SAMPLES)


def chosen(**selection: object) -> list[str]:
    table = select_samples([samples()], Selection(**selection))  # pyright: ignore[reportArgumentType]
    return [sample_id[8:15] for sample_id in table["sample_id"].to_pylist()]


def test_change_is_the_mean_distance_of_logprobs_to_the_references() -> None:
    table = select_samples([samples()], Selection())
    assert table["change"].to_pylist() == [1.0, 0.5, 1.0, 0.0]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"by": "score"}, [1, 3, 2, 0]),  # equal ones in the order of their ids
        ({"by": "kl", "lowest": True}, [1, 0, 3, 2]),
        ({"by": "length"}, [2, 0, 1, 3]),
        ({"by": "change", "finish": "length"}, [2, 1]),
        ({"finish": "stop"}, [3]),
        ({"contains": "FILM"}, [0, 1]),
        ({"contains": "<b>"}, [1]),
        ({"contains": ".*"}, []),  # a text, not a pattern
    ],
)
def test_those_asked_for_in_the_order_asked_for(selection: dict[str, object], expected: list[int]) -> None:
    assert chosen(**selection) == [f"p{i:06d}" for i in expected]


def test_across_iterations_all_are_ordered_together() -> None:
    table = select_samples([samples(0), samples(1)], Selection(by="score"))
    assert table["score"].to_pylist() == [3, 3, 3, 3, 2, 2, 1, 1]
    assert table["iteration"].to_pylist() == [0, 0, 1, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"by": "beauty"}, "--by beauty is not something to order by; choose score, kl"),
        ({"finish": "cut"}, "--finish cut is no finish reason; choose eos, stop, length"),
        ({"lowest": True}, "--lowest needs --by"),
    ],
)
def test_a_mistake_is_named(selection: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Selection(**selection)  # pyright: ignore[reportArgumentType]


def test_a_spread_counts_every_value_once() -> None:
    rows = spread(select_samples([samples(0), samples(1)], Selection()))
    assert list(dict.fromkeys(row["quantity"] for row in rows)) == list(SPREADS)
    for quantity, total in (("score", 8), ("KL", 8), ("length", 8), ("advantage", 12)):
        own = [row for row in rows if row["quantity"] == quantity]
        assert sum(row["count"] for row in own) == total
        assert all(a["high"] == b["low"] for a, b in pairwise(own))
        assert len(own) <= BARS
    lengths = {row["low"]: row["count"] for row in rows if row["quantity"] == "length"}
    assert lengths == {0: 2, 1: 2, 2: 2, 3: 2}
