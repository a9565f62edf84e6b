"""One typed tree: the only home of every knob, of its default and of its documentation.

The tree is the parameter of the Prefect flow (the UI draws a form from it), the template printed by
``rlhf config``, and the content of ``RUN/run.json``. Form and template have the order of the fields. A stage
function receives its own section, an op receives scalars. Rules that need two knobs stand in the validators
below; rules that need a file or a model stand in :mod:`rlhf_core.preflight`.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlhf_core.contracts.algorithm_config import KLConfig, PPOConfig, ShapingConfig
from rlhf_core.contracts.batch_sizes import batch_problems
from rlhf_core.contracts.execution_config import ExecutionConfig
from rlhf_core.contracts.generation_config import GenerationConfig
from rlhf_core.contracts.guard_config import GuardsConfig
from rlhf_core.contracts.hub import with_revisions
from rlhf_core.contracts.policy_config import PolicyConfig, ReferenceConfig
from rlhf_core.contracts.reward_config import GIVEN, RewardConfig
from rlhf_core.contracts.secrets import config_secrets
from rlhf_core.contracts.section import Dtype, Positive, Section
from rlhf_core.contracts.template_options import plain_template_options


class PromptsConfig(Section):
    """Where prompts come from, and how many are drawn."""

    source: str = Field(
        default="",
        description="JSONL, JSON, CSV, TSV, text, Parquet or Arrow file; or a `datasets` folder or hub id",
    )
    revision: str | None = Field(default=None, description="of a hub id, as policy.revision")
    column: str = Field(default="prompt", description="column of texts, or of chat messages [{role, content}, ...]")
    from_preferences: bool = Field(
        default=False, description="take the prompt as the shared beginning of `chosen` and `rejected`"
    )
    bad_pairs: Literal["drop", "refuse"] = Field(
        default="drop", description="what happens to preference pairs that show no prompt: equal, or nothing shared"
    )
    last_answer: Literal["refuse", "cut"] = Field(
        default="refuse", description="what happens to a chat that ends with the assistant's answer"
    )
    columns: list[str] = Field(default=[], description="more columns, which reward functions get by their names")
    subset: str | None = Field(default=None, description="configuration name of a hub dataset")
    split: str = Field(default="train", description="split of a `datasets` source")
    batch_size: Positive = Field(default=256, description="responses an iteration = prompts x samples_per_prompt")
    samples_per_prompt: Positive = Field(default=1, description="responses generated for each prompt (k)")
    max_len: Positive | None = Field(
        default=None, description="longest prompt in tokens; null: context length - max_new_tokens"
    )
    over_long: Literal["refuse", "truncate_left", "drop"] = Field(
        default="refuse", description="what happens to a prompt longer than max_len"
    )
    shuffle: bool = Field(default=True, description="a new order each epoch, from the run's seed")
    as_chat: bool = Field(
        default=False, description="read a plain text as a user's message, through the policy's chat template"
    )
    system: str | None = Field(
        default=None, min_length=1, description="system message of every chat that has none; null: none is added"
    )
    template_options: dict[str, Any] = Field(
        default={}, description="variables of the policy's chat template: {enable_thinking: false}"
    )
    template_date: str | None = Field(
        default=None,
        description="YYYY-MM-DD that chat templates take for today (strftime_now), of prompts and of reward models; "
        "null: the day on which the run begins",
    )

    @property
    def num_prompts(self) -> int:
        """Prompts drawn in one iteration."""
        return self.batch_size // self.samples_per_prompt

    @model_validator(mode="before")
    @classmethod
    def _source_with_revision(cls, tree: Any) -> Any:
        return with_revisions(tree, {"source": "revision"})

    @field_validator("template_date")
    @classmethod
    def _is_a_date(cls, date: str | None) -> str | None:
        try:
            if date is not None and datetime.date.fromisoformat(date).isoformat() != date:
                raise ValueError
        except ValueError:
            raise ValueError(f"{date!r} is not a day of the calendar, as 2026-11-28") from None
        return date

    @field_validator("columns")
    @classmethod
    def _columns_can_be_passed(cls, columns: list[str]) -> list[str]:
        for name in columns:
            if name in GIVEN:
                raise ValueError(f"{name!r} has another meaning for reward functions; rename that column")
            if columns.count(name) > 1:
                raise ValueError(f"the column {name!r} is named twice")
        return columns

    @field_validator("template_options")
    @classmethod
    def _options_can_be_passed(cls, options: dict[str, Any]) -> dict[str, Any]:
        return plain_template_options(options)


class CheckpointConfig(Section):
    """When the policy, critic and optimizer are saved."""

    every: Positive = Field(default=10, description="iterations; the last iteration is always saved")
    keep_last: Positive = Field(default=2, description="newest checkpoints kept")
    keep_best: bool = Field(
        default=True, description="also keep the best one: mean score - coef x KL since the one before"
    )


class ArtifactsConfig(Section):
    """How long an iteration's artifacts stay files of their own."""

    keep_iterations: Positive | None = Field(
        default=None,
        description="older iterations go into the archive, one zstd file a stage for each so many of them; between "
        "once and twice so many stay loose; null: all; changes no number",
    )


