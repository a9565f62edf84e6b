"""The `generation` section of the config: how responses are sampled, and by what."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from rlhf_core.contracts.section import Fraction, Positive, PositiveFloat, Section

NUMBERLESS = frozenset({"python", "deadline_s"})
"""Knobs of vLLM that change no number; its version has an entry of its own in a run's identity."""


class VllmConfig(Section):
    """The vLLM of ``generation.engine: vllm``."""

    python: str | None = Field(
        default=None,
        description="interpreter of an environment with vLLM, which Prefect's cannot have: ~/vllm/bin/python; changes "
        "no number, vLLM's version does",
    )
    options: dict[str, bool | int | float | str] = Field(
        default={},
        description="arguments of vllm.LLM: {gpu_memory_utilization: 0.5, max_model_len: 2048}",
    )
    deadline_s: PositiveFloat = Field(
        default=1800.0, description="how long it may take, in seconds, to start, or to answer; changes no number"
    )

    @property
    def interpreter(self) -> str:
        """The interpreter as a command."""
        return str(Path(self.python or "python").expanduser())


class GenerationConfig(Section):
    """How responses are sampled."""

    engine: Literal["own", "transformers", "vllm"] = Field(
        default="own",
        description="transformers: its continuous batching; vllm: beside, in an environment of its own; draws and "
        "log-probs are then of its arithmetic: ppo.importance_threshold",
    )
    vllm: VllmConfig = VllmConfig()
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
    def _vllm_is_somewhere(self) -> Self:
        if self.engine == "vllm" and not self.vllm.python:
            raise ValueError(
                "generation.engine is vllm, but generation.vllm.python is not set; give the interpreter of an "
                "environment that has it: python -m venv ~/vllm && ~/vllm/bin/pip install vllm, then ~/vllm/bin/python"
            )
        return self

    @model_validator(mode="after")
    def _whole_support(self) -> Self:
        if self.engine != "own" and (self.top_k is not None or self.top_p < 1.0):
            raise ValueError(
                f"generation.engine is {self.engine}, which does not tell the support of a truncated draw, and all "
                "three log-probs need it; leave top_k and top_p out, or use engine own"
            )
        return self
