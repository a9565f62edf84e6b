"""Stage 3: the reward components score each response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from rlhf_core.batch_metrics import score_metrics
from rlhf_core.contracts.batches import Prompts, Rollouts, Scores, StageResult
from rlhf_core.contracts.errors import NumericalError
from rlhf_core.contracts.reward_config import RewardConfig
from rlhf_core.models.reward_text import Conversation
from rlhf_core.ops.rewards import combined_score
from rlhf_core.rewards.policies import settle, some_of
from rlhf_core.rewards.scoring import Component, Failure, score_all


def score_rewards(
    components: Sequence[Component], prompts: Prompts, rollouts: Rollouts, config: RewardConfig
) -> StageResult[Scores]:
    """Score every response with every component, and combine.

    Args:
        components: as the config lists them; not changed.
        prompts: of this iteration.
        rollouts: the responses.
        config: names, weights, what happens where a component fails, and how they combine.
    Returns: raw component scores and what they make together, with the mean and the failures of each.
    Raises: NumericalError if a component whose policy is ``fail`` has no finite score, if no component is left of a
        response, or if the combination overflows; each names component or samples.
    Source: Ziegler et al. 2019, section 2; ensembles: Coste et al. 2023.
    """
    ids = list(rollouts.sample_ids)
    outcomes = score_all(components, _conversations(prompts, rollouts))
    settled = [
        settle(name, section, found, ids)
        for name, section, found in zip(config.names, config.components, outcomes, strict=True)
    ]
    components_BC = torch.stack([values_B for values_B, _ in settled], dim=1)
    mask_BC = torch.stack([mask_B for _, mask_B in settled], dim=1)
    _refuse(~mask_BC.any(dim=1), ids, "every reward component has failed and is dropped")
    score_B = combined_score(
        components_BC,
        mask_BC,
        [c.weight for c in config.components],
        combine=config.combine,
        std_coef=config.std_coef,
    )
    _refuse(~torch.isfinite(score_B), ids, "the weights of reward.components are too large: the score is not finite")
    scores = Scores(rollouts.sample_ids, config.names, components_BC, mask_BC, score_B)
    failed = {
        name: sum(isinstance(o, Failure) for o in found) for name, found in zip(config.names, outcomes, strict=True)
    }
    return StageResult(scores, score_metrics(scores, failed))


def _conversations(prompts: Prompts, rollouts: Rollouts) -> list[Conversation]:
    prompt_rows = cast("list[int]", rollouts.prompt_rows.tolist())
    rows = zip(
        prompt_rows,
        rollouts.texts,
        rollouts.tokens_BR,
        rollouts.response_mask_BR,
        rollouts.finish_reasons,
        strict=True,
    )
    return [
        Conversation(
            prompt_text=prompts.texts[row],
            response_text=text,
            messages=prompts.messages[row],
            policy_tokens=torch.cat([prompts.tokens_QP[row][prompts.mask_QP[row]], tokens[mask]]).tolist(),
            num_prompt_tokens=int(prompts.mask_QP[row].sum()),
            columns=prompts.columns[row],
            finish_reason=reason,
        )
        for row, text, tokens, mask, reason in rows
    ]


def _refuse(bad_B: torch.Tensor, ids: Sequence[str], problem: str) -> None:
    """Raise NumericalError naming the samples, if there are any."""
    bad = [sample for sample, is_bad in zip(ids, bad_B.tolist(), strict=True) if is_bad]
    if bad:
        raise NumericalError(f"{problem} for {len(bad)} of {len(ids)} samples ({some_of(bad)})")
