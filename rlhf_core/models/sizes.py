"""How large a run's models are, and what memory they need: from their configs, built without memory."""

from __future__ import annotations

from typing import Any, cast

import torch

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import ModelReward
from rlhf_core.models.adapters import TRAINED, add_adapter, check_adapter, count_adapter, new_adapter
from rlhf_core.models.devices import resolve_num_threads, usable_cores
from rlhf_core.models.untrusted import without_weights
from rlhf_core.ops.logprobs import logits_at_a_time

BYTES = {"float32": 4, "bfloat16": 2}
TRAINED_BYTES = 16
"""A trained float32 parameter with its gradient and AdamW's two moments."""
ACTIVATION_BYTES = 34
"""Kept for the backward pass by a token in a layer, for each hidden unit (float32)."""
FROZEN_PARTS = ("reference", "reward models")
UPDATE_PARTS = ("activations of a micro-batch", "logits held at a time")


def empty_model(model_config: Any, auto_class: str = "AutoModelForCausalLM") -> Any:
    """An architecture on the meta device: shapes without weights. Raises UserError if there is no such one."""
    try:
        return without_weights(model_config, auto_class, f"the model {model_config.name_or_path!r}")
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        text = model_config.get_text_config()
        rows, pad = getattr(text, "vocab_size", None), getattr(text, "pad_token_id", None)
        if isinstance(rows, int) and isinstance(pad, int) and not -rows <= pad < rows:
            reason = f"its pad_token_id is {pad} and its vocab_size {rows}; set pad_token_id to null there"
        raise UserError(
            f"the config.json of {model_config.name_or_path!r} describes nothing that {auto_class} can build: {reason}"
        ) from None


def trained_adapter_size(config: RunConfig, policy: Any) -> int:
    """Parameters of the adapter that a run trains; 0 without LoRA.

    Args:
        config: of the run.
        policy: transformers config of ``policy.model``.
    Raises: UserError if ``policy.adapter`` or ``policy.lora.target_modules`` does not fit the model.
    """
    if not config.policy.uses_lora:
        return 0
    model = empty_model(policy)
    with torch.device("meta"):
        if config.policy.adapter is not None:
            return check_adapter(model, config.policy.adapter, "policy.adapter")
        fresh = new_adapter(config.policy.lora, model)
        try:
            return count_adapter(add_adapter(model, fresh, TRAINED))
        except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"policy.lora.target_modules {config.policy.lora.target_modules} does not fit policy.model "
                f"{config.policy.model!r} ({policy.model_type}): {reason}"
            ) from None


def parameter_counts(config: RunConfig, policy: Any, rewards: list[Any]) -> dict[str, int]:
    """Model -> parameters. A reference on the policy's trunk is not counted again.

    Args:
        config: of the run.
        policy: transformers config of the policy.
        rewards: those of the reward components; None for a component without a model.
    """
    counts = {"policy": _count(policy, "AutoModelForCausalLM")}
    if adapter := trained_adapter_size(config, policy):
        counts["adapter"] = adapter
    if config.uses_critic:
        separate, init = config.policy.critic.kind == "separate", config.critic_init
        trunk = next(r for r in rewards if r is not None) if separate and init == "reward" else policy
        counts["critic"] = _count(trunk, "AutoModel") if separate else _width(policy) + 1
    if not config.reference_shares_trunk:
        counts["reference"] = counts["policy"]
    for name, reward in zip(config.reward.names, rewards, strict=True):
        if reward is not None:
            counts[name] = _count(reward, "AutoModelForSequenceClassification")
    return counts


