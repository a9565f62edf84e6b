"""The `execution` section of the config: what computes single stages, and where."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf_core.contracts.section import Positive, PositiveFloat, Section
from rlhf_core.contracts.update_config import UpdateConfig

NUMBERLESS = frozenset({"engine", "num_workers", "ray", "update"})
"""Knobs that change no number, and ``update``, whose layout has an entry of its own in a run's identity."""

Amount = Annotated[float, Field(ge=0)]


class StageResources(Section):
    """What a Ray worker of a stage takes of its node for as long as it is there."""

    num_cpus: Amount | None = Field(default=None, description="null: the threads of a shard")
    num_gpus: Amount | None = Field(
        default=None, description="a fraction shares a GPU; null: 1 where device is cuda, else 0"
    )
    custom: dict[str, Amount] = Field(
        default={}, description="resources that nodes were started with, name to amount: {big_memory: 1}"
    )
    labels: dict[str, str] = Field(
        default={}, description="labels that the node has to have, name to value: {market: on-demand}"
    )


class RayConfig(Section):
    """Where Ray runs, and what each stage needs there. Stages of equal needs share their workers."""

    address: str | None = Field(
        default=None,
        description="of a cluster: auto (the one that this machine is in) or host:port; null: that of RAY_ADDRESS, or "
        "else a Ray of this machine alone, for as long as the run goes on",
    )
    patience_s: PositiveFloat = Field(
        default=300.0, description="how long a shard waits, in seconds, while no node has room for a worker"
    )
    generate: StageResources = StageResources()
    score_rewards: StageResources = StageResources()
    reference_logprobs: StageResources = StageResources()


class ExecutionConfig(Section):
    """Shards of generation, scoring and reference log-probs with their workers, and the ranks of the update."""

    engine: Literal["local", "ray"] = Field(
        default="local",
        description="local: workers are processes of this machine; ray: actors of a Ray cluster; changes no number",
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
        "other; null: as many as shards and cores, or the Ray cluster, allow; changes no number",
    )
    overlap: bool = Field(
        default=False,
        description="answer the next iteration's prompts while the policy moves, by the policy as it was: workers are "
        "not idle then, and samples are one update old, which importance weights correct (ppo.importance_cap)",
    )
    ray: RayConfig = RayConfig()
    update: UpdateConfig = UpdateConfig()

    @property
    def is_sharded(self) -> bool:
        """Whether the stages are computed by shards, or each as a whole in the process of the run."""
        return self.num_shards > 1

    def workers(self, num_threads: int, cores: int) -> int:
        """How many processes of one machine compute shards; 0: the process of the run does.

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
        if self.overlap and not self.is_sharded:
            raise ValueError(
                "execution.overlap is true, but execution.num_shards is 1: responses are given ahead by the workers of "
                "shards; use 2 or more"
            )
        if self.engine == "ray" and (not self.is_sharded or self.num_workers == 0):
            reason = "num_shards is 1" if not self.is_sharded else "num_workers is 0"
            raise ValueError(
                f"execution.engine is ray, but execution.{reason}: Ray would have nothing to do; use more, or engine "
                "local"
            )
        return self
