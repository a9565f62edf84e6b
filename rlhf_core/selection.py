"""Responses chosen from a run: filtered, ordered, the first of them; and how their numbers are spread."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from rlhf_core.contracts.errors import UserError
from rlhf_core.tables import SAMPLES, explode, pc

FINISH_REASONS: Final = ("eos", "stop", "length")
CHANGE: Final = pa.field("change", pa.float32(), nullable=False)
"""Mean |log π_old - log π_ref| over a response's tokens, nats: how much it has changed against the reference."""
ORDERS: Final[dict[str, str]] = {
    "score": "score",
    "kl": "kl",
    "k3": "k3",
    "reward": "rlhf_reward",
    "length": "num_tokens",
    "change": "change",
}
"""What responses can be ordered by -> its column."""
BARS: Final = 12
SPREADS: Final[dict[str, tuple[str, Callable[[pa.Table], Any]]]] = {
    "score": ("of a response", lambda t: t["score"]),
    "KL": ("nats a response", lambda t: t["kl"]),
    "length": ("tokens", lambda t: t["num_tokens"]),
    "KL of a token": ("nats", lambda t: pc.list_flatten(t["token_kl"])),
    "entropy": ("nats a token", lambda t: pc.list_flatten(t["entropies"])),
    "advantage": ("of a token", lambda t: pc.list_flatten(t["advantages"])),
}
"""Quantity -> its unit, and its values in a table of samples."""


@dataclass(frozen=True)
class Selection:
    """Which responses, in which order.

    Example: ``Selection(by="kl", finish="length")``: those cut at the length limit, the largest KL first
    """

    by: str | None = None
    """One of ORDERS; None: as they were sampled."""
    lowest: bool = False
    """The lowest first, instead of the highest."""
    finish: str | None = None
    """Only those with this finish reason."""
    contains: str | None = None
    """Only those whose response contains this text; upper and lower case are the same."""

    def __post_init__(self) -> None:
        if self.by is not None and self.by not in ORDERS:
            raise UserError(f"--by {self.by} is not something to order by; choose {', '.join(ORDERS)}")
        if self.finish is not None and self.finish not in FINISH_REASONS:
            raise UserError(f"--finish {self.finish} is no finish reason; choose {', '.join(FINISH_REASONS)}")
        if self.lowest and self.by is None:
            raise UserError("--lowest needs --by: the lowest of what?")


def select_samples(tables: Iterable[pa.Table], selection: Selection) -> pa.Table:
    """The responses chosen, in order, with their ``change``.

    Args:
        tables: rows of :data:`rlhf_core.tables.SAMPLES`, an iteration each: what is not chosen is not kept.
        selection: which, in which order.
    """
    schema = SAMPLES.insert(SAMPLES.get_field_index("num_tokens") + 1, CHANGE)
    chosen = [_matching(_with_change(table, schema), selection) for table in tables]
    kept = pa.concat_tables([schema.empty_table(), *chosen])
    if selection.by is not None:
        order = "ascending" if selection.lowest else "descending"
        ties = [("iteration", "ascending"), ("sample_id", "ascending")]
        kept = kept.sort_by([(ORDERS[selection.by], order), *ties])
    return kept.combine_chunks()


def spread(samples: pa.Table) -> list[dict[str, Any]]:
    """Histograms of :data:`SPREADS`: rows of quantity, unit, low, high and count.

    BARS a quantity, or one a number where few whole numbers occur.
    """
    rows: list[dict[str, Any]] = []
    for quantity, (unit, values) in SPREADS.items():
        found = np.asarray(values(samples))
        is_count = found.dtype.kind == "i" and np.ptp(found) < BARS
        bins = np.arange(found.min(), found.max() + 2) if is_count else BARS
        counts, edges = np.histogram(found.astype(np.float64), bins=bins)
        rows += [
            {"quantity": quantity, "unit": unit, "low": low, "high": high, "count": count}
            for low, high, count in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
        ]
    return rows


def _with_change(table: pa.Table, schema: pa.Schema) -> pa.Table:
    tokens, num = explode(table), np.asarray(table["num_tokens"])
    log_ratio = np.abs(np.asarray(tokens["logprob"], np.float64) - np.asarray(tokens["ref_logprob"], np.float64))
    sums = np.bincount(np.repeat(np.arange(len(num)), num), weights=log_ratio, minlength=len(num))
    change = pa.array(sums / np.maximum(num, 1), pa.float32())
    return table.add_column(schema.get_field_index("change"), CHANGE, change)


def _matching(table: pa.Table, selection: Selection) -> pa.Table:
    if selection.finish is not None:
        table = table.filter(pc.equal(table["finish_reason"], selection.finish))
    if selection.contains is not None:
        table = table.filter(pc.match_substring(table["response_text"], selection.contains, ignore_case=True))
    return table
