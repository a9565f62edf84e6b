"""One response token by token: what is stored of it beside what was computed again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from rlhf_core.contracts.errors import UserError
from rlhf_core.tables import PER_TOKEN

Row = dict[str, Any]


def sample_row(table: pa.Table, key: str, value: Any) -> pa.Table:
    """The rows of a table that a key names: one, or none."""
    rows = [row for row, name in enumerate(table[key].to_pylist()) if name == value]
    return table.take(rows)


def check_sample(rollouts: pa.Table, sample: str, iteration: int) -> None:
    """Raise UserError unless a response of this id is there."""
    ids = rollouts["sample_id"].to_pylist()
    if sample not in ids:
        raise UserError(f"--sample {sample} is not in iteration {iteration}, whose samples are {ids[0]} to {ids[-1]}")


def token_rows(
    stored: Mapping[str, pa.Table],
    replayed: Mapping[str, pa.Table],
    sample: str,
    decode: Callable[[int], str],
    *,
    name: str = "replayed",
) -> list[Row]:
    """One row a token of a response.

    Args:
        stored: stage -> table.
        replayed: those that were computed again.
        sample: its id.
        decode: the text of a token.
        name: of what was computed again.
    Returns: ``{"position": 0, "token": " a", "logprob": {"stored": -1.2, "replayed": -1.2}, …}``; null where one of the
        two has no such token, and ``stored`` alone where the stage was not computed again.
    """
    columns: dict[str, tuple[Sequence[Any], Sequence[Any] | None]] = {}
    for shown, column in PER_TOKEN.items():
        stage = next((stage for stage, table in stored.items() if column in table.column_names), None)
        if stage is None:
            continue
        then = _values(stored[stage], column, sample)
        now = _values(replayed[stage], column, sample) if stage in replayed else None
        if then or now:
            columns[shown] = then, now
    num_tokens = max(len(values) for pair in columns.values() for values in pair if values is not None)
    cells = [{column: _cell(then, now, t, name) for column, (then, now) in columns.items()} for t in range(num_tokens)]
    return [{"position": t, "token": _text(row["token_id"], decode)} | row for t, row in enumerate(cells)]


def _text(cell: Row, decode: Callable[[int], str]) -> str:
    return decode(next(token for token in cell.values() if token is not None))


def _values(table: pa.Table, column: str, sample: str) -> Sequence[Any]:
    rows = sample_row(table, "sample_id", sample)[column].to_pylist()
    return rows[0] if rows else []


def _cell(then: Sequence[Any], now: Sequence[Any] | None, position: int, name: str) -> Row:
    cell = {"stored": then[position] if position < len(then) else None}
    return cell if now is None else cell | {name: now[position] if position < len(now) else None}
