"""Everything that can be wrong with a config, found before anything is written or any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.devices import resolve_device, resolve_num_threads
from rlhf_core.models.tokenizers import PolicyTokenizer, load_policy_tokenizer, load_tokenizer, vocabulary_digest
from rlhf_core.ops.logprobs import CHUNK_ELEMENTS
from rlhf_core.prompts.rendering import render_prompt
from rlhf_core.prompts.sources import PromptSet, load_prompt_set

Found = TypeVar("Found")
BYTES = {"float32": 4, "bfloat16": 2}
TRAINED_BYTES = 16
"""A trained float32 parameter with its gradient and AdamW's two moments."""


@dataclass(frozen=True)
class Plan:
    """What a run will do, and what it needs. Built only when nothing is wrong."""

    prompt_set: PromptSet
    tokenizer: PolicyTokenizer
    max_prompt_len: int
    context_len: int
    device: str
    num_threads: int
    parameters: dict[str, int]
    """Model -> number of parameters."""
    memory_bytes: dict[str, int]
    """What -> estimate."""


def preflight(config: RunConfig) -> Plan:
    """Check a config against its files and models; load no weights.

    Args:
        config: already valid in itself.
    Returns: the plan of the run.
    Raises: UserError with every problem found.
    """
    problems: list[str] = []

    def attempt(find: Callable[[], Found]) -> Found | None:
        try:
            return find()
        except UserError as error:
            problems.extend(error.problems)
            return None

    device = attempt(lambda: resolve_device(config.device))
    policy = attempt(lambda: _model_config(config.policy.model, "policy.model"))
    tokenizer = policy and attempt(lambda: load_policy_tokenizer(config.policy.model, config.policy.pad_token))
    if policy is not None and config.reference.model is not None:
        attempt(lambda: _check_reference(config, policy))
    rewards = [attempt(lambda i=i: _check_reward(config, i, tokenizer)) for i in range(len(config.reward.components))]
    if not config.reward.components:
        problems.append("reward.components is empty; give at least one, e.g. [{kind: model, model: FOLDER}]")
    prompt_set = attempt(lambda: load_prompt_set(config.prompts))
    limits = policy and attempt(lambda: _limits(config, policy))
    if prompt_set is not None and tokenizer is not None and limits is not None:
        attempt(lambda: _check_prompts(config, prompt_set, tokenizer, limits[0]))
    if problems or policy is None or tokenizer is None or limits is None or prompt_set is None or device is None:
        raise UserError(*problems)
    parameters = _parameters(config, policy, rewards)
    return Plan(
        prompt_set=prompt_set,
        tokenizer=tokenizer,
        max_prompt_len=limits[0],
        context_len=limits[1],
        device=device.type,
        num_threads=resolve_num_threads(config.num_threads),
        parameters=parameters,
        memory_bytes=_memory(config, policy, parameters, limits[0]),
    )


def context_length(model_config: Any) -> int | None:
    """Positions a model was built for, where its config tells."""
    length = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def _model_config(name: str, field: str) -> Any:
    """The transformers config of a folder with weights, or of a hub id."""
    from transformers import AutoConfig

    if not name:
        raise UserError(f"{field} is not set; give a model folder or a hub id")
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_weights(folder, name, field)
    elif folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{field} {name!r} is not a folder here; give a model folder or a hub id")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{field} {name!r} is neither a model folder nor a hub id that loads: {reason}") from None


def _check_weights(folder: Path, name: str, field: str) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"{field} {name!r} is a folder without config.json; give one written by save_pretrained")
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")):
        raise UserError(
            f"{field} {name!r} has its weights as pickle (*.bin), which is never loaded; convert them with "
            "model.save_pretrained, which writes safetensors"
        )
    raise UserError(f"{field} {name!r} is a model folder without weights (*.safetensors)")


def _check_reference(config: RunConfig, policy: Any) -> None:
    assert config.reference.model is not None
    reference = _model_config(config.reference.model, "reference.model")
    sizes = [int(c.get_text_config().vocab_size) for c in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"reference.model {config.reference.model!r} has a vocabulary of {sizes[1]}, policy.model of {sizes[0]}; "
            "KL needs one vocabulary: take the model that the policy started from"
        )


