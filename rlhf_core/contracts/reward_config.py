"""The `reward` section of the config: components, and how they combine."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from rlhf_core.contracts.section import Dtype, ModelName, Positive, Section


class ModelReward(Section):
    """A reward model: one logit, read at the last token of prompt + response."""

    kind: Literal["model"] = "model"
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="null: rewardN")
    model: ModelName = Field(default="", description="AutoModelForSequenceClassification folder or hub id")
    weight: float = Field(default=1.0, description="factor in the weighted sum")
    dtype: Dtype = "float32"
    batch_size: Positive = Field(default=64, description="responses scored at a time")
    max_len: Positive | None = Field(default=None, description="tokens read; null: the model's context length")


class RewardConfig(Section):
    """The score of a response: a weighted sum of components."""

    components: list[ModelReward] = Field(default=[], description="at least one component")

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        names = self.names
        if len(set(names)) != len(names):
            raise ValueError(f"reward.components have the same name twice: {', '.join(names)}")
        return self

    @property
    def names(self) -> list[str]:
        """Name of each component, in order."""
        return [c.name or f"reward{i}" for i, c in enumerate(self.components)]
