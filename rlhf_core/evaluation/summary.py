"""From samples to what a person wants to know: how much better, at which KL, and how much of what could be had.

Q prompts, K samples of a policy and N of the reference a prompt. Intervals are over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from rlhf_core.contracts.batches import Prompts
from rlhf_core.evaluation.folder import FRONTIER, SIDE_BY_SIDE
from rlhf_core.evaluation.samples import Samples
from rlhf_core.ops.best_of_n import best_of_n_kl, best_of_n_score
from rlhf_core.ops.comparison import Interval, interval, win_rate
from rlhf_core.ops.diversity import distinct, repetition
from rlhf_core.ops.frontier import Tilt, attainable_score, frontier, halved_score, samples_for, tilt_at, trusted_kl

MIN_KL = 0.01
"""Nats below which next to nothing is attainable, and a share of it is no number."""


def description(samples: Samples, num_alike: int) -> dict[str, Any]:
    """What the responses of one policy are like.

    Args:
        samples: of the policy.
        num_alike: samples a prompt for distinct-n, which falls with their number: the same for all compared.
    Returns: numbers by name; those with an interval as {mean, low, high}.
    """
    few = samples.first(num_alike)
    return {
        "score": _interval(samples.score_QK.double().mean(dim=1)),
        "response_len": _interval(samples.len_QK.mean(dim=1)),
        "eos_rate": _interval(samples.eos_QK.mean(dim=1)),
        "entropy": _interval(samples.entropy_QK.double().mean(dim=1)),
        "distinct_1": distinct(few.tokens_BR, few.mask_BR, ngram=1),
        "distinct_2": distinct(few.tokens_BR, few.mask_BR, ngram=2),
        "repetition": repetition(few.tokens_BR, few.mask_BR),
    }


def comparison(samples: Samples, reference: Samples) -> dict[str, Any]:
    """A policy against the reference.

    Args:
        samples: of the policy.
        reference: of the reference, to the same prompts; as many as for the policy, or more.
    Returns: score, gain, KL, win rate, diversity, and the share of what is attainable at this KL: null with the
        reason in ``share_note`` where the samples cannot say.
    """
    mine_Q, its_Q = samples.score_QK.double().mean(dim=1), reference.score_QK.double().mean(dim=1)
    kl_Q = samples.kl_QK.double().mean(dim=1)
    numbers = description(samples, samples.num_samples) | {
        "gain": _interval(mine_Q - its_Q),
        "kl": _interval(kl_Q),
        "k3": _interval(samples.k3_QK.double().mean(dim=1)),
        "win_rate": _within_unit(interval(win_rate(samples.score_QK, reference.score_QK))),
    }
    note = _untold(float(kl_Q.mean()), reference)
    could_Q = attainable_score(reference.score_QK, kl_Q)
    if note is not None:
        return numbers | {"attainable_score": None, "share_of_attainable": None, "share_note": note}
    by_half = halved_score(reference.score_QK, float(kl_Q.mean())) - float(its_Q.mean())
    return numbers | {
        "attainable_score": _interval(could_Q),
        "share_of_attainable": _interval(mine_Q - its_Q, could_Q - its_Q),
        "share_by_half": float((mine_Q - its_Q).mean()) / by_half,
        "share_note": "",
    }


def best_of_n_rows(reference: Samples) -> list[dict[str, Any]]:
    """Best-of-n of the reference for n = 2, 4, 8, … up to a quarter of the samples: its score at its KL bound."""
    rows: list[dict[str, Any]] = []
    n = 2
    while n <= reference.num_samples // 4:
        rows.append({"n": n, "kl": best_of_n_kl(n), "score": _interval(best_of_n_score(reference.score_QK, n))})
        n *= 2
    return rows


def frontier_rows(reference: Samples) -> list[dict[str, Any]]:
    """What is attainable, as rows of FRONTIER."""
    limit = trusted_kl(reference.num_samples)

    def row(found: Tilt) -> dict[str, Any]:
        return {
            "beta": found.beta,
            "kl": found.kl,
            "score": found.score,
            "score_by_half": halved_score(reference.score_QK, found.kl),
            "ess": float(found.ess_Q.mean()),
            "trusted": found.kl <= limit * (1 + 1e-9),
        }

    return [row(found) for found in frontier(reference.score_QK)]


def frontier_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """As Arrow, schema FRONTIER."""
    return pa.Table.from_pylist([dict(row) for row in rows], schema=FRONTIER)


def side_by_side(policies: Mapping[str, Samples], reference: Samples, prompts: Prompts) -> pa.Table:
    """Each response beside the reference's of the same dice, schema SIDE_BY_SIDE; the last policy first."""
    tables: list[pa.Table] = []
    for name, samples in reversed(list(policies.items())):
        count, few = samples.num_samples, reference.first(samples.num_samples)
        order = torch.arange(len(samples.texts)).view(-1, count).T.flatten()  # each prompt once, then each again

        def texts(of: Samples, order: torch.Tensor = order) -> list[str]:
            return [of.texts[i] for i in order.tolist()]

        def numbers(of_QK: torch.Tensor) -> np.ndarray:
            return of_QK.T.flatten().numpy()

        columns: dict[str, Any] = {
            "policy": [name] * len(order),
            "prompt_id": np.tile(np.asarray(prompts.prompt_ids), count),
            "sample_index": np.repeat(np.arange(count), len(prompts.prompt_ids)),
            "prompt": list(prompts.texts) * count,
            "response": texts(samples),
            "ref_response": texts(few),
            "score": numbers(samples.score_QK),
            "ref_score": numbers(few.score_QK),
            "kl": numbers(samples.kl_QK),
            "k3": numbers(samples.k3_QK),
            "response_len": numbers(samples.len_QK.int()),
            "ref_response_len": numbers(few.len_QK.int()),
        }
        tables.append(pa.table({f.name: pa.array(columns[f.name], f.type) for f in SIDE_BY_SIDE}, schema=SIDE_BY_SIDE))
    return pa.concat_tables(tables).combine_chunks()


