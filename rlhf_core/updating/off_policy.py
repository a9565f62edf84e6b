"""Samples that another policy has drawn: one that is some updates older, or another engine's."""

from __future__ import annotations

from dataclasses import replace

import torch

from rlhf_core.batch_metrics import sampler_metrics
from rlhf_core.contracts.config import PPOConfig
from rlhf_core.models.checkpoints import Trainer
from rlhf_core.ops.losses import importance_weights
from rlhf_core.updating.batch import UpdateBatch


def relative_to_now(
    trainer: Trainer, batch: UpdateBatch, config: PPOConfig, temperature: float, cap: float
) -> tuple[UpdateBatch, dict[str, float]]:
    """A batch that another policy has drawn, with the log-probs and weights of the policy that is about to move."""
    rows, mask_BR = len(batch.sequences), batch.sequences.response_mask_BR
    now_BR = torch.zeros_like(batch.old_logprobs_BR)
    with torch.no_grad():
        for index in trainer.ranks.passes(rows, config.micro_batch_size or -(-rows // config.num_minibatches)):
            part = batch.rows(index) if len(index) else batch.without_tokens()
            logprobs_BR = trainer.actor_critic.evaluate(part.sequences, temperature).logprobs_BR
            if len(index):
                now_BR[index[:, None], torch.arange(logprobs_BR.shape[1])] = logprobs_BR
        now_BR = trainer.ranks.filled(now_BR)
    weights = importance_weights(now_BR, batch.old_logprobs_BR, mask_BR, level=config.level, cap=cap)
    metrics = sampler_metrics(now_BR, batch.old_logprobs_BR, mask_BR, weights, cap=cap)
    is_off = metrics["sampler/logprob_gap_avg"] > config.importance_threshold
    return replace(batch, old_logprobs_BR=now_BR, weights=weights if is_off else None), metrics
