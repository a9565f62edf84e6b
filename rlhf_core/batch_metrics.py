"""Numbers for the tracker that are taken from a whole batch, however many shards it was computed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from rlhf_core.contracts.batches import Rollouts, Scores
from rlhf_core.ops.diversity import distinct, repetition
from rlhf_core.ops.masking import masked_mean

Record = dict[str, float | int | bool]
"""Of an optimiser step."""


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


def sampler_metrics(
    logprobs_BR: Tensor, sampler_logprobs_BR: Tensor, mask_BR: Tensor, weights: Tensor, *, cap: float
) -> dict[str, float]:
    """How far who has drawn the tokens is from the policy that learns from them.

    Args:
        logprobs_BR: of the policy.
        sampler_logprobs_BR: of who has drawn.
        mask_BR: True = generated token.
        weights: importance weights, [B, R] or [B].
        cap: of a weight.
    """
    gap_BR = (logprobs_BR - sampler_logprobs_BR).abs()
    counted = weights[mask_BR] if weights.dim() > 1 else weights
    return {
        "sampler/logprob_gap_avg": float(masked_mean(gap_BR, mask_BR)),
        "sampler/logprob_gap_max": float(gap_BR[mask_BR].max()),
        "sampler/weight_avg": float(counted.mean()),
        "sampler/capped_fraction": float((counted >= cap).float().mean()),
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


def epoch_kl(steps: Sequence[Record], epoch: int) -> float:
    """Mean approximate KL to the behaviour policy over an epoch's tokens, nats a token at either level."""
    mine = [step for step in steps if step["epoch"] == epoch and not step["skipped"]]
    num_tokens = sum(step["num_tokens"] for step in mine)
    return sum(step["approx_kl"] * step["num_tokens"] for step in mine) / max(num_tokens, 1)


def update_metrics(steps: Sequence[Record], *, planned: int) -> dict[str, float]:
    """Means over an update's optimiser steps.

    Args:
        steps: one record each, at least one.
        planned: how many there were to be.
    """
    taken = [step for step in steps if not step["skipped"]]  # a skipped one has numbers that are not finite

    def mean(name: str) -> float:
        return sum(float(step[name]) for step in taken) / max(len(taken), 1)

    return {
        "loss/policy_avg": mean("policy_loss"),
        "loss/value_avg": mean("value_loss"),
        "loss/k3_avg": mean("ref_k3"),
        "policy/approxkl_avg": mean("approx_kl"),
        "policy/clipfrac_avg": mean("clip_fraction"),
        "val/clipfrac_avg": mean("value_clip_fraction"),
        "val/ratio": mean("ratio_mean"),
        "policy/grad_norm": mean("grad_norm"),
        "policy/last_approxkl": float(taken[-1]["approx_kl"]) if taken else 0.0,
        "lr": float(steps[-1]["learning_rate"]),
        "guard/skipped_steps": float(sum(bool(step["skipped"]) for step in steps)),
        "guard/first_max_abs_log_ratio": float(steps[0]["max_abs_log_ratio"]),
        "update/num_steps": float(len(steps)),
        "update/early_stopped": float(len(steps) < planned),
    }
