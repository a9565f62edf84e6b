"""From a component's section of the config to what scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from rlhf_core.contracts.config_io import digest_json
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import ComponentReward, FunctionReward, HttpReward, ModelReward
from rlhf_core.models.frozen import FrozenModels
from rlhf_core.models.reward_model import RewardModel
from rlhf_core.models.reward_text import Conversation, chat_template_text, text_with_special_tokens
from rlhf_core.models.tokenizers import VocabularyDigest
from rlhf_core.rewards.function import function_digest, load_function
from rlhf_core.rewards.http import load_http
from rlhf_core.rewards.scoring import Component

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_component(
    config: ComponentReward,
    *,
    field: str,
    columns: Sequence[str],
    policy_vocabulary: str,
    device: torch.device,
    frozen: FrozenModels | None = None,
    template_date: str | None = None,
) -> Component:
    """Make one component ready to score.

    Args:
        config: its section.
        field: its place in the config, for messages.
        columns: ``prompts.columns``.
        policy_vocabulary: digest of the policy's vocabulary, which knows the policy's tokenizer.
        device: where a model lives.
        frozen: models that are in memory already.
        template_date: YYYY-MM-DD that a chat template's clock shows; None: the machine's own clock.
    Raises: UserError naming ``field`` if the model, function or address is not there or does not fit.
    """
    if isinstance(config, ModelReward):
        return RewardModel.load(
            config,
            field=field,
            policy_vocabulary=policy_vocabulary,
            device=device,
            frozen=frozen,
            template_date=template_date,
        )
    component = (
        load_function(config, field=field, columns=columns)
        if isinstance(config, FunctionReward)
        else load_http(config, field=field)
    )
    return with_special_tokens(component, policy_vocabulary, field) if config.keep_special_tokens else component


class SpecialTokensKept:
    """A function or service that is given the response's text with its special tokens.

    Args:
        component: that scores.
        tokenizer: the policy's.
    """

    def __init__(self, component: Component, tokenizer: PreTrainedTokenizerBase) -> None:
        self.component, self.tokenizer = component, tokenizer

    def score(self, conversations: Sequence[Conversation]) -> Any:
        """What the component says of those texts."""
        return self.component.score(
            [replace(c, response_text=text_with_special_tokens(self.tokenizer, c)) for c in conversations]
        )


def with_special_tokens(component: Component, policy_vocabulary: str, field: str) -> SpecialTokensKept:
    """The component behind ``keep_special_tokens``. Raises UserError where the policy's tokenizer is unknown."""
    if not isinstance(policy_vocabulary, VocabularyDigest):
        raise UserError(f"{field}.keep_special_tokens needs the policy's tokenizer; give its vocabulary_digest")
    return SpecialTokensKept(component, policy_vocabulary.tokenizer)


def component_digest(config: ComponentReward) -> str | dict[str, str]:
    """Identity of what decides a component's scores beside its section and its model's files."""
    if isinstance(config, FunctionReward):
        return function_digest(config)
    if isinstance(config, HttpReward):
        return config.url
    return digest_json(config.chat_template and chat_template_text(config.chat_template, field="chat_template"))