def memory_parts(
    config: RunConfig, policy: Any, parameters: dict[str, int], longest_prompt: int, device: str
) -> dict[str, int]:
    """What -> bytes, rough upper estimates.

    Args:
        config: of the run.
        policy: transformers config of the policy.
        parameters: of each model.
        longest_prompt: in tokens.
        device: cpu, cuda or mps.
    """
    section, text = config.policy, policy.get_text_config()
    if section.uses_lora:
        memory = {
            "policy's frozen trunk": parameters["policy"] * BYTES[section.dtype],
            "adapter, gradients, AdamW": parameters["adapter"] * TRAINED_BYTES,
        }
    else:
        memory = {"policy, gradients, AdamW": parameters["policy"] * TRAINED_BYTES}
    memory["critic, gradients, AdamW"] = parameters.get("critic", 0) * TRAINED_BYTES
    memory["reference"] = parameters.get("reference", 0) * BYTES[config.reference.dtype or section.dtype]
    once = {  # components that name the same model share its weights
        (c.model, c.dtype): parameters[name]
        for name, c in zip(config.reward.names, config.reward.components, strict=True)
        if isinstance(c, ModelReward)
    }
    memory["reward models"] = sum(count * BYTES[dtype] for (_, dtype), count in once.items())
    rows = config.ppo.micro_batch_size or config.prompts.batch_size // config.ppo.num_minibatches
    prompt = min(longest_prompt, 512) if config.prompts.max_len is None else longest_prompt
    tokens = rows * (prompt + config.generation.max_new_tokens)
    layers = int(getattr(text, "num_hidden_layers", None) or 1)
    per_unit = 4 * layers + ACTIVATION_BYTES if section.gradient_checkpointing else ACTIVATION_BYTES * layers
    memory["activations of a micro-batch"] = tokens * _width(policy) * per_unit
    memory["logits held at a time"] = 4 * min(logits_at_a_time(device), tokens * int(text.vocab_size)) * 2
    return {name: count for name, count in memory.items() if count}


def peak_memory(config: RunConfig, parts: dict[str, int], device: str) -> int:
    """Bytes on the device at most: frozen models that leave after their stages are not there in an update."""
    frozen = sum(parts.get(name, 0) for name in FROZEN_PARTS)
    update = sum(parts.get(name, 0) for name in UPDATE_PARTS)
    together = frozen + update if _frozen_stay(config, device) else max(frozen, update)
    return sum(parts.values()) - frozen - update + together


def notes(config: RunConfig, device: str, parameters: dict[str, int]) -> list[str]:
    """What a plan should say beside its numbers."""
    said: list[str] = []
    threads, execution = resolve_num_threads(config.num_threads), config.execution
    if execution.is_sharded:
        workers = execution.workers(threads, usable_cores())
        by = f"{workers} workers, each with {4 * sum(parameters.values()) / 1e6:,.0f} MB of models of its own"
        said.append(
            f"generation, scoring and reference log-probs in {execution.num_shards} shards of "
            f"{execution.shard_threads(threads)} threads, by {by if workers else 'this process, one after the other'}"
        )
    if (update := execution.update).is_launched:
        said.append(
            f"ppo_update by {update.num_ranks} ranks of {update.rank_threads(threads)} threads, started by torchrun, "
            "each with a part of policy, critic and optimizer; this process keeps the weights that it generates with"
        )
    if config.reference_shares_trunk:
        adapter = config.reference_adapter
        off = "its adapter switched off" if adapter is None else f"the adapter {adapter!r} in place of its own"
        said.append(f"the reference is the policy's trunk with {off}: no memory of its own")
    if device == "mps":
        said.append("mps has no float64: tokens are drawn by numbers of 24 bits, a few percent off for rare ones")
    if config.frozen_models == "cpu" and device == "cpu":
        said.append("frozen_models cpu changes nothing on a CPU; disk frees the memory of frozen models between stages")
    elif config.frozen_models != "keep":
        said.append(f"frozen models leave the device between their stages (frozen_models {config.frozen_models})")
    return said


def _frozen_stay(config: RunConfig, device: str) -> bool:
    return config.frozen_models == "keep" or (config.frozen_models == "cpu" and device == "cpu")


def _width(model_config: Any) -> int:
    """D, the width of what the output head reads; 1 for a model without such a head, which is refused elsewhere."""
    head = empty_model(model_config).get_output_embeddings()
    return 1 if head is None else int(head.weight.shape[1])


def _count(model_config: Any, auto_class: str) -> int:
    model = empty_model(model_config, auto_class)
    return sum(p.numel() for p in cast("torch.nn.Module", model).parameters())
