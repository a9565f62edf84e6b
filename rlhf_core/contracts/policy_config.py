"""The `policy` and `reference` sections of the config: which models, how they are held and computed."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from rlhf_core.contracts.hub import with_revisions
from rlhf_core.contracts.section import Dtype, ModelName, Positive, PositiveFloat, Section

ALL_LINEAR = "all-linear"


def _as_list(names: Any) -> Any:
    return [names] if isinstance(names, str) else names


class CriticConfig(Section):
    """The value function V."""

    kind: Literal["shared", "separate"] = Field(
        default="separate", description="shared: a head on the policy's trunk; separate: a model of its own"
    )
    init: Literal["zero", "policy", "reward"] | None = Field(
        default=None,
        description="start of a separate critic: the first reward model, the policy's trunk, or zero (random trunk); "
        "the head starts at zero unless it comes with the reward model; null: reward if a component is a model "
        "that can serve (the policy's vocabulary, read from left to right), else policy",
    )


class LoraConfig(Section):
    """A trained adapter on the frozen trunk, by peft; its dropout is always off."""

    rank: Positive | None = Field(
        default=None, description="null: no adapter, all weights are trained (but see policy.adapter)"
    )
    alpha: PositiveFloat | None = Field(default=None, description="the adapter counts alpha / rank; null: 2 x rank")
    target_modules: Annotated[list[str], BeforeValidator(_as_list)] = Field(
        default=[ALL_LINEAR],
        description="names of the layers that get an adapter; all-linear: every linear layer but the output head",
    )
    save: Literal["adapter", "merged"] = Field(
        default="adapter",
        description="what a checkpoint's policy folder is: the adapter alone, or a whole model with it merged "
        "in (and the adapter beside it, for the resume)",
    )

    @model_validator(mode="after")
    def _targets_make_sense(self) -> Self:
        if not self.target_modules:
            raise ValueError(f"policy.lora.target_modules is empty; name the layers, or use {ALL_LINEAR}")
        if ALL_LINEAR in self.target_modules and len(self.target_modules) > 1:
            raise ValueError(
                f"policy.lora.target_modules is {self.target_modules}: {ALL_LINEAR} stands alone; name the layers, "
                f"or use {ALL_LINEAR}"
            )
        return self


class PolicyConfig(Section):
    """The trained policy and its critic."""

    model: ModelName = Field(default="", description="AutoModelForCausalLM folder or hub id")
    revision: str | None = Field(
        default=None,
        description="branch, tag or commit of a hub id, as model: owner/name@revision; null: the newest; a run keeps "
        "the commit that it has begun with",
    )
    dtype: Dtype = Field(
        default="float32", description="compute type; bfloat16 keeps float32 master weights (autocast)"
    )
    pad_token: str | None = Field(
        default=None,
        description="token to pad with; null: the tokenizer's, or one that no text has where it has none, one that "
        "ends a response, or one without a row in the embedding",
    )
    chat_template: str | None = Field(
        default=None,
        min_length=1,
        description="Jinja text or a file of it, for prompts that are chats; null: the tokenizer's own",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="compute a layer's activations again in the backward pass instead of keeping them"
    )
    adapter: ModelName | None = Field(
        default=None,
        description="LoRA adapter of an SFT, folder or hub id: the policy starts as it and trains a copy of it; "
        "the reference has it too unless reference.model or reference.adapter says otherwise",
    )
    adapter_revision: str | None = Field(default=None, description="of the adapter, as revision")
    lora: LoraConfig = LoraConfig()
    critic: CriticConfig = CriticConfig()

    @property
    def uses_lora(self) -> bool:
        """Whether an adapter is trained on a frozen trunk, rather than all weights."""
        return self.lora.rank is not None or self.adapter is not None

    @model_validator(mode="before")
    @classmethod
    def _names_with_revisions(cls, tree: Any) -> Any:
        return with_revisions(tree, {"model": "revision", "adapter": "adapter_revision"})

    @model_validator(mode="after")
    def _one_shape_of_adapter(self) -> Self:
        if self.adapter is not None and self.lora.rank is not None:
            raise ValueError(
                f"policy.lora.rank is {self.lora.rank}, but policy.adapter {self.adapter!r} brings a rank of its own; "
                "set policy.lora.rank null, or merge that adapter into policy.model"
            )
        default = LoraConfig()
        for knob in ("alpha", "target_modules"):
            value = getattr(self.lora, knob)
            if self.lora.rank is None and value != getattr(default, knob):
                why = "there is no adapter" if self.adapter is None else "policy.adapter brings its own"
                raise ValueError(
                    f"policy.lora.{knob} is {value}, but policy.lora.rank is null: {why}; set policy.lora.rank, "
                    f"or leave policy.lora.{knob} out"
                )
        return self


class ReferenceConfig(Section):
    """The frozen reference that the KL is measured against."""

    model: ModelName | None = Field(default=None, description="folder or hub id; null: the initial policy")
    revision: str | None = Field(default=None, description="of the model, as policy.revision")
    adapter: ModelName | None = Field(
        default=None, description="LoRA adapter on it; null: policy.adapter where reference.model is null, else none"
    )
    adapter_revision: str | None = Field(default=None, description="of the adapter, as policy.revision")
    dtype: Dtype | None = Field(default=None, description="null: policy.dtype")
    batch_size: Positive = Field(default=64, description="responses read at a time, sorted by length")

    @model_validator(mode="before")
    @classmethod
    def _names_with_revisions(cls, tree: Any) -> Any:
        return with_revisions(tree, {"model": "revision", "adapter": "adapter_revision"})
