"""Which iterations a page shows."""

from __future__ import annotations

import pytest

from rlhf_core.choice import chosen_iterations, first_middle_last
from rlhf_core.contracts.errors import UserError


@pytest.mark.parametrize(
    ("finished", "expected"), [(0, []), (1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (40, [0, 19, 39]), (41, [0, 20, 40])]
)
def test_by_default_the_first_the_middle_and_the_last(finished: int, expected: list[int]) -> None:
    assert first_middle_last(finished) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0,10,last", [0, 10, 39]),
        ("3-7", [3, 4, 5, 6, 7]),
        (" 5 , 1 - 2,5", [1, 2, 5]),
        ("38-last", [38, 39]),
        ("all", list(range(40))),
        ("last", [39]),
        ("7-7", [7]),
    ],
)
def test_names_numbers_and_ranges(text: str, expected: list[int]) -> None:
    assert chosen_iterations(text, 40) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ten", "has 'ten', which is no iteration; write numbers"),
        ("", "has '', which is no iteration"),
        ("1,,2", "has '', which is no iteration"),
        ("-3", "has '', which is no iteration"),
        ("1-2-3", "has '2-3', which is no iteration"),
        ("1.5", "has '1.5', which is no iteration"),
        ("²", "has '²', which is no iteration"),
        ("9" * 5000, "which is no iteration"),
        ("7-3", "has the range 7-3, which runs backwards"),
        ("last-3", "has the range last-3, which runs backwards"),
        ("0,40", "names iteration 40, which is not finished; the newest is 39"),
        ("0-99999999", "names iteration 99999999, which is not finished; the newest is 39"),
    ],
)
def test_anything_else_is_one_sentence(text: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        chosen_iterations(text, 40)
    (sentence,) = refused.value.problems
    assert sentence.startswith("--iterations ")
    assert said in sentence
