"""What a run is made of: two runs of equal identity produce equal artifacts, byte for byte.

Threads, library versions, instruction set, a fingerprint of how the machine computes, models, prompts, config and this
package's own source all change bits. A resumed run whose identity differs is refused with the difference, or told to
accept it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import config_digest, digest_json
from rlhf_core.contracts.durable import hash_file
from rlhf_core.contracts.errors import DriftError
from rlhf_core.contracts.reward_config import ModelReward
from rlhf_core.models.clock import clock_day, clock_readers
from rlhf_core.models.devices import resolve_device, resolve_num_threads
from rlhf_core.models.fingerprint import fingerprint
from rlhf_core.models.hub import files_of, folder_of
from rlhf_core.models.policy_template import policy_template_digest
from rlhf_core.models.vllm_engine import vllm_version
from rlhf_core.prompts.sources import PromptSet
from rlhf_core.rewards.loading import component_digest
from rlhf_core.source_code import files_digest

FINGERPRINT = "fingerprint"
DECIDING_ROOMS = ("contracts", "ops", "models", "prompts", "rewards", "stages", "updating")
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "pyarrow", "safetensors")
PLUGINS = (
    "apex", "causal-conv1d", "flash-attn", "flash-linear-attention", "kernels", "mamba-ssm", "sentencepiece",
    "tiktoken", "torchao", "xformers",
)  # fmt: skip
"""Packages that transformers computes or reads with where they are installed."""
SETTINGS = (
    "CUBLASLT_WORKSPACE_SIZE", "CUBLAS_WORKSPACE_CONFIG", "DNNL_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA", "MKL_CBWR",
    "MKL_DEBUG_CPU_TYPE", "MKL_ENABLE_INSTRUCTIONS", "NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA", "OPENBLAS_CORETYPE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCH_BLAS_PREFER_CUBLASLT",
    "TORCH_BLAS_PREFER_HIPBLASLT",
)  # fmt: skip
"""Environment variables that choose how torch multiplies. Thread counts are set by the run itself."""


def run_identity(config: RunConfig, prompt_set: PromptSet) -> dict[str, Any]:
    """Everything that decides a run's numbers, as plain JSON.

    Args:
        config: of the run.
        prompt_set: its prompts.
    Returns: a tree of strings and numbers; its digest stands in every artifact.
    """
    num_threads, update = resolve_num_threads(config.num_threads), config.execution.update
    return (
        {
            "config": config_digest(config),
            "prompts": prompt_set.digest,
            **_files_identity(config),
            "num_threads": num_threads,
            **machine_identity(config),
        }
        | ({"update": update.layout(num_threads)} if update.is_launched else {})
        | _of_the_clock(config)
        | ({"policy.chat_template": policy_template_digest(config.policy)} if config.policy.chat_template else {})
    )


def _files_identity(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The part of a run's identity that its models and rewards are."""
    models = {"policy": config.policy.model, "reference": config.reference_model}
    adapters = {"policy.adapter": config.policy.adapter, "reference.adapter": config.reference_adapter}
    models |= {name: adapter for name, adapter in adapters.items() if adapter is not None}
    rewards = dict(zip(config.reward.names, config.reward.components, strict=True))
    models |= {name: c.model for name, c in rewards.items() if isinstance(c, ModelReward)}
    models |= {f"{n}.tokenizer": c.tokenizer for n, c in rewards.items() if isinstance(c, ModelReward) and c.tokenizer}
    return {
        "models": {name: _digest(name, model) for name, model in models.items()},
        "rewards": {name: component_digest(component) for name, component in rewards.items()},
    }


