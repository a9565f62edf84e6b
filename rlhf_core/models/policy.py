"""The policy and the reference of a run, from its config: whole models, or adapters on one frozen trunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_core.contracts.config import RunConfig
from rlhf_core.models.adapters import REFERENCE, TRAINED, attach, merged, new_adapter
from rlhf_core.models.frozen import FrozenModels
from rlhf_core.models.language_model import DTYPES, LanguageModel, load_transformers_model
from rlhf_core.models.recompute import recompute_activations
from rlhf_core.models.tokenizers import drawable_tokens
from rlhf_core.models.trunk import trunk_of


def load_policy(config: RunConfig, device: torch.device, checkpoint: Path | None = None) -> LanguageModel:
    """The trained policy: before the first iteration, or as a checkpoint folder has it.

    With LoRA the frozen base is stored in ``policy.dtype``, the adapter in float32. A reference that shares
    the trunk is there as well; see :func:`load_reference`. Ids that no token has are never drawn.

    Args:
        config: of the run.
        device: where it lives.
        checkpoint: its folder; None: the beginning.
    Raises: UserError if the model or an adapter does not load, or they do not fit.
    """
    section = config.policy
    if section.uses_lora:
        policy = _on_frozen_base(config, device, checkpoint)
    else:
        name = section.model if checkpoint is None else str(checkpoint / "policy")
        policy = LanguageModel.load(name, dtype=section.dtype, device=device, trainable=True)
    policy.drawing_only(drawable_tokens(section.model, section.adapter))
    if config.generation.engine == "own":
        policy.checked_decoding(section.model, "policy.model")
    if section.gradient_checkpointing:
        recompute_activations(policy.trunk, field="policy.model")
    return policy


def load_reference(
    config: RunConfig, device: torch.device, policy: LanguageModel | None, frozen: FrozenModels | None = None
) -> LanguageModel:
    """π_ref, frozen, over the ids that the policy can draw.

    Args:
        config: of the run.
        device: where it lives.
        policy: of the run; with LoRA its trunk is the reference's, the trained adapter switched off. One whose
            adapters are merged into its weights shares nothing.
        frozen: models in memory that it may share.
    Raises: UserError if the model or its adapter does not load.
    """
    if config.reference_shares_trunk:
        assert policy is not None, "a reference on the policy's trunk needs the policy"
        if policy.adapters is not None:
            return policy.view(None if config.reference_adapter is None else REFERENCE)
    name, dtype = config.reference_model, config.reference.dtype or config.policy.dtype
    field = "policy.model" if config.reference.model is None else "reference.model"
    tokens = drawable_tokens(config.policy.model, config.policy.adapter)
    if config.reference_adapter is not None:
        return LanguageModel.adapted(
            name, config.reference_adapter, dtype=dtype, device=device, field=_reference_adapter_field(config)
        ).drawing_only(tokens)
    model = (frozen or FrozenModels()).load("AutoModelForCausalLM", name, DTYPES[dtype], field)
    return LanguageModel(model, dtype=DTYPES[dtype], device=device).checked(name, field).drawing_only(tokens)


def policy_tensors(policy: LanguageModel) -> dict[str, Tensor]:
    """What a checkpoint's ``policy/`` is written from: every weight under its names, or the trained adapter's."""
    return policy.model.state_dict(keep_vars=True) if policy.adapters is None else policy.adapters.tensors()


def save_policy(policy: LanguageModel, folder: Path, *, merge: bool, tensors: dict[str, Tensor] | None = None) -> None:
    """Write a checkpoint's ``policy/``; and ``adapter/`` beside it where that holds a merged model.

    Args:
        policy: as trained.
        folder: of the checkpoint.
        merge: with LoRA, whether ``policy/`` is a whole model rather than the adapter alone.
        tensors: its :func:`policy_tensors`, whole and on the CPU; None: as they are in memory.
    Raises: UserError if the base, which a merged model is made from, is gone.
    """
    if policy.adapters is None:
        model: Any = policy.model
        model.save_pretrained(folder / "policy", state_dict=tensors)
    elif not merge:
        policy.adapters.save(folder / "policy", tensors)
    else:
        policy.adapters.save(folder / "adapter", tensors)
        whole = load_transformers_model("AutoModelForCausalLM", policy.adapters.base, torch.float32, "policy.model")
        merged(whole, str(folder / "adapter"), "adapter").save_pretrained(folder / "policy")


def initial_trunk(config: RunConfig) -> Any:
    """The trunk of the policy before the first iteration, in float32, as a model of its own."""
    model = load_transformers_model("AutoModelForCausalLM", config.policy.model, torch.float32, "policy.model")
    if config.policy.adapter is not None:
        model = merged(model, config.policy.adapter, "policy.adapter")
    return trunk_of(model)


def _on_frozen_base(config: RunConfig, device: torch.device, checkpoint: Path | None) -> LanguageModel:
    section = config.policy
    base = load_transformers_model("AutoModelForCausalLM", section.model, DTYPES[section.dtype], "policy.model")
    base.requires_grad_(False)
    places: dict[str, tuple[str, str]] = {}
    fresh = None
    if checkpoint is not None:
        saved = checkpoint / "adapter"
        places[TRAINED] = (str(saved if saved.is_dir() else checkpoint / "policy"), "checkpoint")
    elif section.adapter is not None:
        places[TRAINED] = (section.adapter, "policy.adapter")
    else:
        fresh = new_adapter(section.lora, base)
    if config.reference_shares_trunk and config.reference_adapter is not None:
        places[REFERENCE] = (config.reference_adapter, _reference_adapter_field(config))
    adapters = attach(base, section.model, places, fresh=fresh, seed=config.seed)
    policy = LanguageModel(base, dtype=DTYPES[section.dtype], device=device, adapters=adapters)
    return policy.checked(section.model, "policy.model")


def _reference_adapter_field(config: RunConfig) -> str:
    return "policy.adapter" if config.reference.adapter is None else "reference.adapter"
