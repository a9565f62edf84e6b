"""The section `execution.update` of the config: which processes make the update."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rlhf_core.contracts.section import Positive, PositiveFloat, Section


class UpdateConfig(Section):
    """Processes of ppo_update: this one, or ranks that share weights, moments and rows (FSDP2)."""

    launcher: Literal["inprocess", "torchrun"] = Field(
        default="inprocess",
        description="torchrun: ranks with a part of policy, critic and optimizer each, gloo on CPUs, NCCL on GPUs",
    )
    nproc_per_node: Positive = Field(
        default=1, description="ranks on each node, on GPUs one a rank; another number of ranks changes last bits"
    )
    nnodes: Positive = Field(default=1, description="nodes; the run's process starts its own, you start the others")
    threads_per_rank: Positive | None = Field(
        default=None, description="CPU threads of a rank; null: num_threads / nproc_per_node, at least 1"
    )
    endpoint: str | None = Field(
        default=None, description="host:port of the run's node, where several nodes meet; changes no number"
    )
    deadline_s: PositiveFloat = Field(
        default=120.0,
        description="longest silence of a rank before the ranks are ended and started again; changes no number",
    )

    @property
    def is_launched(self) -> bool:
        """Whether ranks make the update, or the process of the run."""
        return self.launcher == "torchrun"

    @property
    def num_ranks(self) -> int:
        """Of all nodes."""
        return self.nproc_per_node * self.nnodes

    def rank_threads(self, num_threads: int) -> int:
        """CPU threads of a rank, where the run has so many."""
        return self.threads_per_rank or max(1, num_threads // self.nproc_per_node)

    def layout(self, num_threads: int) -> dict[str, Any]:
        """What decides last bits of an update by ranks: a part of the run's identity."""
        return {"ranks": self.num_ranks, "nnodes": self.nnodes, "threads_per_rank": self.rank_threads(num_threads)}

    @model_validator(mode="after")
    def _ranks_are_launched(self) -> Self:
        given = [n for n in ("nproc_per_node", "nnodes") if getattr(self, n) > 1]
        given += [n for n in ("threads_per_rank", "endpoint") if getattr(self, n) is not None]
        if given and not self.is_launched:
            raise ValueError(
                f"execution.update.{given[0]} is {getattr(self, given[0])}, but execution.update.launcher is "
                "inprocess, which has no ranks; use execution.update.launcher torchrun"
            )
        return self

    @model_validator(mode="after")
    def _nodes_meet_somewhere(self) -> Self:
        if self.nnodes > 1 and self.endpoint is None:
            raise ValueError(
                f"execution.update.nnodes is {self.nnodes}, but execution.update.endpoint is null: give the host:port "
                "of this node, where the others find it"
            )
        host, _, port = (self.endpoint or "localhost:1").rpartition(":")
        if not host or not (port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16):
            raise ValueError(f"execution.update.endpoint is {self.endpoint!r}; write host:port, as in node0:29500")
        return self
