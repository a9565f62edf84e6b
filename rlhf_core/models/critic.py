"""The value function V: a head on the policy's trunk, or a model of its own."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf_core.models.sequences import Sequences
from rlhf_core.models.trunk import Trunk


class ValueHead(nn.Linear):
    """From a hidden state to a value. Starts at zero: V = 0 everywhere until it has learned something."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def values(self, hidden_ND: Tensor) -> Tensor:
        """[N] float32 values of [N, D] hidden states, in float32 whatever the trunk computes in."""
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return cast("Tensor", self(hidden_ND.float()))[:, 0]


class Critic(nn.Module):
    """V of every prefix of a response.

    Args:
        head: the value head.
        trunk: its own transformer; None when the head reads the policy's trunk.
        dtype: of the trunk's computation.
    """

    def __init__(self, head: ValueHead, trunk: Any | None, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.head = head
        self.trunk: Any | None = trunk
        self._reads = None if trunk is None else Trunk(trunk, dtype=dtype)

    def leave_to_transformers(self) -> None:
        """Compute with whatever parameters the modules have at each call."""
        if self._reads is not None:
            self._reads.leave_to_transformers()

    def values(self, sequences: Sequences, policy_hidden_ND: Tensor | None) -> Tensor:
        """[N] V before each real response token, row after row.

        Args:
            sequences: prompts and responses.
            policy_hidden_ND: the policy trunk's output before each of them, read by a shared critic.
        """
        hidden_ND = policy_hidden_ND
        if self._reads is not None:
            hidden_ND = self._reads(sequences.read, sequences.before_response_N)
        assert hidden_ND is not None, "a shared critic reads the policy's hidden states"
        return self.head.values(hidden_ND)
