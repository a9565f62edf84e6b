"""What decides the cost of an iteration: shapes of the models, lengths, batches. Plain numbers, as JSON too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rlhf_core.costs.operations import Shape

BYTES = {"float32": 4, "bfloat16": 2}
LORA_RANK = 16
"""Of the adapter that a plan would advise."""


@dataclass(frozen=True)
class Model:
    """One model of a run."""

    shape: Shape
    parameters: int
    dtype: str
    """Of the computation; frozen weights are stored in it, trained ones in float32."""

    @property
    def stored_bytes(self) -> int:
        """Of its weights, frozen."""
        return self.parameters * BYTES[self.dtype]

    @property
    def cast_bytes(self) -> int:
        """Of the copy that a float32 model computes with: its linear layers and head in bfloat16."""
        shape = self.shape
        head = shape.vocabulary * shape.hidden_size
        return 0 if self.dtype == "float32" else 2 * (shape.linear_parameters + head)


@dataclass(frozen=True)
class Workload:
    """An iteration of a run, on as many devices as share it equally."""

    prompts: int
    """Of a device."""
    samples_per_prompt: int
    prompt_len: int
    """Tokens of a prompt, mean."""
    response_len: int
    """Tokens of a response, mean."""
    longest_response: int
    """Tokens of the longest: steps of decoding."""
    decoding_rows: int
    """Responses of a device decoded at a time."""
    epochs: int
    minibatches: int
    minibatch_rows: int
    """Of a device."""
    micro_batch_rows: int
    """Of a device, at most."""
    policy: Model
    critic: Model | None
    """A trained model of its own; None where there is none, or a head on the policy's trunk."""
    reference: Model
    reference_shares_trunk: bool
    rewards: tuple[Model, ...]
    reference_rows: int
    """Responses read at a time."""
    reward_rows: int
    adapter: int = 0
    """Parameters of a LoRA adapter, which are then all that is trained of the policy; 0 without."""
    recomputes: bool = False
    """Activations of a layer are computed again in the backward pass."""
    frozen_stay: bool = True
    """Reference and reward models are on the device in the update, too."""
    workers: int = 0
    """Processes of a device that compute shards, each with whole models of its own."""
    devices: int = 1

    @property
    def rows(self) -> int:
        """Responses of a device."""
        return self.prompts * self.samples_per_prompt

    @property
    def read(self) -> int:
        """Tokens of a sequence that policy, reference and critic read: all but the last."""
        return self.prompt_len + self.response_len - 1

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.epochs * self.minibatches

    @property
    def micro_batches(self) -> int:
        """Of an optimiser step."""
        return math.ceil(self.minibatch_rows / self.micro_batch_rows)

    @property
    def trained(self) -> int:
        """Parameters with a gradient and moments."""
        policy = self.adapter or self.policy.parameters
        return policy + (self.critic.parameters if self.critic else 0)

    def on(self, devices: int) -> Workload:
        """Of one of so many devices, rounded up: each has a worker, its share of the prompts and of every minibatch."""
        minibatch = math.ceil(self.minibatch_rows / devices)
        prompts = math.ceil(self.prompts / devices)
        return replace(
            self,
            prompts=prompts,
            decoding_rows=min(self.decoding_rows, prompts * self.samples_per_prompt),
            minibatch_rows=minibatch,
            micro_batch_rows=min(self.micro_batch_rows, minibatch),
            workers=self.workers if devices == 1 else 1,
            devices=devices,
        )

    def with_shared_critic(self) -> Workload:
        """Its critic a head on the policy's trunk."""
        return replace(self, critic=None)

    def with_lora(self, rank: int = LORA_RANK) -> Workload:
        """An adapter in place of the policy's weights, and the reference on the same trunk."""
        return replace(self, adapter=rank * self.policy.shape.linear_edges, reference_shares_trunk=True)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Workload:
        """What ``to_json`` gave."""
        models = {name: _model(tree[name]) for name in ("policy", "critic", "reference")}
        return cls(**{**tree, **models, "rewards": tuple(_model(reward) for reward in tree["rewards"])})


def _model(tree: Mapping[str, Any] | None) -> Any:
    return None if tree is None else Model(**{**tree, "shape": Shape(**tree["shape"])})