class TrackingConfig(Section):
    """MLflow."""

    enabled: bool = True
    uri: str | None = Field(
        default=None, description="null: MLFLOW_TRACKING_URI, else sqlite mlflow.db beside the run folder"
    )
    experiment: str = Field(default="rlhf-flow", min_length=1)
    artifact_location: str | None = Field(
        default=None,
        min_length=1,
        description="where a new experiment keeps files and checkpoints, as s3://bucket/prefix; null: what its server "
        "says, and with sqlite mlartifacts beside the run folder",
    )
    run_name: str | None = Field(default=None, description="null: the name of the run folder")
    trace_every: Positive | None = Field(
        default=10,
        description="one iteration in so many, and the last, show their extreme responses as MLflow traces; null: none",
    )
    registered_model: str = Field(
        default="rlhf-policy", pattern=r"^[A-Za-z0-9_.-]{1,200}$", description="checkpoints become its versions"
    )

    @field_validator("uri")
    @classmethod
    def _file_is_absolute(cls, uri: str | None) -> str | None:
        return absolute_sqlite(uri) if uri else uri


def absolute_sqlite(uri: str) -> str:
    """A tracker's address, with the absolute path of its file where that was relative to the working folder."""
    name = uri.removeprefix("sqlite:///")
    if name == uri or not name or name.startswith(("/", ":memory:", "file:")):
        return uri
    return f"sqlite:///{Path.cwd() / name}"


