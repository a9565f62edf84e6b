"""All weights or an adapter, which critic, how many responses at a time: the first way that memory allows."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_core.contracts.bounds import free_bytes
from rlhf_core.contracts.config_io import build_config
from rlhf_core.model_fit.defaults import CACHE_SHARE, LORA_RANK, SHARE_OF_MEMORY, SMALL
from rlhf_core.models.critic_start import with_critic_start
from rlhf_core.models.sizes import BYTES, memory_parts, parameter_counts, peak_memory
from rlhf_core.preflight.policies import prompt_and_context_limits

Tree = dict[str, Any]
ALL_WEIGHTS: Tree = {"policy": {"critic": {"kind": "separate"}}}
ADAPTER: Tree = {"policy": {"lora": {"rank": LORA_RANK}, "critic": {"kind": "shared"}}}


@dataclass(frozen=True)
class Training:
    """One way of training a policy, and the memory that it takes on this machine.

    Example: an adapter by bytes of 3e9 where 22e9 are free and all weights would take 8e9.
    """

    has_adapter: bool
    dtype: str
    micro_batch: int | None
    """None: the whole minibatch."""
    has_checkpointing: bool
    peak_bytes: int
    """The plan's estimate."""
    whole_bytes: int
    """The same, were all weights trained at once."""
    free_bytes: float
    """Infinity where nobody tells."""
    critic_init: str

    @property
    def fits(self) -> bool:
        """Return whether the estimate is within the share of the free memory that a run may take."""
        return self.peak_bytes <= SHARE_OF_MEMORY * self.free_bytes


def choose_training(tree: Mapping[str, Any], shape: Any, rewards: list[Any], *, count: int, device: str) -> Training:
    """The first way of training that fits: all weights before an adapter, large micro-batches before small ones.

    On a CPU, policies of more than ``SMALL`` parameters get an adapter for the sake of time.

    Args:
        tree: of a config without those values.
        shape: transformers config of the policy.
        rewards: those of the reward components; None for a component without a model.
        count: parameters of the policy.
        device: cpu, cuda or mps.
    Returns: it; the smallest one where none fits.
    """
    free = free_on(device)
    base = build_config(dict(tree))
    rows = base.prompts.batch_size // base.ppo.num_minibatches
    found = whole = _estimated(tree, shape, rewards, device, ALL_WEIGHTS, free)
    for method in (ADAPTER,) if device == "cpu" and count > SMALL else (ALL_WEIGHTS, ADAPTER):
        for change in _leaner(rows, device, is_last=method is ADAPTER):
            found = _estimated(tree, shape, rewards, device, _joined(method, change), free, whole.peak_bytes)
            if found.fits:
                return found
    return found


def free_on(device: str) -> float:
    """Bytes that are free on a device; infinity where nobody tells."""
    return float(torch.cuda.mem_get_info()[0]) if device == "cuda" else free_bytes()


def decoded_at_a_time(shape: Any, rows: int, tokens: int, dtype: str, free: float) -> tuple[int, float]:
    """(responses that decoding holds at a time, bytes of the keys and values of all rows).

    Args:
        shape: transformers config of the policy.
        rows: responses of an iteration.
        tokens: of the longest prompt and response.
        dtype: of keys and values.
        free: bytes.
    """
    text = shape.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    kept = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or (getattr(text, "hidden_size", None) or 1) // heads
    layers = getattr(text, "num_hidden_layers", None) or 1
    a_row = 2 * int(layers) * int(kept) * int(width) * tokens * BYTES[dtype]
    at_once = rows
    while at_once > 1 and at_once * a_row > CACHE_SHARE * free:
        at_once //= 2
    return at_once, float(rows * a_row)


def _leaner(rows: int, device: str, *, is_last: bool) -> Iterator[Tree]:
    """Changes that take less memory, one after the other."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    policy: Tree = {"dtype": dtype}
    micro = rows
    while micro >= 1:
        if rows % micro == 0:
            yield {"policy": policy, "ppo": {"micro_batch_size": None if micro == rows else micro}}
        micro //= 2
    if is_last:
        policy = {**policy, "gradient_checkpointing": True}
        yield {"policy": policy, "ppo": {"micro_batch_size": 1}}
        yield {"policy": {**policy, "dtype": "bfloat16"}, "ppo": {"micro_batch_size": 1}}


def _estimated(
    tree: Mapping[str, Any],
    shape: Any,
    rewards: list[Any],
    device: str,
    change: Tree,
    free: float,
    whole: int | None = None,
) -> Training:
    config = with_critic_start(build_config(_joined(tree, change)))
    parameters = parameter_counts(config, shape, rewards)
    longest = prompt_and_context_limits(config, shape)[0]
    peak = peak_memory(config, memory_parts(config, shape, parameters, longest, device), device)
    return Training(
        has_adapter=config.policy.uses_lora,
        dtype=config.policy.dtype,
        micro_batch=config.ppo.micro_batch_size,
        has_checkpointing=config.policy.gradient_checkpointing,
        peak_bytes=peak,
        whole_bytes=peak if whole is None else whole,
        free_bytes=free,
        critic_init=config.critic_init,
    )


def _joined(tree: Mapping[str, Any], change: Mapping[str, Any]) -> Tree:
    joined = copy.deepcopy(dict(tree))
    for name, value in change.items():
        inner = joined.get(name)
        joined[name] = _joined(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return joined
