"""The `execution` section of the config: what computes single stages, and where."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf_core.contracts.section import Positive, Section
from rlhf_core.contracts.update_config import UpdateConfig

NUMBERLESS = frozenset({"engine", "num_workers", "update"})
"""Knobs that change no number, and ``update``, whose layout has an entry of its own in a run's identity."""


class ExecutionConfig(Section):
    """Shards of generation, scoring and reference log-probs with their workers, and the ranks of the update."""

    engine: Literal["local"] = Field(
        default="local", description="local: workers are processes of this machine; changes no number"
    )
    num_shards: Positive = Field(
        default=1,
        description="parts, by prompts, that each of these stages is computed in; another number changes last bits, as "
        "another num_threads does",
    )
    threads_per_shard: Positive | None = Field(
        default=None, description="CPU threads of a shard; null: num_threads / num_shards, at least 1"
    )
    num_workers: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="processes, each with its own copy of the models; 0: this process computes one shard after the "
        "other; null: as many as shards and cores allow; changes no number",
    )
    update: UpdateConfig = UpdateConfig()

    @property
    def is_sharded(self) -> bool:
        """Whether the stages are computed by shards, or each as a whole in the process of the run."""
        return self.num_shards > 1

    def workers(self, num_threads: int, cores: int) -> int:
        """How many processes compute shards; 0: the process of the run does.

        Args:
            num_threads: of the run.
            cores: that it may use.
        """
        if not self.is_sharded or self.num_workers is not None:
            return self.num_workers or 0
        return min(self.num_shards, max(1, cores // self.shard_threads(num_threads)))

    def shard_threads(self, num_threads: int) -> int:
        """CPU threads of a shard, where the run has so many."""
        return self.threads_per_shard or max(1, num_threads // self.num_shards)

    @model_validator(mode="after")
    def _shards_are_for_workers(self) -> Self:
        for name in ("num_workers", "threads_per_shard"):
            if not self.is_sharded and getattr(self, name):
                raise ValueError(
                    f"execution.{name} is {getattr(self, name)}, but execution.num_shards is 1: there is nothing to "
                    f"share; use at least as many shards as workers, or leave execution.{name} out"
                )
        return self
