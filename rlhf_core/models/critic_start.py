"""What the critic starts as, where ``policy.critic.init`` is null: a function of the config and its folders."""

from __future__ import annotations

from typing import Any

from torch import nn

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import RAW
from rlhf_core.models.model_files import config_of
from rlhf_core.models.reward_text import load_reward_tokenizer
from rlhf_core.models.sizes import empty_model
from rlhf_core.models.tokenizers import drawable_tokens, load_tokenizer_of, vocabulary_digest


def with_critic_start(config: RunConfig) -> RunConfig:
    """The config with ``policy.critic.init`` set to policy where it is null and the first reward model cannot serve.

    Every process comes to the same answer: it depends on files that the run's identity holds, not on weights.

    Args:
        config: of a run.
    Returns: the same config where nothing is left open.
    """
    critic = config.policy.critic
    is_open = config.uses_critic and critic.kind == "separate" and critic.init is None
    if not is_open or config.reward.first_model is None or reward_model_obstacle(config) is None:
        return config
    policy = config.policy.model_copy(update={"critic": critic.model_copy(update={"init": "policy"})})
    return config.model_copy(update={"policy": policy})


def reward_model_obstacle(config: RunConfig) -> str | None:
    """Why the first reward model cannot be what the critic starts as; None if it can, or does not load at all.

    A critic reads the policy's tokens, from left to right, and as far as prompt and response may go. A reward model
    that was trained with another chat template can still be asked for.
    """
    component = config.reward.first_model
    assert component is not None, "asked for where there is one"
    field = f"reward.components.{config.reward.components.index(component)}"
    named = f"{field}.model {component.model!r}"
    try:
        own, _ = load_reward_tokenizer(component, field=field)
        tokenizer, _ = load_tokenizer_of(config.policy.model, config.policy.adapter)
        tokens = drawable_tokens(config.policy.model, config.policy.adapter)
        policy, model = config_of(config.policy.model), config_of(component.model)
        if policy is None or model is None:
            return None
        shape = empty_model(model, "AutoModelForSequenceClassification")
    except UserError:  # told where it is read
        return None
    rows, templates = int(model.get_text_config().vocab_size), [t.chat_template for t in (own, tokenizer)]
    head = getattr(shape, "score", None)
    is_decoder = head is not None and not _sees_the_future(model)
    obstacles = {
        f"{named} has another vocabulary than policy.model": vocabulary_digest(own) != vocabulary_digest(tokenizer),
        f"{named} has an embedding of {rows} rows, and the policy can draw token {tokens.num_tokens - 1}": (
            rows < tokens.num_tokens
        ),
        f"{named} ({model.model_type}) does not read from left to right, and a critic must not see the future": (
            not is_decoder
        ),
        f"{named} ({model.model_type}) has a head of more than one linear layer": not isinstance(head, nn.Linear),
    }
    if config.policy.critic.init is None:
        obstacles |= {
            f"{named} is given another chat template ({field}.chat_template)": component.chat_template
            not in (None, RAW),
            f"{named} has another chat template than policy.model": None not in templates
            and templates[0] != templates[1],
        }
    return next(
        (obstacle for obstacle, stands in obstacles.items() if stands), _too_short(config, policy, model, named)
    )


def _sees_the_future(model: Any) -> bool:
    text = model.get_text_config()
    return bool(getattr(text, "use_bidirectional_attention", False)) or getattr(text, "is_causal", True) is False


def _too_short(config: RunConfig, policy: Any, model: Any, named: str) -> str | None:
    ends, context = (getattr(c.get_text_config(), "max_position_embeddings", None) for c in (policy, model))
    new, wanted = config.generation.max_new_tokens, config.prompts.max_len
    longest = ends if wanted is None else wanted + new
    if not context or longest is None or context >= longest:
        return None
    return f"{named} has a context of {context} tokens, and prompt and response may have {longest}"
