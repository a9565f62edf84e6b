"""What the values of an artifact must be, beyond its schema: checked before a commit, and after a reader's digest.

A digest tells that a file is the one that was written; it does not tell that what was written makes sense. So every
float is finite, every list of a response has one entry a token, no id stands twice, and no log-prob is above 0.
The one exception: an optimiser step that was skipped is recorded with the numbers it was skipped for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

import numpy as np
import pyarrow as pa

FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
ROUNDING: Final = 1e-3
"""Nats by which rounding may push a log-prob above 0, or an entropy or k3 below."""
LEAST_LOGPROB: Final = -1e6
"""Nats: far below what any temperature of use gives; beyond it a logit has overflowed."""
SHOWN: Final = 3

_LOGPROB = (LEAST_LOGPROB, ROUNDING)
_NOT_NEGATIVE = (0.0, FLOAT32_MAX)
_ROUNDED = (-ROUNDING, FLOAT32_MAX)
_SHARE = (0.0, 1.0)
_COUNT = (1.0, FLOAT32_MAX)


@dataclass(frozen=True)
class _Rules:
    """What a stage's columns must hold. Every float is finite without being named here."""

    key: str
    """The column that names a row; no two rows are named alike."""
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    """Column -> least and largest value."""
    filled: tuple[str, ...] = ()
    """Lists with at least one entry."""
    as_long: tuple[str, ...] = ()
    """Lists as long as the first of ``filled``."""
    as_long_or_none: tuple[str, ...] = ()
    """Likewise, or empty in every row."""


RULES: Final[Mapping[str, _Rules]] = {
    "sample_prompts": _Rules(
        "prompt_id",
        {"prompt_id": _NOT_NEGATIVE, "prompt_tokens": _NOT_NEGATIVE, "num_truncated": _NOT_NEGATIVE},
        filled=("prompt_tokens",),
    ),
    "generate": _Rules(
        "sample_id",
        {
            "prompt_id": _NOT_NEGATIVE,
            "sample_index": _NOT_NEGATIVE,
            "response_tokens": _NOT_NEGATIVE,
            "logprobs": _LOGPROB,
            "entropies": _ROUNDED,
            "support_tokens": _NOT_NEGATIVE,
            "support_lens": _COUNT,
        },
        filled=("response_tokens",),
        as_long=("logprobs", "entropies"),
        as_long_or_none=("values", "support_lens"),
    ),
    "score_rewards": _Rules("sample_id", filled=("components",)),
    "reference_logprobs": _Rules("sample_id", {"ref_logprobs": _LOGPROB}, filled=("ref_logprobs",)),
    "shape_rewards": _Rules(
        "sample_id",
        {"k3": _ROUNDED},
        filled=("token_kl",),
        as_long=("rewards", "advantages"),
        as_long_or_none=("returns",),
    ),
    "ppo_update": _Rules(
        "step",
        {
            "step": _NOT_NEGATIVE,
            "epoch": _NOT_NEGATIVE,
            "minibatch": _NOT_NEGATIVE,
            "num_samples": _COUNT,
            "num_tokens": _COUNT,
            "ref_k3": _ROUNDED,
            "approx_kl": _ROUNDED,
            "clip_fraction": _SHARE,
            "value_clip_fraction": _SHARE,
            "ratio_mean": _NOT_NEGATIVE,
            "max_abs_log_ratio": _NOT_NEGATIVE,
            "grad_norm": _NOT_NEGATIVE,
            "critic_grad_norm": _NOT_NEGATIVE,
            "learning_rate": _NOT_NEGATIVE,
        },
    ),
}


def wrong_values(table: pa.Table, stage: str) -> str | None:
    """What is wrong with the values of a table that has the stage's schema.

    Args:
        table: without nulls.
        stage: its name.
    Returns: the first problem, with column and rows, as the end of a sentence ("... holds"); None if all is well.

    >>> table = pa.table({"sample_id": ["a", "b"], "ref_logprobs": [[-1.0], [float("nan")]]})
    >>> wrong_values(table, "reference_logprobs")
    'nan in the column ref_logprobs of 1 of 2 rows (sample_id b)'
    """
    rules = RULES[stage]
    table = table.combine_chunks()
    return _wrong_names(table, rules) or _wrong_lengths(table, rules) or _wrong_numbers(table, rules)