def metrics(numbers: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a policy by their MLflow names; what is not known is left out."""
    named = {
        "eval/score": "score",
        "eval/gain": "gain",
        "eval/kl": "kl",
        "eval/k3": "k3",
        "eval/win_rate": "win_rate",
        "eval/attainable_score": "attainable_score",
        "eval/share_of_attainable": "share_of_attainable",
        "eval/response_len": "response_len",
        "eval/eos_rate": "eos_rate",
        "eval/entropy": "entropy",
        "eval/distinct_1": "distinct_1",
        "eval/distinct_2": "distinct_2",
        "eval/repetition": "repetition",
    }
    found = {metric: numbers[name] for metric, name in named.items() if numbers[name] is not None}
    return {metric: value["mean"] if isinstance(value, dict) else value for metric, value in found.items()}


def _untold(kl: float, reference: Samples) -> str | None:
    """Why no share can be told at this KL; None if it can."""
    num_samples = reference.num_samples
    limit, reached = trusted_kl(num_samples), tilt_at(reference.score_QK, math.inf).kl
    if kl < MIN_KL:
        return f"the KL {kl:.3f} is too close to the reference for a share of anything"
    if reached == 0:
        return "all samples of the reference to a prompt score alike, so there is nothing to be had"
    if kl > limit < reached:  # where even the strongest tilt is trusted, the frontier is flat beyond it
        return (
            f"the KL {kl:.2f} is beyond the {limit:.2f} nats that {num_samples} samples a prompt can vouch for "
            f"(log n - log 10); raise --frontier-samples to {samples_for(kl)}"
        )
    return None


def _interval(value_Q: torch.Tensor, per_Q: torch.Tensor | None = None) -> dict[str, float]:
    return asdict(interval(value_Q, per_Q))


def _within_unit(found: Interval) -> dict[str, float]:
    return {"mean": found.mean, "low": max(0.0, found.low), "high": min(1.0, found.high)}
