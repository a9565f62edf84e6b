"""Stage 5: from scores and log-probs to rewards, advantages and returns. Arithmetic alone, no model."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from rlhf_core.contracts.batches import (
    Experience,
    ReferenceLogprobs,
    Rollouts,
    Scores,
    StageResult,
    check_aligned,
    check_as_long,
    some_rows,
)
from rlhf_core.contracts.config import KLConfig, ShapingConfig
from rlhf_core.contracts.errors import NumericalError
from rlhf_core.contracts.loop_state import ScoreMoments
from rlhf_core.ops.advantages import (
    gae,
    group_relative,
    leave_one_out,
    returns_to_go,
    reward_only,
    value_baseline,
)
from rlhf_core.ops.correlation import pearson
from rlhf_core.ops.kl import token_kl
from rlhf_core.ops.losses import explained_variance
from rlhf_core.ops.masking import last_real, masked_std, whiten
from rlhf_core.ops.rewards import normalize_scores, penalize_missing_eos, shaped_rewards, update_moments

_CAUSES = {
    "score_B": "a reward component; mend it",
    "score_normalized_B": "scores too large for their running mean and std; give their component a smaller weight",
    "score_shaped_B": "scores too large for float32; set shaping.score_clip",
    "kl_B": "a log-prob of -inf under the reference: another vocabulary or support; check reference.model",
    "rewards_BR": "β times the KL is too large for float32; begin again with a smaller kl.coef",
    "advantages_BR": "rewards or values too large for float32; set shaping.score_clip or a smaller kl.coef",
    "returns_BR": "rewards or values too large for float32; set shaping.score_clip or a smaller kl.coef",
    "rlhf_reward_B": "β times the KL is too large for float32; begin again with a smaller kl.coef",
}
"""What is checked, and why it may not be finite."""

ZERO_KL_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.5}
"""Nats a token, decoding against a teacher-forced pass: less than 1e-4 was seen in float32, 0.03 in bfloat16."""


def shape_rewards(
    rollouts: Rollouts,
    scores: Scores,
    reference: ReferenceLogprobs,
    config: ShapingConfig,
    kl_config: KLConfig,
    *,
    kl_coef: float,
    moments: ScoreMoments,
    zero_kl_in: str | None,
) -> StageResult[Experience]:
    """Shape rewards with the KL penalty and estimate advantages.

        R(x, y) = s(x, y) - β · Σ_t kl_t;    s = penalties(clip(normalise(raw score)))

    Args:
        rollouts: behaviour log-probs and values.
        scores: raw scores.
        reference: log π_ref.
        config: score pipeline, form of the reward, estimator, whitening.
        kl_config: estimator of the penalty.
        kl_coef: β of this iteration.
        moments: of all earlier scores.
        zero_kl_in: compute type in which the policy still is the reference, so that KL must be 0; None: it is not.
    Returns: the experience, its metrics, and the score moments after it.
    Raises: NumericalError if KL is not 0 where it must be, or a reward or advantage is not finite.
    Source: Ziegler et al. 2019; advantages by :mod:`rlhf_core.ops.advantages`.
    """
    check_aligned(rollouts.sample_ids, scores.sample_ids, reference.sample_ids)
    mask_BR = rollouts.response_mask_BR
    check_as_long(rollouts.sample_ids, mask_BR, ref_logprobs=reference.response_mask_BR)
    k1_BR, k3_BR, penalty_BR = (
        token_kl(rollouts.logprobs_BR, reference.ref_logprobs_BR, mask_BR, estimator=estimator)
        for estimator in ("k1", "k3", kl_config.estimator)
    )
    if zero_kl_in is not None:
        _check_zero(k1_BR, ZERO_KL_TOLERANCE[zero_kl_in])
    moments_now = _moments(moments, scores.score_B, config.score_normalization)
    normalized_B, clipped_B, shaped_B = _score_pipeline(scores.score_B, rollouts, config, moments_now)
    rewards_BR = shaped_rewards(shaped_B, penalty_BR, mask_BR, kl_coef=kl_coef, level=config.level)
    flat = False
    if config.whiten_rewards:
        given_BR = mask_BR if config.level == "token" else last_real(mask_BR)  # a response has one reward, or a token
        rewards_BR, flat = whiten(rewards_BR, given_BR, keep_mean=True)
    advantages_BR, returns_BR = _advantages(rewards_BR, rollouts, config)
    before_whitening = advantages_BR[mask_BR] if _one_a_token(config.estimator) else advantages_BR[:, 0]
    if config.whiten_advantages:
        advantages_BR, flat_advantages = _whiten_advantages(advantages_BR, mask_BR, config.estimator)
        flat = flat or flat_advantages
    experience = Experience(
        sample_ids=rollouts.sample_ids,
        score_B=scores.score_B,
        score_normalized_B=normalized_B,
        score_clipped_B=clipped_B,
        score_shaped_B=shaped_B,
        kl_B=k1_BR.sum(dim=1),
        k3_B=k3_BR.sum(dim=1),
        rlhf_reward_B=shaped_B - kl_coef * penalty_BR.sum(dim=1),
        token_kl_BR=k1_BR,
        rewards_BR=rewards_BR,
        advantages_BR=advantages_BR,
        returns_BR=returns_BR,
        response_mask_BR=mask_BR,
    )
    _check_finite(experience, kl_coef)
    metrics = _metrics(experience, rollouts, before_whitening, kl_coef, kl_config) | {"guard/flat_batch": float(flat)}
    metrics |= _spreads(scores)
    return StageResult(experience, metrics, state={"moments": asdict(moments_now)})


def _moments(moments: ScoreMoments, score_B: Tensor, normalization: str) -> ScoreMoments:
    if normalization == "running" or (normalization == "reference" and moments.count == 0):
        return update_moments(moments, score_B)
    return moments


def _score_pipeline(
    score_B: Tensor, rollouts: Rollouts, config: ShapingConfig, moments: ScoreMoments
) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised, clipped, shaped) scores."""
    normalized_B = score_B if config.score_normalization == "none" else normalize_scores(score_B, moments)
    clipped_B = normalized_B
    if config.score_clip is not None:
        clipped_B = normalized_B.clamp(-config.score_clip, config.score_clip)
    shaped_B = clipped_B
    if config.missing_eos_penalty is not None:
        ended_B = torch.tensor([reason != "length" for reason in rollouts.finish_reasons])
        shaped_B = penalize_missing_eos(
            shaped_B, ended_B, penalty=config.missing_eos_penalty, mode=config.missing_eos_mode
        )
    shaped_B = shaped_B - config.length_penalty * rollouts.response_mask_BR.sum(dim=1)
    return normalized_B, clipped_B, shaped_B


