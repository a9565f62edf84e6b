"""One iteration under other knobs: what moves, from the stored tables to those computed again."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch

from rlhf_core.contracts.config import RunConfig
from rlhf_core.models.actor_critic import new_optimizer
from rlhf_core.models.checkpoints import Trainer
from rlhf_core.ops.correlation import pearson

MOST: Final = 5
"""Samples that are named."""
_OF_RESPONSES: Final = (("score", "score"), ("score_shaped", "score after shaping"), ("rlhf_reward", "score - β·KL"))
_OF_TOKENS: Final = ("rewards", "advantages", "returns")
_OF_STEPS: Final = (
    "loss", "policy_loss", "value_loss", "approx_kl", "clip_fraction", "ratio_mean", "max_abs_log_ratio", "grad_norm",
    "learning_rate",
)  # fmt: skip
_UNUSED: Final = {"value_loss": "returns", "returns": "returns"}
"""Without a critic these are empty, or 0."""

Tables = Mapping[str, pa.Table]
"""Stage -> table."""


@dataclass(frozen=True)
class Quantity:
    """One number, as it was and as it would have been; None where there is none."""

    name: str
    stored: float | None
    what_if: float | None


@dataclass(frozen=True)
class Advantages:
    """How the advantages, which decide the direction of the update, go with the stored ones."""

    correlation: float
    """Pearson's, over response tokens."""
    sign_flips: int
    """Tokens that would be pushed the other way."""
    num_tokens: int
    most_changed: Sequence[Mapping[str, Any]]
    """Samples with the largest mean change of a token: sample_id, score and mean advantage, stored and what_if."""


@dataclass(frozen=True)
class WhatIf:
    """The answer to a question about one iteration."""

    run: str
    iteration: int
    changes: Sequence[str]
    """``ppo.clip_range: 0.2 -> 0.1``; of β, the one that was in force."""
    computed: Sequence[str]
    """Stages that were computed again."""
    skipped: Mapping[str, str]
    """Stage -> why it was not."""
    notes: Sequence[str]
    """What stays as the run had it, though the changes might have made another one of it."""
    quantities: Sequence[Quantity]
    advantages: Advantages
    sample: str | None = None
    tokens: Sequence[Mapping[str, Any]] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


def quantities_of(
    stored: Tables, what_if: Tables, *, kl_coef: tuple[float, float], next_kl_coef: tuple[float, float | None]
) -> list[Quantity]:
    """The numbers of an iteration, as they were and as they would have been.

    Args:
        stored: all stages.
        what_if: those that were computed again.
        kl_coef: β, then and now.
        next_kl_coef: β of the next iteration, then and now; None if the update was not computed.
    Returns: in the order in which one comes from the other; what does not move stands there too.
    """
    both = stored, {**stored, **what_if}
    found = [Quantity("β", *kl_coef)]
    shaped = [tables["shape_rewards"] for tables in both]
    for column, name in _OF_RESPONSES[:2]:
        found += _mean_and_std(name, [_flat(table, column) for table in shaped])
    found.append(Quantity("KL to the reference, nats", *(_mean(_flat(table, "kl")) for table in shaped)))
    penalties = [_flat(table, "score_shaped") - _flat(table, "rlhf_reward") for table in shaped]
    found += _mean_and_std("KL penalty (β·KL)", penalties)
    column, name = _OF_RESPONSES[2]
    found += _mean_and_std(name, [_flat(table, column) for table in shaped])
    for column in _OF_TOKENS:
        found += _mean_and_std(f"{column} of a token", [_flat(table, column) for table in shaped])
    has_critic = len(_flat(stored["shape_rewards"], "returns")) > 0
    updates = [tables["ppo_update"] for tables in both]
    for column in _OF_STEPS:
        if has_critic or column not in _UNUSED:
            then, now = (_mean(_taken(table, column)) for table in updates)
            found.append(Quantity(f"{column} of a step", then, now if "ppo_update" in what_if else None))
    found.append(Quantity("β of the next iteration", *next_kl_coef))
    return [quantity for quantity in found if quantity.stored is not None or quantity.what_if is not None]


def advantages_of(stored: Tables, what_if: Tables) -> Advantages:
    """How the advantages of an iteration move. Args as of :func:`quantities_of`."""
    then, now = stored["shape_rewards"], what_if.get("shape_rewards", stored["shape_rewards"])
    a, b = _flat(then, "advantages"), _flat(now, "advantages")
    lens = [len(row) for row in then["advantages"].to_pylist()]
    starts = np.concatenate([[0], np.cumsum(lens)])
    changes = [float(np.abs(b - a)[start:end].sum()) / max(end - start, 1) for start, end in itertools.pairwise(starts)]
    scores = [table["score"].to_pylist() for table in (then, now)]
    most = [row for row in sorted(range(len(changes)), key=lambda row: -changes[row])[:MOST] if changes[row] > 0]
    rows = [
        {
            "sample_id": then["sample_id"][row].as_py(),
            "score": {"stored": scores[0][row], "what_if": scores[1][row]},
            "advantage": {
                "stored": float(a[starts[row] : starts[row + 1]].mean()),
                "what_if": float(b[starts[row] : starts[row + 1]].mean()),
            },
        }
        for row in most
    ]
    return Advantages(
        correlation=float(pearson(torch.from_numpy(a), torch.from_numpy(b))),
        sign_flips=int((np.sign(a) != np.sign(b)).sum()),
        num_tokens=len(a),
        most_changed=rows,
    )


def with_optimizer_of(trainer: Trainer, config: RunConfig) -> Trainer:
    """The same weights and moments, moved by an optimizer of another config.

    AdamW divides a moment by 1 - beta^steps before it is used: under another beta, moments are scaled so that this
    gives what it gave in the run. (A beta1 of 0.999 in the place of 0.9 would make it 71 times as large after 8 steps.)

    Args:
        trainer: whose parameters are shared, not copied.
        config: its `ppo` section says betas, eps and weight decay.
    """
    optimizer = new_optimizer(trainer.actor_critic, config)
    optimizer.state.update(trainer.optimizer.state)
    then, now = (each.param_groups[0]["betas"] for each in (trainer.optimizer, optimizer))
    for state in optimizer.state.values():
        for name, before, after in zip(("exp_avg", "exp_avg_sq"), then, now, strict=True):
            if before != after:
                steps = float(state["step"])
                state[name] = state[name] * ((1.0 - after**steps) / (1.0 - before**steps))
    return Trainer(trainer.actor_critic, optimizer, trainer.iteration)


def _flat(table: pa.Table, column: str) -> np.ndarray:
    """All values of a column in float64, those of lists one after the other."""
    array: Any = table[column].combine_chunks()
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    array = array.flatten() if pa.types.is_list(array.type) else array
    return array.to_numpy(zero_copy_only=False).astype(np.float64)


def _taken(table: pa.Table, column: str) -> np.ndarray:
    """A column of those optimiser steps that were not skipped, as the run's metrics take them."""
    return _flat(table, column)[~table["skipped"].to_numpy()]


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _mean_and_std(name: str, both: Sequence[np.ndarray]) -> list[Quantity]:
    stds = [float(values.std()) if len(values) else None for values in both]
    return [Quantity(f"{name}, mean", *map(_mean, both)), Quantity(f"{name}, std", *stds)]
