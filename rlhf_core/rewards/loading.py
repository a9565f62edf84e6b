"""From a component's section of the config to what scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf_core.contracts.config_io import digest_json
from rlhf_core.contracts.reward_config import ComponentReward, FunctionReward, HttpReward
from rlhf_core.models.frozen import FrozenModels
from rlhf_core.models.reward_model import RewardModel, chat_template_text
from rlhf_core.rewards.function import function_digest, load_function
from rlhf_core.rewards.http import load_http
from rlhf_core.rewards.scoring import Component


def load_component(
    config: ComponentReward,
    *,
    field: str,
    columns: Sequence[str],
    policy_vocabulary: str,
    device: torch.device,
    frozen: FrozenModels | None = None,
    date: str | None = None,
) -> Component:
    """Make one component ready to score.

    Args:
        config: its section.
        field: its place in the config, for messages.
        columns: ``prompts.columns``.
        policy_vocabulary: digest of the policy's vocabulary.
        device: where a model lives.
        frozen: models that are in memory already.
        date: ``prompts.template_date``, for chat templates that read the clock.
    Raises: UserError naming ``field`` if the model, function or address is not there or does not fit.
    """
    if isinstance(config, FunctionReward):
        return load_function(config, field=field, columns=columns)
    if isinstance(config, HttpReward):
        return load_http(config, field=field)
    return RewardModel.load(
        config, field=field, policy_vocabulary=policy_vocabulary, device=device, frozen=frozen, date=date
    )


def component_digest(config: ComponentReward) -> str | dict[str, str]:
    """Identity of what decides a component's scores beside its section and its model's files."""
    if isinstance(config, FunctionReward):
        return function_digest(config)
    if isinstance(config, HttpReward):
        return config.url
    return digest_json(config.chat_template and chat_template_text(config.chat_template, field="chat_template"))
