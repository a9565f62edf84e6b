"""A record's values are of the types that its class declares, or there is no record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from rlhf_core.contracts.loop_state import Cursor
from rlhf_core.contracts.typed import typed


@dataclass(frozen=True)
class Record:
    name: str
    cursor: Cursor
    numbers: Mapping[str, float]
    lines: Sequence[str] = ()
    note: str | None = None
    extra: Any = None


VALUES: dict[str, Any] = {"name": "a", "cursor": {"epoch": 1, "position": 2}, "numbers": {"x": 1, "y": 0.5}}


def test_values_of_the_right_types_make_the_record() -> None:
    assert typed(Record, VALUES) == Record("a", Cursor(1, 2), {"x": 1, "y": 0.5})
    assert typed(Record, VALUES | {"lines": ["b"], "note": None, "extra": [1]}).lines == ["b"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": 1}, "Record.name is '1', which is not str"),
        ({"cursor": {"epoch": True}}, "Record.cursor.epoch is 'True', which is not int"),
        ({"cursor": {"epoch": 1.0}}, "Record.cursor.epoch is '1.0', which is not int"),
        ({"cursor": []}, "Record.cursor is a list, not an object"),
        ({"cursor": {"other": 1}}, "Record.cursor has the unknown key 'other'"),
        ({"numbers": {"x": "1"}}, "Record.numbers.x is '1', which is not float"),
        ({"numbers": {"x": float("inf")}}, "Record.numbers.x is 'inf', which is not float"),
        ({"numbers": [1]}, "Record.numbers is '[1]', which is not"),
        ({"lines": "ab"}, "Record.lines is 'ab', which is not"),
        ({"note": 3}, "Record.note is '3', which is not str"),
    ],
)
def test_another_type_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="Record") as caught:
        typed(Record, VALUES | change)
    assert str(caught.value).startswith(said)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ValueError, match=r"^Record.cursor is missing$"):
        typed(Record, {"name": "a", "numbers": {}})
