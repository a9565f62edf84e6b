"""The workload of a config: shapes from the models' config.json, lengths from prompts where they are at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.loop_state import Cursor
from rlhf_core.contracts.reward_config import ModelReward
from rlhf_core.costs.operations import Shape
from rlhf_core.costs.workload import Model, Workload
from rlhf_core.models.critic_start import with_critic_start
from rlhf_core.models.policy_template import with_policy_template
from rlhf_core.models.sizes import empty_model, parameter_counts
from rlhf_core.models.tokenizers import load_policy_tokenizer
from rlhf_core.preflight import context_length, model_config
from rlhf_core.prompts.sources import load_prompt_set
from rlhf_core.stages.sample_prompts import sample_prompts

TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def read_workload(config: RunConfig, threads: int) -> tuple[Workload, str]:
    """(workload of all devices together, where the lengths come from).

    Args:
        config: of the run; its model folders need a config.json, and nothing else.
        threads: of the host.
    Raises: UserError if a model's config does not load or is not modelled, or lengths are not known.
    """
    config = with_critic_start(config)
    policy, reference, critic, rewards = _model_configs(config)
    counts = parameter_counts(config, policy, rewards)
    prompt_len, lengths = _prompt_len(config, policy)
    prompts, ppo, dtype = config.prompts, config.ppo, config.policy.dtype
    response_len, minibatch = config.generation.max_new_tokens, prompts.batch_size // ppo.num_minibatches
    components = dict(zip(config.reward.names, config.reward.components, strict=True))
    models = {name: c for name, c in components.items() if isinstance(c, ModelReward)}
    once = {(c.model, c.dtype): name for name, c in models.items()}  # components that name the same model share it
    shapes = dict(zip(components, rewards, strict=True))
    work = Workload(
        prompts=prompts.num_prompts,
        samples_per_prompt=prompts.samples_per_prompt,
        prompt_len=prompt_len,
        response_len=response_len,
        longest_response=response_len,
        decoding_rows=min(config.generation.batch_size or prompts.batch_size, prompts.batch_size),
        epochs=ppo.num_ppo_epochs,
        minibatches=ppo.num_minibatches,
        minibatch_rows=minibatch,
        micro_batch_rows=min(ppo.micro_batch_size or minibatch, minibatch),
        policy=Model(_shape(policy, "AutoModelForCausalLM"), counts["policy"], dtype),
        critic=None if critic is None else Model(_shape(critic, "AutoModel"), counts["critic"], dtype),
        reference=Model(
            _shape(reference, "AutoModelForCausalLM"),
            counts.get("reference", counts["policy"]),
            config.reference.dtype or dtype,
        ),
        reference_shares_trunk=config.reference_shares_trunk,
        rewards=tuple(
            Model(_shape(shapes[name], "AutoModelForSequenceClassification"), counts[name], models[name].dtype)
            for name in once.values()
        ),
        reference_rows=config.reference.batch_size,
        reward_rows=min((c.batch_size for c in models.values()), default=1),
        adapter=counts.get("adapter", 0),
        recomputes=config.policy.gradient_checkpointing,
        frozen_stay=config.frozen_models == "keep",
        workers=config.execution.workers(threads, threads),
    )
    return work, f"{lengths}, responses of {response_len} (the limit)"


def _model_configs(config: RunConfig) -> tuple[Any, Any, Any, list[Any]]:
    """Of transformers: (policy, reference, a critic of its own or None, of each reward component or None)."""
    if not config.reward.components:
        raise UserError("reward.components is empty; give at least one, e.g. [{kind: model, model: FOLDER}]")
    policy = model_config(config.policy.model, "policy.model", with_weights=False)
    reference = policy
    if config.reference.model is not None:
        reference = model_config(config.reference.model, "reference.model", with_weights=False)
    rewards = [
        model_config(c.model, f"reward.components.{i}.model", with_weights=False)
        if isinstance(c, ModelReward)
        else None
        for i, c in enumerate(config.reward.components)
    ]
    if not config.uses_critic or config.policy.critic.kind == "shared":
        return policy, reference, None, rewards
    critic = policy if config.critic_init != "reward" else next((r for r in rewards if r is not None), None)
    if critic is None:
        raise UserError(
            "policy.critic.init is reward, but no component of reward.components is a model; "
            "use policy.critic.init policy"
        )
    return policy, reference, critic, rewards


def _shape(found: Any, auto_class: str) -> Shape:
    try:
        return Shape.of(empty_model(found, auto_class))
    except AttributeError as error:
        raise UserError(
            f"the config.json of {found.name_or_path!r} (model type {found.model_type!r}) is not of a transformer "
            f"whose cost is modelled: {error}"
        ) from None


def _prompt_len(config: RunConfig, policy: Any) -> tuple[int, str]:
    """(tokens, in words): as the first iteration's prompts have, or as prompts.max_len says where there are none."""
    name, wanted = config.policy.model, config.prompts.max_len
    folder, context = Path(name).expanduser(), context_length(policy)
    has_tokenizer = not folder.is_dir() or any((folder / file).is_file() for file in TOKENIZER_FILES)
    room = wanted or (context - config.generation.max_new_tokens if context else None)
    if has_tokenizer and config.prompts.source and room is not None:
        prompts = sample_prompts(
            load_prompt_set(config.prompts),
            with_policy_template(
                load_policy_tokenizer(name, config.policy.pad_token, adapter=config.policy.adapter), config.policy
            ),
            config.prompts,
            cursor=Cursor(),
            seed=config.seed,
            max_prompt_len=room,
        ).batch
        length = round(float(prompts.mask_QP.sum()) / len(prompts.prompt_ids))
        return length, f"prompts of {length} tokens (mean of the first {len(prompts.prompt_ids)})"
    if wanted is None:
        why = "prompts.source is not set" if has_tokenizer else f"policy.model {name!r} has no tokenizer"
        raise UserError(f"the length of prompts is not known: {why}, and prompts.max_len is null; set prompts.max_len")
    return wanted, f"prompts of {wanted} tokens (prompts.max_len)"
