"""Stage 4: what the frozen reference thinks of each response token."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_core.contracts.batches import Prompts, ReferenceLogprobs, Rollouts, StageResult, some_rows
from rlhf_core.contracts.errors import NumericalError
from rlhf_core.contracts.policy_config import ReferenceConfig
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.sequences import Sequences, by_length


@torch.no_grad()
def reference_logprobs(
    reference: LanguageModel,
    prompts: Prompts,
    rollouts: Rollouts,
    config: ReferenceConfig,
    *,
    temperature: float,
) -> StageResult[ReferenceLogprobs]:
    """Log-probs log π_ref of every response token, at the temperature and on the support it was sampled from.

    Args:
        reference: π_ref, frozen.
        prompts: of this iteration.
        rollouts: the responses.
        config: rows read at a time.
        temperature: the one that generated.
    Returns: log-probs aligned with the response tokens.
    Raises: NumericalError naming the samples if a log-prob is not finite.
    Source: definition; logits exist only for a chunk of response positions at a time.
    """
    sequences = Sequences.build(prompts, rollouts)
    ref_logprobs_BR = torch.zeros_like(rollouts.logprobs_BR)
    for index in by_length(sequences.lens_B, config.batch_size):
        part = sequences.rows(index).to(reference.device)
        hidden_ND = reference.hidden_states(part.read, part.before_response_N)
        logprobs_N, _ = reference.response_logprobs(part, hidden_ND, temperature)
        part_logprobs_BR = part.scatter(logprobs_N).cpu()
        ref_logprobs_BR[index, : part_logprobs_BR.shape[1]] = part_logprobs_BR
    _check_finite(ref_logprobs_BR, rollouts)
    return StageResult(ReferenceLogprobs(rollouts.sample_ids, ref_logprobs_BR, rollouts.response_mask_BR), metrics={})


def _check_finite(ref_logprobs_BR: Tensor, rollouts: Rollouts) -> None:
    bad_B = (~torch.isfinite(ref_logprobs_BR) & rollouts.response_mask_BR).any(dim=1)
    if bool(bad_B.any()):
        raise NumericalError(
            f"log π_ref is not finite in {some_rows(rollouts.sample_ids, bad_B)}: the reference's weights "
            "are broken, generation.temperature is too small, or a token is outside the support it was sampled from; "
            "nothing of this stage is committed: check reference.model (policy.model where that is not set) and resume"
        )
