"""What an update reads, on the device that computes it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf_core.contracts.batches import Experience, Prompts, Rollouts, check_aligned, check_as_long
from rlhf_core.models.sequences import Sequences


@dataclass(frozen=True)
class UpdateBatch:
    """Everything an optimiser step reads, on the device."""

    sequences: Sequences
    old_logprobs_BR: Tensor
    ref_logprobs_BR: Tensor
    advantages_BR: Tensor
    old_values_BR: Tensor | None
    returns_BR: Tensor | None
    weights: Tensor | None = None
    """[B, R] or [B], as the ratio's level is: of samples that another policy has drawn."""

    def rows(self, index: Tensor) -> UpdateBatch:
        """Some of its rows, as wide as their longest response."""
        sequences = self.sequences.rows(index)
        width = sequences.response_mask_BR.shape[1]

        def cut(tensor_BR: Tensor) -> Tensor:
            return tensor_BR[index, :width]

        return UpdateBatch(
            sequences,
            cut(self.old_logprobs_BR),
            cut(self.ref_logprobs_BR),
            cut(self.advantages_BR),
            None if self.old_values_BR is None else cut(self.old_values_BR),
            None if self.returns_BR is None else cut(self.returns_BR),
            None
            if self.weights is None
            else self.weights[index][..., :width]
            if self.weights.dim() > 1
            else self.weights[index],
        )

    def without_tokens(self) -> UpdateBatch:
        """Its first row as one that nothing is learned from: for a rank that has no row, but takes part."""
        row = self.rows(torch.zeros(1, dtype=torch.int64))
        mask_BR = torch.zeros_like(row.sequences.response_mask_BR)
        return replace(row, sequences=replace(row.sequences, response_mask_BR=mask_BR, supports=None))

    @classmethod
    def build(cls, prompts: Prompts, rollouts: Rollouts, experience: Experience, device: torch.device) -> UpdateBatch:
        """From the artifacts of an iteration. Raises IntegrityError if they hold other samples or lengths."""
        check_aligned(rollouts.sample_ids, experience.sample_ids)
        check_as_long(rollouts.sample_ids, rollouts.response_mask_BR, advantages=experience.response_mask_BR)
        return cls(
            Sequences.build(prompts, rollouts).to(device),
            rollouts.logprobs_BR.to(device),
            (rollouts.logprobs_BR - experience.token_kl_BR).to(device),
            experience.advantages_BR.to(device),
            None if rollouts.values_BR is None else rollouts.values_BR.to(device),
            None if experience.returns_BR is None else experience.returns_BR.to(device),
        )
