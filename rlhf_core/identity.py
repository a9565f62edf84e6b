"""What a run is made of: two runs of equal identity produce equal artifacts, byte for byte.

Threads, library versions, instruction set, models, prompts, config and this package's own source all change
bits. A resumed run whose identity differs is refused with the difference, or told to accept it.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import config_digest, digest_json
from rlhf_core.contracts.durable import hash_file
from rlhf_core.contracts.reward_config import ModelReward
from rlhf_core.models.devices import resolve_device, resolve_num_threads
from rlhf_core.models.vllm_engine import vllm_version
from rlhf_core.prompts.sources import PromptSet
from rlhf_core.rewards.loading import component_digest

DECIDING_ROOMS = ("contracts", "ops", "models", "prompts", "rewards", "stages")
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "pyarrow", "safetensors")


def run_identity(config: RunConfig, prompt_set: PromptSet) -> dict[str, Any]:
    """Everything that decides a run's numbers, as plain JSON.

    Args:
        config: of the run.
        prompt_set: its prompts.
    Returns: a tree of strings and numbers; its digest stands in every artifact.
    """
    models = {"policy": config.policy.model, "reference": config.reference_model}
    adapters = {"policy.adapter": config.policy.adapter, "reference.adapter": config.reference_adapter}
    models |= {name: adapter for name, adapter in adapters.items() if adapter is not None}
    rewards = dict(zip(config.reward.names, config.reward.components, strict=True))
    models |= {name: c.model for name, c in rewards.items() if isinstance(c, ModelReward)}
    models |= {f"{n}.tokenizer": c.tokenizer for n, c in rewards.items() if isinstance(c, ModelReward) and c.tokenizer}
    num_threads, update = resolve_num_threads(config.num_threads), config.execution.update
    return {
        "config": config_digest(config),
        "prompts": prompt_set.digest,
        "models": {name: model_digest(model) for name, model in models.items()},
        "rewards": {name: component_digest(component) for name, component in rewards.items()},
        "num_threads": num_threads,
        **machine_identity(config),
    } | ({"update": update.layout(num_threads)} if update.is_launched else {})


def machine_identity(config: RunConfig) -> dict[str, Any]:
    """The part of a run's identity that each machine has to share that computes for it: what is installed, and on what.

    Args:
        config: of the run.
    """
    device = resolve_device(config.device)
    with_adapters = ("peft",) if config.policy.uses_lora or config.reference_adapter is not None else ()
    versions = {name: importlib.metadata.version(name) for name in (*LIBRARIES, *with_adapters)}
    if config.generation.engine == "vllm":
        versions["vllm"] = vllm_version(config.generation.vllm.interpreter)
    return {
        "source": source_digest(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "versions": versions,
    }


def identity_digest(identity: Mapping[str, Any]) -> str:
    """sha256 of an identity."""
    return digest_json(dict(identity))


def identity_drift(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each entry that differs: ``num_threads: 2 -> 4``."""
    flat_then, flat_now = flat_identity(then), flat_identity(now)
    return [
        f"{key}: {flat_then.get(key, 'absent')} -> {flat_now.get(key, 'absent')}"
        for key in sorted(flat_then.keys() | flat_now.keys())
        if flat_then.get(key) != flat_now.get(key)
    ]


@functools.cache
def source_digest() -> str:
    """sha256 over the source of the rooms that decide numbers."""
    root = Path(__file__).parent
    files = [file for room in DECIDING_ROOMS for file in sorted((root / room).rglob("*.py"))]
    return digest_json({str(file.relative_to(root)): hash_file(file) for file in files})


@functools.cache
def model_digest(name: str) -> str:
    """sha256 over the files of a model folder; the name itself of a hub id."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    kept = (".json", ".safetensors", ".model", ".txt", ".jinja")
    return digest_json({p.name: hash_file(p) for p in sorted(folder.iterdir()) if p.suffix in kept})


def flat_identity(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """An identity, or a part of it, by dotted names: ``versions.torch``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flat_identity(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