def _check_reward(config: RunConfig, index: int, tokenizer: PolicyTokenizer | None) -> Any:
    component, field = config.reward.components[index], f"reward.components.{index}"
    model = _model_config(component.model, f"{field}.model")
    if model.num_labels != 1:
        raise UserError(
            f"{field}.model {component.model!r} has {model.num_labels} logits; a reward model has one "
            "(num_labels: 1 in its config.json)"
        )
    own = load_tokenizer(component.model, field=f"{field}.model")
    critic_starts_here = index == 0 and config.uses_critic and _separate_from(config, "reward")
    if critic_starts_here and tokenizer and vocabulary_digest(own) != vocabulary_digest(tokenizer.tokenizer):
        raise UserError(
            f"policy.critic.init is reward, but {field}.model {component.model!r} has another vocabulary than "
            "policy.model; use policy.critic.init policy"
        )
    return model


def _separate_from(config: RunConfig, init: str) -> bool:
    return config.policy.critic.kind == "separate" and config.policy.critic.init == init


def _limits(config: RunConfig, policy: Any) -> tuple[int, int]:
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


def _check_prompts(config: RunConfig, prompt_set: PromptSet, tokenizer: PolicyTokenizer, longest: int) -> None:
    """Enough prompts for an iteration; and, where over-long ones are refused, none of them."""
    entries, wanted = prompt_set.entries, config.prompts.num_prompts
    if len(entries) < wanted:
        raise UserError(
            f"prompts.source {config.prompts.source!r} has {len(entries)} prompts, but an iteration takes {wanted} "
            "different ones; lower prompts.batch_size or raise prompts.samples_per_prompt"
        )
    render_prompt(entries[0], tokenizer.tokenizer)
    if config.prompts.over_long != "refuse":
        return
    too_long = 0
    first = ""
    for row, entry in enumerate(entries):
        text = render_prompt(entry, tokenizer.tokenizer)
        if len(text.encode()) + 8 <= longest:  # a token is at least a byte; 8 for special tokens
            continue
        length = len(tokenizer.encode(text, is_chat=not isinstance(entry, str)))
        if length > longest:
            too_long += 1
            first = first or f"prompt {row} (from 0) has {length} tokens"
    if too_long:
        raise UserError(
            f"prompts.source {config.prompts.source!r} has {too_long} prompts longer than the {longest} tokens that "
            f"fit ({first}); set prompts.over_long to truncate_left or drop"
        )


def _parameters(config: RunConfig, policy: Any, rewards: list[Any]) -> dict[str, int]:
    counts = {"policy": _count(policy, "AutoModelForCausalLM")}
    if config.uses_critic:
        trunk = rewards[0] if config.policy.critic.init == "reward" else policy
        hidden = int(policy.get_text_config().hidden_size)
        counts["critic"] = _count(trunk, "AutoModel") if config.policy.critic.kind == "separate" else hidden + 1
    counts["reference"] = counts["policy"]
    for name, reward in zip(config.reward.names, rewards, strict=True):
        counts[name] = _count(reward, "AutoModelForSequenceClassification")
    return counts


def _count(model_config: Any, auto_class: str) -> int:
    """Parameters of an architecture, built without memory."""
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, auto_class).from_config(model_config)
    return sum(p.numel() for p in cast("torch.nn.Module", model).parameters())


def _memory(config: RunConfig, policy: Any, parameters: dict[str, int], longest_prompt: int) -> dict[str, int]:
    """Rough upper estimate; activations count ~34 bytes a token, layer and hidden unit (float32, no recompute)."""
    text = policy.get_text_config()
    memory = {
        "policy, gradients, AdamW": parameters["policy"] * TRAINED_BYTES,
        "critic, gradients, AdamW": parameters.get("critic", 0) * TRAINED_BYTES,
        "reference": parameters["reference"] * BYTES[config.reference.dtype or config.policy.dtype],
        "reward models": sum(
            parameters[name] * BYTES[c.dtype]
            for name, c in zip(config.reward.names, config.reward.components, strict=True)
        ),
    }
    rows = config.ppo.micro_batch_size or config.prompts.batch_size // config.ppo.num_minibatches
    prompt = min(longest_prompt, 512) if config.prompts.max_len is None else longest_prompt
    tokens = rows * (prompt + config.generation.max_new_tokens)
    memory["activations of a micro-batch"] = tokens * int(text.num_hidden_layers) * int(text.hidden_size) * 34
    memory["logits held at a time"] = 4 * min(CHUNK_ELEMENTS, tokens * int(text.vocab_size)) * 2
    return memory
