"""Checks of what architectures can do, by their configs and by models without memory."""

from __future__ import annotations

from typing import Any, cast

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import ModelReward
from rlhf_core.models.recompute import recomputable_layers
from rlhf_core.models.reward_model import num_positions
from rlhf_core.models.sizes import empty_model


def check_architectures(config: RunConfig, policy: Any, rewards: list[Any], longest: int, notes: list[str]) -> None:
    """Refuse what an architecture cannot do.

    Args:
        config: of the run.
        policy: transformers config of the policy.
        rewards: those of the reward components; None for a component without a model.
        longest: tokens of prompt and response.
        notes: grows.
    Raises: UserError with every problem found.
    """
    problems: list[str] = []
    model = empty_model(policy)
    if model.get_output_embeddings() is None:
        problems.append(
            f"policy.model {config.policy.model!r} is of architecture {policy.model_type!r}, which has no output head "
            "that transformers names; choose another architecture"
        )
    if config.policy.gradient_checkpointing:
        try:
            recomputable_layers(model, field="policy.model")
        except UserError as error:
            problems += error.problems
    problems += _changing_frequencies(policy, longest, f"policy.model {config.policy.model!r}")
    for index, (component, reward) in enumerate(zip(config.reward.components, rewards, strict=True)):
        if not isinstance(component, ModelReward) or reward is None:
            continue
        field = f"reward.components.{index}"
        reads = component.max_len or longest
        problems += _changing_frequencies(reward, reads, f"{field}.model {component.model!r}")
        positions = num_positions(empty_model(reward, "AutoModelForSequenceClassification"))
        if component.max_len is not None and positions is not None and component.max_len > positions:
            notes.append(
                f"{field}.max_len is {component.max_len}, but {component.model!r} reads {positions} tokens at most"
            )
    if config.generation.top_k is not None and config.generation.top_k >= int(policy.get_text_config().vocab_size):
        notes.append(f"generation.top_k {config.generation.top_k} is not below the vocabulary's size: it cuts nothing")
    if problems:
        raise UserError(*problems)


def _changing_frequencies(model_config: Any, longest: int, named: str) -> list[str]:
    """Rotary frequencies that follow the longest row: one row's result then depends on the rows beside it."""
    text = model_config.get_text_config()
    parameters = cast("dict[str, Any]", getattr(text, "rope_parameters", None) or {})
    # one set of parameters, or one for each kind of layer
    several = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    for each in cast("list[dict[str, Any]]", several):
        kind = each.get("rope_type")
        original = each.get("original_max_position_embeddings") or (
            getattr(text, "original_max_position_embeddings", None) if kind == "longrope" else None
        )
        limit = original or getattr(text, "max_position_embeddings", None)
        if kind in ("dynamic", "longrope") and limit and longest > int(limit):
            return [
                f"{named} has rotary frequencies that change once a row of the batch is longer than {limit} tokens "
                f"(rope_type {kind}), so that a row's result would depend on the rows beside it, and {longest} tokens "
                f"are expected; keep prompt and response within {limit} (prompts.max_len, generation.max_new_tokens)"
            ]
    return []