def not_finite(numbers: Mapping[str, float]) -> list[str]:
    """Each NaN or infinity with its name: ``nan as the metric objective/kl``."""
    return [f"{value} as the metric {name}" for name, value in numbers.items() if not math.isfinite(value)]


def _wrong_names(table: pa.Table, rules: _Rules) -> str | None:
    names = table[rules.key]
    if rules.key == "sample_id" and (nameless := cast("list[str]", names.to_pylist()).count("")):
        return f"no sample_id in {nameless} of {table.num_rows} rows"
    if rules.key == "step" and names.to_pylist() != list(range(table.num_rows)):
        return "steps that are not 0, 1, 2, ... in this order"
    if len(names.unique()) < table.num_rows:
        listed = cast("list[Any]", names.to_pylist())
        twice = sorted({name for name in listed if listed.count(name) > 1})
        return f"{len(twice)} {rules.key}s more than once ({_some(twice)})"
    return None


def _wrong_lengths(table: pa.Table, rules: _Rules) -> str | None:
    def lens(name: str) -> np.ndarray:
        return _lens(table[name].combine_chunks())

    for name in rules.filled:
        if (bad := lens(name) == 0).any():
            return f"an empty list in the column {name} of {_rows(table, rules, bad)}"
    for name in (*rules.as_long, *rules.as_long_or_none):
        expected = lens(rules.filled[0])
        if name in rules.as_long_or_none and not lens(name).any():
            continue
        if (bad := lens(name) != expected).any():
            return f"lists of another length than {rules.filled[0]} in the column {name} of {_rows(table, rules, bad)}"
    if "support_lens" in rules.as_long_or_none:
        kept = table["support_lens"].combine_chunks()
        sums = np.bincount(_row_of(kept), weights=_flat(kept), minlength=table.num_rows)
        if (bad := sums != lens("support_tokens")).any():
            return f"another number of support_tokens than support_lens adds up to in {_rows(table, rules, bad)}"
    return None


def _wrong_numbers(table: pa.Table, rules: _Rules) -> str | None:
    taken = np.ones(table.num_rows, dtype=bool)
    if "skipped" in table.column_names:
        taken = ~np.asarray(table["skipped"].to_numpy(), dtype=bool)
    for name in table.column_names:
        for label, values, rows in _numbers(name, cast("pa.Array", table[name].combine_chunks())):
            low, high = rules.ranges.get(name, (-FLOAT32_MAX, FLOAT32_MAX))
            good = (values >= low) & (values <= high)  # False for NaN
            if good.all():
                continue
            wrong = ~good
            row_of = np.arange(table.num_rows) if rows is None else _row_of(rows)
            if values.dtype.kind == "f":
                wrong &= taken[row_of]
            if wrong.any():
                bad = np.zeros(table.num_rows, dtype=bool)
                bad[row_of[wrong]] = True
                return f"{values[wrong][0]:g} in the column {label} of {_rows(table, rules, bad)}"
    return None


def _numbers(name: str, array: pa.Array) -> Iterator[tuple[str, np.ndarray, pa.Array | None]]:
    """(name, numbers, the list array that holds them) for each column of numbers, and each within it."""
    kind = array.type
    if pa.types.is_floating(kind) or pa.types.is_integer(kind):
        yield name, cast("np.ndarray", array.to_numpy()), None
    elif pa.types.is_list(kind):
        inner = cast("Any", array).flatten()
        parts = [(name, inner)]
        if pa.types.is_struct(inner.type):
            parts = [(f"{name}.{f.name}", c) for f, c in zip(inner.type, inner.flatten(), strict=True)]
        for label, part in parts:
            for _, values, _ in _numbers(label, part):
                yield label, values, array


def _flat(lists: Any) -> np.ndarray:
    return cast("np.ndarray", lists.flatten().to_numpy())


def _row_of(lists: Any) -> np.ndarray:
    """The row of each entry of a list column."""
    return np.repeat(np.arange(len(lists)), _lens(lists))


def _lens(lists: Any) -> np.ndarray:
    return cast("np.ndarray", lists.value_lengths().to_numpy())


def _rows(table: pa.Table, rules: _Rules, bad: np.ndarray) -> str:
    named = cast("list[Any]", table[rules.key].filter(pa.array(bad)).to_pylist())
    return f"{len(named)} of {table.num_rows} rows ({rules.key} {_some(named)})"


def _some(names: list[Any]) -> str:
    return ", ".join(map(str, names[:SHOWN])) + (" …" if len(names) > SHOWN else "")
