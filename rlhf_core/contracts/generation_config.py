"""The `generation` section of the config: how responses are sampled, and by what."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from rlhf_core.contracts.section import Fraction, Positive, PositiveFloat, Section


class GenerationConfig(Section):
    """How responses are sampled."""

    engine: Literal["own", "transformers"] = Field(
        default="own",
        description="transformers: its continuous batching; draws then depend on the whole batch, and log-probs on its "
        "arithmetic: ppo.importance_threshold",
    )
    max_new_tokens: Positive = Field(default=64, description="length limit of a response, in tokens")
    temperature: PositiveFloat = Field(default=1.0, description="divides the logits in all three log-probs")
    top_k: Positive | None = Field(
        default=None, description="keep the k likeliest tokens; the support is stored and shared by all log-probs"
    )
    top_p: Fraction = Field(default=1.0, description="keep the smallest set of tokens with this much probability")
    stop: list[str] = Field(default=[], description="a response ends once its text contains one of these")
    batch_size: Positive | None = Field(default=None, description="responses decoded at a time; null: all")

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise ValueError("an empty stop sequence would end every response at once")
        return stop

    @model_validator(mode="after")
    def _whole_support(self) -> Self:
        if self.engine != "own" and (self.top_k is not None or self.top_p < 1.0):
            raise ValueError(
                f"generation.engine is {self.engine}, which does not tell the support of a truncated draw, and all "
                "three log-probs need it; leave top_k and top_p out, or use engine own"
            )
        return self