def check_files(config: RunConfig, identity: Mapping[str, Any]) -> None:
    """Raise DriftError if a model folder or reward is no longer the one that an identity names.

    What a run has loaded is looked at when it was loaded: a later reload, a worker that begins later or a rank that is
    started again would otherwise compute with other files than the rest of the run. Nothing is hashed twice while sizes
    and times stay the same.

    Args:
        config: of the run.
        identity: under which it computes.
    """
    parts = [part for part in ("models", "rewards") if part in identity]
    now = _files_identity(config) if parts else {}
    changed = identity_drift({part: identity[part] for part in parts}, {part: now[part] for part in parts})
    if changed:
        raise DriftError(
            "files were changed while the run is at work:\n  "
            + "\n  ".join(changed)
            + "\nput them back and resume; nothing was computed with them"
        )


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
        **({FINGERPRINT: fingerprint(resolve_num_threads(config.num_threads))} if device.type == "cpu" else {}),
    } | {name: found for name, found in (("plugins", _plugins()), ("settings", _settings())) if found}


def identity_digest(identity: Mapping[str, Any]) -> str:
    """sha256 of an identity."""
    return digest_json(dict(identity))


def identity_drift(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each entry that differs: ``num_threads: 2 -> 4``.

    A fingerprint that only one of them has tells nothing: releases before had none. Where the numbers of threads
    differ, it follows from them.
    """
    flat_then, flat_now = flat_identity(then), flat_identity(now)
    keys = sorted(flat_then.keys() | flat_now.keys())
    both = all(FINGERPRINT in flat for flat in (flat_then, flat_now))
    if not both or flat_then.get("num_threads") != flat_now.get("num_threads"):
        keys = [key for key in keys if key != FINGERPRINT]
    return [
        f"{key}: {flat_then.get(key, 'absent')} -> {flat_now.get(key, 'absent')}{_EXPLAINED.get(key, '')}"
        for key in keys
        if flat_then.get(key) != flat_now.get(key)
    ]


_EXPLAINED = {
    FINGERPRINT: " (the same small computation gives other last bits here: another CPU, BLAS, or setting of MKL, "
    "oneDNN or OpenMP)"
}


@functools.cache
def source_digest() -> str:
    """sha256 over the code that decides numbers; a comment, a docstring or a module's place is no drift."""
    root = Path(__file__).parent
    files = [file for room in DECIDING_ROOMS for file in (root / room).rglob("*.py")]
    return files_digest([*files, root / "batch_metrics.py"])


@functools.cache
def model_digest(name: str, state: Any = None) -> str:  # noqa: ARG001 - part of the key
    """sha256 over the files of a model folder that libraries read.

    Args:
        name: the folder.
        state: sizes and times of its files: while they are the same, nothing is hashed again.
    """
    folder = Path(name)
    return digest_json({file.relative_to(folder).as_posix(): hash_file(file) for file in files_of(folder)})


def _digest(role: str, name: str) -> str:
    """The commit of a hub id; the digest of a folder's files."""
    folder = folder_of(name, role)
    if not Path(name).expanduser().is_dir():
        return folder.name
    found = ((file.name, file.stat()) for file in files_of(folder))
    return model_digest(str(folder), tuple((n, s.st_ino, s.st_size, s.st_mtime_ns) for n, s in found))


def _of_the_clock(config: RunConfig) -> dict[str, str]:
    """The day that chat templates take for today; nothing where none of them asks."""
    return {"template_date": config.prompts.template_date or clock_day()} if clock_readers(config) else {}


@functools.cache
def _plugins() -> dict[str, str]:
    versions: dict[str, str] = {}
    for name in PLUGINS:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _settings() -> dict[str, str]:
    """What has been chosen, in the environment or in torch itself, that changes how torch computes."""
    chosen = {name: value for name in SETTINGS if (value := os.environ.get(name))}
    usual = {
        "float32_matmul_precision": ("highest", torch.get_float32_matmul_precision()),
        "default_dtype": ("torch.float32", str(torch.get_default_dtype())),
        "deterministic_algorithms": ("False", str(torch.are_deterministic_algorithms_enabled())),
    }
    return chosen | {name: now for name, (default, now) in usual.items() if now != default}


def flat_identity(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """An identity, or a part of it, by dotted names: ``versions.torch``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flat_identity(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
