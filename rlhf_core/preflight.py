"""Everything that can be wrong with a config, found before anything is written or any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import FunctionReward, HttpReward
from rlhf_core.models.adapters import base_of, check_adapter, is_adapter
from rlhf_core.models.devices import check_ranks, resolve_device, resolve_num_threads
from rlhf_core.models.reward_model import load_reward_tokenizer
from rlhf_core.models.sizes import (
    empty_model,
    memory_parts,
    notes,
    parameter_counts,
    peak_memory,
    trained_adapter_size,
)
from rlhf_core.models.templates import check_template
from rlhf_core.models.tokenizers import PolicyTokenizer, load_policy_tokenizer, vocabulary_digest
from rlhf_core.models.untrusted import check_is_data, check_model_config
from rlhf_core.models.vllm_engine import vllm_version
from rlhf_core.prompts.rendering import render_prompt
from rlhf_core.prompts.sources import PromptSet, load_prompt_set
from rlhf_core.rewards.function import load_function
from rlhf_core.rewards.http import load_http

Found = TypeVar("Found")


@dataclass(frozen=True)
class Plan:
    """What a run will do, and what it needs. Built only when nothing is wrong."""

    prompt_set: PromptSet
    tokenizer: PolicyTokenizer
    max_prompt_len: int
    context_len: int
    vocab_size: int
    device: str
    num_threads: int
    parameters: dict[str, int]
    """Model -> number of parameters."""
    memory_bytes: dict[str, int]
    """What -> estimate."""
    peak_bytes: int
    """What is in memory at a time, at most."""
    notes: list[str]


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
    attempt(lambda: device and check_ranks(config.execution.update, device))
    if config.generation.engine == "vllm":
        attempt(lambda: vllm_version(config.generation.vllm.interpreter))
    policy = attempt(lambda: model_config(config.policy.model, "policy.model"))
    tokenizer = policy and attempt(lambda: load_policy_tokenizer(config.policy.model, config.policy.pad_token))
    if policy is not None:
        attempt(lambda: _check_reference(config, policy))
        attempt(lambda: trained_adapter_size(config, policy))
    rewards = [attempt(lambda i=i: _check_reward(config, i, tokenizer)) for i in range(len(config.reward.components))]
    if not config.reward.components:
        problems.append("reward.components is empty; give at least one, e.g. [{kind: model, model: FOLDER}]")
    elif config.reward.first_model is None and _critic_from_reward(config):
        problems.append(
            "policy.critic.init is reward, but no component of reward.components is a model; "
            "use policy.critic.init policy"
        )
    prompt_set = attempt(lambda: load_prompt_set(config.prompts))
    limits = policy and attempt(lambda: _limits(config, policy))
    if prompt_set is not None and tokenizer is not None and limits is not None:
        attempt(lambda: _check_prompts(config, prompt_set, tokenizer, limits[0]))
    if limits is not None:
        attempt(lambda: _check_critic(config, rewards, limits[0] + config.generation.max_new_tokens))
    if problems or policy is None or tokenizer is None or limits is None or prompt_set is None or device is None:
        raise UserError(*problems)
    parameters = parameter_counts(config, policy, rewards)
    memory = memory_parts(config, policy, parameters, limits[0], device.type)
    return Plan(
        prompt_set=prompt_set,
        tokenizer=tokenizer,
        max_prompt_len=limits[0],
        context_len=limits[1],
        vocab_size=int(policy.get_text_config().vocab_size),
        device=device.type,
        num_threads=resolve_num_threads(config.num_threads),
        parameters=parameters,
        memory_bytes=memory,
        peak_bytes=peak_memory(config, memory, device.type),
        notes=notes(config, device.type, parameters),
    )


def context_length(model_config: Any) -> int | None:
    """Positions a model was built for, where its config tells."""
    length = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def model_config(name: str, field: str, *, with_weights: bool = True) -> Any:
    """The transformers config of a folder, or of a hub id; a run's needs weights beside it, a plan's does not.

    Raises: UserError naming ``field``.
    """
    from transformers import AutoConfig

    if not name:
        raise UserError(f"{field} is not set; give a model folder or a hub id")
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_is_data(name, field)
        _check_weights(folder, name, field, with_weights=with_weights)
    elif folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{field} {name!r} is not a folder here; give a model folder or a hub id")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{field} {name!r} is neither a model folder nor a hub id that loads: {reason}") from None
    check_model_config({"attn_implementation": config._attn_implementation, **config.to_dict()}, f"{field} {name!r}")
    return config


def _check_weights(folder: Path, name: str, field: str, *, with_weights: bool) -> None:
    if is_adapter(str(folder)):
        section = field.partition(".")[0]
        remedy = f"set {field} to its base ({base_of(str(folder))!r}) and {section}.adapter to this folder"
        raise UserError(
            f"{field} {name!r} is a LoRA adapter, not a model; "
            + (remedy if section in ("policy", "reference") else "merge it into its base first")
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{field} {name!r} is a folder without config.json; give one written by save_pretrained")
    if not with_weights or any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")):
        raise UserError(
            f"{field} {name!r} has its weights as pickle (*.bin), which is never loaded; convert them with "
            "model.save_pretrained, which writes safetensors"
        )
    raise UserError(f"{field} {name!r} is a model folder without weights (*.safetensors)")


def _check_reference(config: RunConfig, policy: Any) -> None:
    reference = policy
    if config.reference.model is not None:
        reference = model_config(config.reference.model, "reference.model")
    sizes = [int(c.get_text_config().vocab_size) for c in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"reference.model {config.reference.model!r} has a vocabulary of {sizes[1]}, policy.model of {sizes[0]}; "
            "KL needs one vocabulary: take the model that the policy started from"
        )
    if config.reference.adapter is not None:
        check_adapter(empty_model(reference), config.reference.adapter, "reference.adapter")


def _check_reward(config: RunConfig, index: int, tokenizer: PolicyTokenizer | None) -> Any:
    component, field = config.reward.components[index], f"reward.components.{index}"
    if isinstance(component, FunctionReward):
        load_function(component, field=field, columns=config.prompts.columns)
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
    critic_starts_here = component is config.reward.first_model and _critic_from_reward(config)
    if critic_starts_here and tokenizer and vocabulary_digest(own) != vocabulary_digest(tokenizer.tokenizer):
        raise UserError(
            f"policy.critic.init is reward, but {field}.model {component.model!r} has another vocabulary than "
            "policy.model; use policy.critic.init policy"
        )
    return model


def _check_critic(config: RunConfig, rewards: list[Any], longest: int) -> None:
    """A critic that starts as a reward model reads from left to right, and as far as the policy writes."""
    component = config.reward.first_model
    if component is None or not _critic_from_reward(config):
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


def _critic_from_reward(config: RunConfig) -> bool:
    critic = config.policy.critic
    return config.uses_critic and critic.kind == "separate" and config.critic_init == "reward"


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
    if not isinstance(entries[0], str):
        check_template(tokenizer.tokenizer.chat_template, entries[0], f"policy.model {config.policy.model!r}")
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
