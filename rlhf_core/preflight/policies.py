"""Checks of the policy, the reference and the critic against each other."""

from __future__ import annotations

from typing import Any

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.adapters import check_adapter
from rlhf_core.models.critic_start import reward_model_obstacle
from rlhf_core.models.model_folders import CAUSAL_LM, check_model_folder
from rlhf_core.models.sizes import empty_model
from rlhf_core.models.tokenizers import PolicyTokenizer
from rlhf_core.models.vocabulary import DrawableTokens
from rlhf_core.preflight.folders import context_length, model_config
from rlhf_core.preflight.vocabularies import check_reference_rows


def check_reference(
    config: RunConfig,
    policy: Any,
    tokenizer: PolicyTokenizer | None,
    tokens: DrawableTokens | None,
    notes: list[str],
) -> None:
    """Refuse a reference whose vocabulary is not the policy's, or whose adapter does not fit; ``notes`` may grow."""
    reference = policy
    if config.reference.model is not None:
        reference = model_config(config.reference.model, "reference.model")
    if tokenizer is not None and tokens is not None:
        check_reference_rows(config, reference, tokenizer, tokens, notes)
    if config.reference.model is not None:
        check_model_folder(CAUSAL_LM, config.reference.model, "reference.model", notes)
    if config.reference.adapter is not None:
        check_adapter(empty_model(reference), config.reference.adapter, "reference.adapter")


def check_critic(config: RunConfig, rewards: list[Any], notes: list[str]) -> None:
    """A critic that starts as a reward model reads the policy's tokens, from left to right and as far as it writes.

    One that is asked for and cannot is refused; where ``policy.critic.init`` is null, it starts as the policy.
    """
    component = config.reward.first_model
    if component is None or not critic_starts_from_reward(config):
        return
    if rewards[config.reward.components.index(component)] is None:  # told already
        return
    if (obstacle := reward_model_obstacle(config)) is None:
        return
    if config.policy.critic.init is None:
        notes.append(f"the critic starts as the policy's trunk (policy.critic.init null): {obstacle}")
        return
    shorter = ""
    if " has a context of " in obstacle:
        room = (
            context_length(rewards[config.reward.components.index(component)]) or 0
        ) - config.generation.max_new_tokens
        shorter = f", or set prompts.max_len to at most {room}" if room > 0 else ""
    raise UserError(f"policy.critic.init is reward, but {obstacle}; use policy.critic.init policy{shorter}")


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
