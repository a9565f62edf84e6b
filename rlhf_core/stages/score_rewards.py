"""Stage 3: the fixed reward models score each response."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf_core.contracts.batches import Prompts, Rollouts, Scores, StageResult
from rlhf_core.contracts.errors import NumericalError
from rlhf_core.contracts.reward_config import RewardConfig
from rlhf_core.models.reward_model import Conversation, RewardModel
from rlhf_core.ops.rewards import weighted_sum


def score_rewards(
    reward_models: Sequence[RewardModel], prompts: Prompts, rollouts: Rollouts, config: RewardConfig
) -> StageResult[Scores]:
    """Score every response with every component, and combine.

    Args:
        reward_models: one a component, in the order of the config; not changed.
        prompts: of this iteration.
        rollouts: the responses.
        config: names and weights.
    Returns: raw component scores and their weighted sum, with the mean of each.
    Raises: NumericalError if a score is not finite, naming component and samples.
    Source: Ziegler et al. 2019, section 2; the weighted sum is ours.
    """
    texts, ids = list(prompts.texts), list(rollouts.sample_ids)
    conversations = [
        Conversation(
            prompt_text=texts[row],
            response_text=text,
            messages=prompts.messages[row],
            policy_tokens=torch.cat([prompts.tokens_QP[row][prompts.mask_QP[row]], tokens[mask]]).tolist(),
        )
        for row, text, tokens, mask in zip(
            rollouts.prompt_rows.tolist(), rollouts.texts, rollouts.tokens_BR, rollouts.response_mask_BR, strict=True
        )
    ]
    components_BC = torch.stack([model.score(conversations) for model in reward_models], dim=1)
    for column, name in enumerate(config.names):
        bad = (~torch.isfinite(components_BC[:, column])).nonzero()[:, 0].tolist()
        if bad:
            shown = ", ".join(ids[row] for row in bad[:3]) + (" …" if len(bad) > 3 else "")
            raise NumericalError(
                f"reward component {name} gave {float(components_BC[bad[0], column])} for {len(bad)} of "
                f"{len(conversations)} samples ({shown}); a score must be finite: check the model's weights and dtype"
            )
    scores = Scores(
        sample_ids=rollouts.sample_ids,
        names=config.names,
        components_BC=components_BC,
        score_B=weighted_sum(components_BC, [c.weight for c in config.components]),
    )
    means = {f"reward/{name}": float(components_BC[:, i].mean()) for i, name in enumerate(config.names)}
    return StageResult(scores, means)
