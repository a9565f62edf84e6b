"""The `policy` and `reference` sections of the config: which models, how they are held and computed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf_core.contracts.section import Dtype, ModelName, Positive, Section


class CriticConfig(Section):
    """The value function V."""

    kind: Literal["shared", "separate"] = Field(
        default="separate", description="shared: a head on the policy's trunk; separate: a model of its own"
    )
    init: Literal["zero", "policy", "reward"] = Field(
        default="policy",
        description="start of a separate critic: the policy's trunk, the first reward model, "
        "or zero (random trunk); the head starts at zero unless it comes with the reward model",
    )


class PolicyConfig(Section):
    """The trained policy and its critic."""

    model: ModelName = Field(default="", description="AutoModelForCausalLM folder or hub id")
    dtype: Dtype = Field(
        default="float32", description="compute type; bfloat16 keeps float32 master weights (autocast)"
    )
    pad_token: str | None = Field(
        default=None, description="token to pad with when the tokenizer has none, or one equal to EOS"
    )
    critic: CriticConfig = CriticConfig()


class ReferenceConfig(Section):
    """The frozen reference that the KL is measured against."""

    model: ModelName | None = Field(default=None, description="folder or hub id; null: the initial policy")
    dtype: Dtype | None = Field(default=None, description="null: policy.dtype")
    batch_size: Positive = Field(default=64, description="responses read at a time, sorted by length")