class RunConfig(Section):
    """Everything a run is made of."""

    prompts: PromptsConfig = PromptsConfig()
    policy: PolicyConfig = PolicyConfig()
    reward: RewardConfig = RewardConfig()
    num_iterations: Positive = Field(default=100, description="sample, score, update: once each")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=0, description="every draw derives from it")
    reference: ReferenceConfig = ReferenceConfig()
    generation: GenerationConfig = GenerationConfig()
    kl: KLConfig = KLConfig()
    shaping: ShapingConfig = ShapingConfig()
    ppo: PPOConfig = PPOConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    artifacts: ArtifactsConfig = ArtifactsConfig()
    guards: GuardsConfig = GuardsConfig()
    tracking: TrackingConfig = TrackingConfig()
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="auto: cuda, then mps, then cpu")
    num_threads: Positive | None = Field(default=None, description="CPU threads; null: the cores at hand")
    frozen_models: Literal["keep", "cpu", "disk"] = Field(
        default="keep",
        description="reference and reward models between their stages: keep on the device, move to CPU memory, or "
        "drop and read from disk again; changes no number",
    )
    execution: ExecutionConfig = ExecutionConfig()

    @model_validator(mode="before")
    @classmethod
    def _without_secrets(cls, tree: Any) -> Any:
        if problems := config_secrets(tree):
            raise ValueError("\n".join(problems))
        return tree

    @property
    def reference_model(self) -> str:
        """Folder or hub id of the reference."""
        return self.reference.model or self.policy.model

    @property
    def reference_adapter(self) -> str | None:
        """LoRA adapter of the reference."""
        return self.reference.adapter or (self.policy.adapter if self.reference.model is None else None)

    @property
    def reference_shares_trunk(self) -> bool:
        """Whether the reference is the policy's own frozen trunk, with the trained adapter switched off."""
        same_dtype = self.reference.dtype in (None, self.policy.dtype)
        return self.policy.uses_lora and self.reference_model == self.policy.model and same_dtype

    @property
    def starts_at_reference(self) -> bool:
        """Whether the initial policy is the reference, so that KL is 0 at iteration 0."""
        return self.reference_model == self.policy.model and self.reference_adapter == self.policy.adapter

    @property
    def coarsest_dtype(self) -> Dtype:
        """The less exact of the compute types of policy and reference."""
        return "bfloat16" if "bfloat16" in (self.policy.dtype, self.reference.dtype) else "float32"

    @property
    def critic_init(self) -> Literal["zero", "policy", "reward"]:
        """What a separate critic starts from."""
        return self.policy.critic.init or ("policy" if self.reward.first_model is None else "reward")

    @property
    def importance_cap(self) -> float | None:
        """Of the weights that make up for an older sampler; None where an update moves the policy that has sampled."""
        return self.ppo.importance_cap if self.execution.overlap or self.generation.engine != "own" else None

    @property
    def uses_critic(self) -> bool:
        """Whether the estimator needs a value function."""
        return self.shaping.estimator in ("gae", "value")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems, batch = (
            batch_problems(self.prompts.batch_size, self.prompts.samples_per_prompt, self.ppo.num_minibatches),
            self.prompts.batch_size,
        )
        if self.kl.controller == "adaptive" and self.kl.horizon < 0.2 * batch:
            problems.append(
                f"kl.horizon {self.kl.horizon:g} is below 0.2 x prompts.batch_size = {0.2 * batch:g}: "
                f"β could turn negative; use kl.horizon {batch} or more"
            )
        if self.execution.num_shards > self.prompts.num_prompts:
            problems.append(
                f"execution.num_shards is {self.execution.num_shards}, but an iteration has {self.prompts.num_prompts} "
                "prompts (prompts.batch_size / samples_per_prompt); use at most one shard a prompt"
            )
        if self.generation.engine != "own" and self.policy.uses_lora:
            problems.append(
                f"generation.engine is {self.generation.engine}, which does not know the adapter that policy.lora or "
                "policy.adapter trains; use engine own"
            )
        problems += self._estimator_problems()
        if self.shaping.score_normalization == "reference" and not self.starts_at_reference:
            problems.append(
                "shaping.score_normalization is reference, but the first batch is sampled from "
                f"policy.model {self.policy.model!r}{_with(self.policy.adapter)}, not from reference.model "
                f"{self.reference_model!r}{_with(self.reference_adapter)}; use running"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _estimator_problems(self) -> list[str]:
        problems: list[str] = []
        estimator, ppo, k = self.shaping.estimator, self.ppo, self.prompts.samples_per_prompt
        if estimator in ("rloo", "group") and k < 2:
            problems.append(
                f"prompts.samples_per_prompt is {k} and shaping.estimator is {estimator}: each response is compared "
                "with the others to its prompt; use prompts.samples_per_prompt 4, say"
            )
        if estimator == "reinforce++" and not self.shaping.whiten_advantages:
            problems.append(
                "shaping.whiten_advantages is false and shaping.estimator is reinforce++: the batch is its baseline; "
                "set shaping.whiten_advantages true"
            )
        if ppo.level == "sequence" and estimator in ("gae", "reinforce++"):
            problems.append(
                f"ppo.level is sequence and shaping.estimator is {estimator}: a sequence-level ratio needs one "
                "advantage per response; use shaping.estimator value, reward, rloo or group"
            )
        if ppo.level == "sequence" and ppo.loss_aggregation != "token_mean":
            problems.append(
                f"ppo.level is sequence and ppo.loss_aggregation is {ppo.loss_aggregation}: a response has one ratio, "
                "and there are no tokens to aggregate; use ppo.loss_aggregation token_mean"
            )
        if ppo.critic_warmup_iterations and not self.uses_critic:
            problems.append(
                f"ppo.critic_warmup_iterations is {ppo.critic_warmup_iterations} and shaping.estimator is {estimator}, "
                "which has no critic; use 0, or shaping.estimator gae or value"
            )
        if ppo.critic_warmup_iterations >= self.num_iterations:
            problems.append(
                f"ppo.critic_warmup_iterations {ppo.critic_warmup_iterations} leaves none of num_iterations "
                f"{self.num_iterations} to the policy; use fewer"
            )
        return problems


def _with(adapter: str | None) -> str:
    return "" if adapter is None else f" with adapter {adapter!r}"