def _advantages(rewards_BR: Tensor, rollouts: Rollouts, config: ShapingConfig) -> tuple[Tensor, Tensor | None]:
    mask_BR, group_B = rollouts.response_mask_BR, rollouts.prompt_rows
    if config.estimator == "reward":
        return reward_only(rewards_BR, mask_BR), None
    if config.estimator == "rloo":
        return leave_one_out(rewards_BR, mask_BR, group_B), None
    if config.estimator == "group":
        return group_relative(rewards_BR, mask_BR, group_B, divide_by_std=config.group_std), None
    if config.estimator == "reinforce++":
        return returns_to_go(rewards_BR, mask_BR, gamma=config.gamma), None
    if rollouts.values_BR is None:
        raise ValueError(f"shaping.estimator {config.estimator} needs values, and the rollouts have none")
    if config.estimator == "value":
        return value_baseline(rewards_BR, rollouts.values_BR, mask_BR)
    return gae(rewards_BR, rollouts.values_BR, mask_BR, gamma=config.gamma, gae_lambda=config.gae_lambda)


def _one_a_token(estimator: str) -> bool:
    """Whether each token has an advantage of its own, or a response's tokens share one."""
    return estimator in ("gae", "reinforce++")


def _whiten_advantages(advantages_BR: Tensor, mask_BR: Tensor, estimator: str) -> tuple[Tensor, bool]:
    """Over real tokens where each has its own advantage, over responses where they share one."""
    if _one_a_token(estimator):
        return whiten(advantages_BR, mask_BR, keep_mean=False)
    whitened_B1, flat = whiten(advantages_BR[:, :1], mask_BR[:, :1], keep_mean=False)
    return torch.where(mask_BR, whitened_B1, 0.0), flat


def _check_zero(k1_BR: Tensor, tolerance: float) -> None:
    worst = float(k1_BR.abs().max())
    if worst > tolerance:  # a NaN is told by the next check
        raise NumericalError(
            f"KL must be 0 at iteration 0, where the policy is the reference, but a token differs by {worst:.3g} nats; "
            "likely cause: policy and reference are loaded in different dtypes, or the model's decoding with a cache "
            "disagrees with its full pass (position ids or attention mask of this architecture)"
        )


def _check_finite(experience: Experience, kl_coef: float) -> None:
    """In the order in which one comes from the other, so that the first to be wrong is named."""
    for name, cause in _CAUSES.items():
        value = getattr(experience, name)
        if value is not None and not bool(torch.isfinite(value).all()):
            bad_B = (~torch.isfinite(value)).reshape(len(value), -1).any(dim=1)
            raise NumericalError(
                f"{name[: name.rindex('_')]} is not finite in {some_rows(experience.sample_ids, bad_B)}, "
                f"with β = {kl_coef:g}; likely cause: {cause}; nothing of this stage is committed"
            )


def _metrics(
    experience: Experience, rollouts: Rollouts, advantages: Tensor, kl_coef: float, kl_config: KLConfig
) -> dict[str, float]:
    """Numbers for the tracker; ``advantages`` before whitening: one a token, or one a response where they share it."""
    mask_BR = experience.response_mask_BR
    metrics = {
        "objective/kl": float(experience.kl_B.mean()),
        "kl/k3": float(experience.k3_B.mean()),
        "kl/beta": kl_coef,
        "kl/target": kl_config.target,
        "objective/scores": float(experience.score_B.mean()),
        "objective/scores_std": float(experience.score_B.std(correction=0)),
        "objective/rlhf_reward": float(experience.rlhf_reward_B.mean()),
        "objective/non_score_reward": float((experience.rlhf_reward_B - experience.score_shaped_B).mean()),
        "rollout/score_length_corr": float(pearson(experience.score_B, mask_BR.sum(dim=1))),
        "advantages/mean": float(advantages.mean()),
        "advantages/std": float(advantages.std(correction=0)),
    }
    if rollouts.values_BR is not None and experience.returns_BR is not None:
        metrics["val/explained_variance"] = float(
            explained_variance(rollouts.values_BR[mask_BR], experience.returns_BR[mask_BR])
        )
    return metrics


def _spreads(scores: Scores) -> dict[str, float]:
    """Std of each component over the responses that it scored."""
    score_BC, mask_BC = scores.components_BC.double(), scores.components_mask_BC
    return {f"spread/{name}": float(masked_std(score_BC[:, i], mask_BC[:, i])) for i, name in enumerate(scores.names)}
