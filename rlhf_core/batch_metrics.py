"""Numbers for the tracker that are taken from a whole batch, however many shards it was computed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf_core.contracts.batches import Rollouts, Scores
from rlhf_core.ops.diversity import distinct, repetition
from rlhf_core.ops.masking import masked_mean


def rollout_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Lengths, ends, entropies and repetition of the responses."""
    mask_BR = rollouts.response_mask_BR
    reasons, rows = list(rollouts.finish_reasons), len(rollouts.finish_reasons)
    return {
        "rollout/response_len": float(mask_BR.sum(dim=1).float().mean()),
        "rollout/num_tokens": float(mask_BR.sum()),
        "rollout/eos_rate": reasons.count("eos") / rows,
        "rollout/stop_rate": reasons.count("stop") / rows,
        "rollout/truncated_rate": reasons.count("length") / rows,
        "rollout/repetition": repetition(rollouts.tokens_BR, mask_BR),
        "rollout/distinct_2": distinct(rollouts.tokens_BR, mask_BR, ngram=2),
        "objective/entropy": float(rollouts.entropies_BR.sum(dim=1).mean()),
        "policy/entropy_avg": float(masked_mean(rollouts.entropies_BR, mask_BR)),
    }


def score_metrics(scores: Scores, failed: Mapping[str, float]) -> dict[str, float]:
    """Mean and failures of each reward component.

    Args:
        scores: of the batch.
        failed: component -> responses that it could not score.
    """
    metrics: dict[str, float] = {}
    for column, name in enumerate(scores.names):
        kept_B = scores.components_mask_BC[:, column]
        if bool(kept_B.any()):
            metrics[f"reward/{name}"] = float(scores.components_BC[kept_B, column].mean())
        metrics[f"reward/{name}_failed"] = float(failed[name])
    return metrics


def failures(names: Sequence[str], metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Component -> responses it could not score, over the metrics of all shards."""
    return {name: sum(of_shard[f"reward/{name}_failed"] for of_shard in metrics) for name in names}
