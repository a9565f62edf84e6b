"""Two tables of one stage, the stored one and the one that a replay has computed: equal bit by bit, or where not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final, cast

import numpy as np
import pyarrow as pa

KEYS: Final = {"sample_prompts": "prompt_id", "ppo_update": "step"}
"""Stage -> the column that names its rows; sample_id of all others."""
ABSENT: Final = "absent"
"""Stands for a value that one of the two does not have."""


@dataclass(frozen=True)
class Place:
    """One value of a table that is not the stored one.

    Example: ``Place("logprobs", 3, "i000007-p000012-s0", 5, -1.25, -1.2500001)``
    """

    column: str
    row: int
    key: str
    """sample_id, prompt_id or step of that row."""
    position: int | None
    """In the list of that row: of a token, from 0; None where the column has one value a row."""
    stored: Any
    replayed: Any


@dataclass(frozen=True)
class ColumnDifference:
    """Everything that differs in one column."""

    num_different: int
    num_values: int
    largest: float | None
    """Largest difference of two numbers; None where the column has none, or they only differ in how many."""
    largest_ulp: int | None
    """The same in units of the last place: how many float32 numbers lie between the two."""
    first: Place


@dataclass(frozen=True)
class TableDifference:
    """The columns that differ: numbers and tokens in the order of the schema, then texts."""

    columns: tuple[ColumnDifference, ...]

    @property
    def first(self) -> Place:
        """The first value that differs."""
        return self.columns[0].first

    def to_json(self) -> list[dict[str, Any]]:
        """As plain JSON, one object a column."""
        return [asdict(column) for column in self.columns]


@dataclass(frozen=True)
class _Leaf:
    """One column as a flat array: that of a list of structs is several."""

    name: str
    values: np.ndarray
    starts: np.ndarray
    """rows + 1: where each row's values begin, and the end."""
    is_list: bool

    def row(self, row: int) -> np.ndarray:
        return self.values[self.starts[row] : self.starts[row + 1]]


def key_column(stage: str) -> str:
    """The column that names a stage's rows."""
    return KEYS.get(stage, "sample_id")


def compare_tables(stage: str, stored: pa.Table, replayed: pa.Table) -> TableDifference | None:
    """Find every value that is not the stored one, to the bit: 0.0 is not -0.0.

    Args:
        stage: whose tables they are; both have its schema.
        stored: as committed.
        replayed: as computed again.
    Returns: the columns that differ, or None. Where the rows themselves are others, only the column that names them.
    """
    key = key_column(stage)
    names = [str(name) for name in stored[key].to_pylist()]
    (mine,), (other,) = list(_leaves(stored.select([key]))), list(_leaves(replayed.select([key])))
    if (found := _compare_leaf(mine, other, names)) is not None:
        return TableDifference((found,))
    found_in = [
        (mine, found)
        for mine, other in zip(_leaves(stored), _leaves(replayed), strict=True)
        if (found := _compare_leaf(mine, other, names)) is not None
    ]
    ordered = sorted(found_in, key=lambda item: item[0].values.dtype == object)
    return TableDifference(tuple(found for _, found in ordered)) if ordered else None


def ulps(stored: np.ndarray, replayed: np.ndarray) -> np.ndarray:
    """How many float32 numbers lie between two, at each place: 0 for the same bits, 1 for neighbours.

    Args:
        stored: float32.
        replayed: float32, of the same shape.
    """
    ordered = [np.where(bits >= 0, bits, -(bits & 0x7FFFFFFF)) for bits in map(_bits, (stored, replayed))]
    return np.abs(ordered[0] - ordered[1])


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.float32).view(np.int32).astype(np.int64)


def _compare_leaf(stored: _Leaf, replayed: _Leaf, names: list[str]) -> ColumnDifference | None:
    if np.array_equal(stored.starts, replayed.starts) and not _unequal(stored.values, replayed.values).any():
        return None
    num_different = num_values = 0
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    first: Place | None = None
    rows = max(len(stored.starts), len(replayed.starts)) - 1
    nothing = stored.values[:0]
    for row in range(rows):
        mine = stored.row(row) if row < len(stored.starts) - 1 else nothing
        other = replayed.row(row) if row < len(replayed.starts) - 1 else nothing
        both, longest = min(len(mine), len(other)), max(len(mine), len(other))
        unequal = _unequal(mine[:both], other[:both])
        num_different += int(unequal.sum()) + longest - both
        num_values += longest
        pairs.append((mine[:both], other[:both]))
        if first is None and (unequal.any() or longest > both):
            at = int(unequal.argmax()) if unequal.any() else both
            values = (_plain(mine[at]) if at < len(mine) else ABSENT, _plain(other[at]) if at < len(other) else ABSENT)
            name = names[row] if row < len(names) else ABSENT
            first = Place(stored.name, row, name, at if stored.is_list else None, *values)
    assert first is not None, "they are not the same, so something differs"
    if stored.values.dtype != np.float32 or not any(len(mine) for mine, _ in pairs):
        return ColumnDifference(num_different, num_values, None, None, first)
    a, b = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    largest = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())
    return ColumnDifference(num_different, num_values, largest, int(ulps(a, b).max()), first)


def _unequal(stored: np.ndarray, replayed: np.ndarray) -> np.ndarray:
    if stored.dtype == np.float32:
        return _bits(stored) != _bits(replayed)
    return np.asarray(stored != replayed, dtype=bool)


def _leaves(table: pa.Table) -> Iterator[_Leaf]:
    for name in table.column_names:
        array: Any = table[name].combine_chunks()
        array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
        if not pa.types.is_list(array.type):
            yield _Leaf(name, array.to_numpy(zero_copy_only=False), np.arange(len(array) + 1), is_list=False)
            continue
        lens = array.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(lens)])
        flat: Any = array.flatten()
        if pa.types.is_struct(flat.type):
            for field, child in zip(flat.type, flat.flatten(), strict=True):
                values = child.to_numpy(zero_copy_only=False)
                yield _Leaf(f"{name}.{field.name}", values, starts, is_list=True)
        else:
            yield _Leaf(name, flat.to_numpy(zero_copy_only=False), starts, is_list=True)


def _plain(value: Any) -> Any:
    return cast("Any", value).item() if isinstance(value, np.generic) else value
