"""Checks of reward components: models, functions and services."""

from __future__ import annotations

from typing import Any

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import FunctionReward, HttpReward
from rlhf_core.models.reward_text import load_reward_tokenizer
from rlhf_core.models.tokenizers import PolicyTokenizer, vocabulary_digest
from rlhf_core.preflight.folders import model_config
from rlhf_core.preflight.policies import critic_starts_from_reward
from rlhf_core.rewards.function import load_function, unseen_modules
from rlhf_core.rewards.http import load_http


def check_reward(config: RunConfig, index: int, tokenizer: PolicyTokenizer | None, notes: list[str]) -> Any:
    """Check one component; return its model's config, None for a function or a service; ``notes`` may grow."""
    component, field = config.reward.components[index], f"reward.components.{index}"
    if isinstance(component, FunctionReward):
        load_function(component, field=field, columns=config.prompts.columns)
        if unseen := unseen_modules(component):
            notes.append(
                f"{field}.function {component.function!r} has loaded {', '.join(map(str, unseen))}, which no import of "
                "its source names: the run's identity does not cover it; import it by its name"
            )
        return None
    if isinstance(component, HttpReward):
        load_http(component, field=field)
        return None
    model = model_config(component.model, f"{field}.model")
    if model.num_labels != 1:
        raise UserError(
            f"{field}.model {component.model!r} has {model.num_labels} logits; a reward model has one "
            "(num_labels: 1 in its config.json)"
        )
    own, _ = load_reward_tokenizer(component, field=field)
    vocabulary = int(model.get_text_config().vocab_size)
    if component.tokenizer is not None and len(own) > vocabulary:
        raise UserError(
            f"{field}.tokenizer {component.tokenizer!r} has {len(own)} tokens, {field}.model {component.model!r} reads "
            f"{vocabulary}; take the tokenizer that the model was trained with"
        )
    critic_starts_here = component is config.reward.first_model and critic_starts_from_reward(config)
    if critic_starts_here and tokenizer and vocabulary_digest(own) != vocabulary_digest(tokenizer.tokenizer):
        raise UserError(
            f"policy.critic.init is reward, but {field}.model {component.model!r} has another vocabulary than "
            "policy.model; use policy.critic.init policy"
        )
    return model
