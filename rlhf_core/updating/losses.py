"""The losses of one micro-batch: its share of an optimiser step, and the numbers that are recorded of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from rlhf_core.contracts.config import PPOConfig
from rlhf_core.models.actor_critic import ActorCritic
from rlhf_core.models.critic import Critic
from rlhf_core.ops.kl import token_kl
from rlhf_core.ops.losses import aggregate, approx_kl, clipped_surrogate, clipped_value_loss, log_ratio
from rlhf_core.ops.masking import masked_sum
from rlhf_core.updating.batch import UpdateBatch


@dataclass(frozen=True)
class Step:
    """What the micro-batches of one optimiser step share."""

    config: PPOConfig
    temperature: float
    max_response_len: int
    num_samples: int
    num_tokens: int
    warming_up: bool
    """Whether the critic learns alone."""


def policy_loss(actor_critic: ActorCritic, batch: UpdateBatch, step: Step) -> tuple[Tensor, dict[str, float], Tensor]:
    """The policy's part of the loss, without gradient while the critic warms up.

        L_clip, with the entropy bonus and the KL term where the config has them

    Returns: (the micro-batch's share of the step's loss, its statistics, the trunk's output before each token).
    """
    config, mask_BR = step.config, batch.sequences.response_mask_BR
    with torch.set_grad_enabled(not step.warming_up):
        now = actor_critic.evaluate(batch.sequences, step.temperature)
    ratios = log_ratio(now.logprobs_BR, batch.old_logprobs_BR, mask_BR, level=config.level)
    by_token = config.level == "token"
    mask = mask_BR if by_token else torch.ones_like(ratios, dtype=torch.bool)
    count = step.num_tokens if by_token else step.num_samples
    surrogate, is_clipped = clipped_surrogate(
        ratios,
        batch.advantages_BR if by_token else batch.advantages_BR[:, 0],
        clip_range=config.clip_range,
        clip_range_high=config.clip_range_high or config.clip_range,
        dual_clip=config.dual_clip,
    )
    if batch.weights is not None:
        surrogate = batch.weights * surrogate
    clip_loss = _mean(surrogate, mask_BR, step) if by_token else surrogate.sum() / step.num_samples
    loss = clip_loss
    if config.entropy_coef:
        loss = loss - config.entropy_coef * _mean(now.entropies_BR, mask_BR, step)
    if config.kl_loss_coef:
        kl_BR = token_kl(now.logprobs_BR, batch.ref_logprobs_BR, mask_BR, estimator=config.kl_loss_estimator)
        loss = loss + config.kl_loss_coef * _mean(kl_BR, mask_BR, step)
    with torch.no_grad():
        worst = torch.where(mask_BR, now.logprobs_BR - batch.old_logprobs_BR, 0.0).abs().max()
        by_token_BR = log_ratio(now.logprobs_BR, batch.old_logprobs_BR, mask_BR, level="token")
        k3_BR = token_kl(now.logprobs_BR, batch.ref_logprobs_BR, mask_BR, estimator="k3")
        statistics = {
            "loss": torch.zeros_like(loss) if step.warming_up else loss,
            "policy_loss": clip_loss,
            "entropy": masked_sum(now.entropies_BR, mask_BR) / step.num_tokens,
            "ref_k3": masked_sum(k3_BR, mask_BR) / step.num_tokens,
            "approx_kl": masked_sum(approx_kl(by_token_BR), mask_BR) / step.num_tokens,
            "clip_fraction": (is_clipped & mask).sum() / count,
            "ratio_mean": masked_sum(ratios.exp(), mask) / count,
            "max_abs_log_ratio": worst,
        }
    return loss, _numbers(statistics), now.hidden_ND


def value_loss(
    critic: Critic, batch: UpdateBatch, hidden_ND: Tensor | None, step: Step
) -> tuple[Tensor, dict[str, float]]:
    """The critic's part of the loss: c_v · L_value.

    Args:
        critic: that is asked again.
        batch: with the values of the behaviour policy's critic, and the returns.
        hidden_ND: the trunk's output before each response token; None: the critic has a trunk of its own.
        step: that the micro-batch is part of.
    Returns: (this micro-batch's share of the step's loss, its statistics).
    """
    assert batch.old_values_BR is not None, "a critic has said what it expects"
    assert batch.returns_BR is not None, "a critic learns from returns"
    mask_BR = batch.sequences.response_mask_BR
    values_BR = batch.sequences.scatter(critic.values(batch.sequences, hidden_ND))
    errors_BR, is_clipped_BR = clipped_value_loss(
        values_BR, batch.old_values_BR, batch.returns_BR, value_clip_range=step.config.value_clip_range
    )
    loss = masked_sum(errors_BR, mask_BR) / step.num_tokens
    with torch.no_grad():
        clipped = (is_clipped_BR & mask_BR).sum() / step.num_tokens
    return step.config.vf_coef * loss, _numbers({"value_loss": loss, "value_clip_fraction": clipped})


def _mean(values_BR: Tensor, mask_BR: Tensor, step: Step) -> Tensor:
    """This micro-batch's share of a mean over the step, as the config aggregates losses."""
    return aggregate(
        values_BR,
        mask_BR,
        aggregation=step.config.loss_aggregation,
        num_tokens=step.num_tokens,
        num_samples=step.num_samples,
        max_response_len=step.max_response_len,
    )


def _numbers(statistics: dict[str, Tensor]) -> dict[str, float]:
    """Scalars on the device, fetched in one go."""
    values = cast("list[float]", torch.stack([value.detach().float() for value in statistics.values()]).tolist())
    return dict(zip(statistics, values, strict=True))
