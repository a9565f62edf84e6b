"""Checks of the policy, the reference and the critic against each other."""

from __future__ import annotations

from typing import Any

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.adapters import check_adapter
from rlhf_core.models.model_folders import CAUSAL_LM, check_model_folder
from rlhf_core.models.sizes import empty_model
from rlhf_core.preflight.folders import context_length, model_config


def check_reference(config: RunConfig, policy: Any, notes: list[str]) -> None:
    """Refuse a reference whose vocabulary is not the policy's, or whose adapter does not fit; ``notes`` may grow."""
    reference = policy
    if config.reference.model is not None:
        reference = model_config(config.reference.model, "reference.model")
    sizes = [int(c.get_text_config().vocab_size) for c in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"reference.model {config.reference.model!r} has a vocabulary of {sizes[1]}, policy.model of {sizes[0]}; "
            "KL needs one vocabulary: take the model that the policy started from"
        )
    if config.reference.model is not None:
        check_model_folder(CAUSAL_LM, config.reference.model, "reference.model", notes)
    if config.reference.adapter is not None:
        check_adapter(empty_model(reference), config.reference.adapter, "reference.adapter")


def check_critic(config: RunConfig, rewards: list[Any], longest: int, notes: list[str]) -> None:  # noqa: ARG001
    """A critic that starts as a reward model reads from left to right, and as far as the policy writes."""
    component = config.reward.first_model
    if component is None or not critic_starts_from_reward(config):
        return
    index = config.reward.components.index(component)
    field, name, model = f"reward.components.{index}.model", component.model, rewards[index]
    if model is None:  # told already
        return
    if not hasattr(empty_model(model, "AutoModelForSequenceClassification"), "score"):
        raise UserError(
            f"policy.critic.init is reward, but {field} {name!r} ({model.model_type}) does not read from left to "
            "right, and a critic must not see the future; use policy.critic.init policy"
        )
    context = context_length(model)
    if context is not None and context < longest:
        raise UserError(
            f"policy.critic.init is reward, but {field} {name!r} has a context of {context} tokens, and prompt and "
            f"response may have {longest}; use policy.critic.init policy, or set prompts.max_len to at most "
            f"{context - config.generation.max_new_tokens}"
        )


def critic_starts_from_reward(config: RunConfig) -> bool:
    """Whether a separate critic takes its first weights from the first reward model."""
    critic = config.policy.critic
    return config.uses_critic and critic.kind == "separate" and config.critic_init == "reward"


def prompt_and_context_limits(config: RunConfig, policy: Any) -> tuple[int, int]:
    """(longest prompt, context length), in tokens."""
    context = context_length(policy)
    wanted, new = config.prompts.max_len, config.generation.max_new_tokens
    if context is None:
        if wanted is None:
            raise UserError("prompts.max_len is not set, and policy.model does not tell its context length; set it")
        return wanted, wanted + new
    if new >= context:
        raise UserError(
            f"generation.max_new_tokens {new} leaves no room for a prompt in the context of {context} tokens of "
            f"policy.model; choose at most {context - 1}"
        )
    if wanted is not None and wanted + new > context:
        raise UserError(
            f"prompts.max_len {wanted} + generation.max_new_tokens {new} = {wanted + new} tokens exceed the context "
            f"of {context} of policy.model; choose prompts.max_len of at most {context - new}"
        )
    return wanted or context - new, context
