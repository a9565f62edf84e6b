"""The `generation` section of the config: how responses are sampled, and by what."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlhf_core.contracts.section import Fraction, Positive, PositiveFloat, Section

NUMBERLESS = frozenset({"python", "deadline_s"})
"""Knobs of vLLM that change no number; its version has an entry of its own in a run's identity."""

VLLM_OPTIONS: Final = frozenset(
    {"async_scheduling", "block_size", "cpu_offload_gb", "data_parallel_size", "disable_cascade_attn",
     "disable_custom_all_reduce", "disable_sliding_window", "enable_chunked_prefill", "enable_expert_parallel",
     "enable_prefix_caching", "enforce_eager", "gpu_memory_utilization", "kv_cache_dtype", "kv_cache_memory_bytes",
     "long_prefill_token_threshold", "max_long_partial_prefills", "max_model_len", "max_num_batched_tokens",
     "max_num_partial_prefills", "max_num_seqs", "max_parallel_loading_workers", "max_seq_len_to_capture",
     "num_gpu_blocks_override", "pipeline_parallel_size", "swap_space", "tensor_parallel_size"}
)  # fmt: skip
"""Arguments of ``vllm.LLM`` that say how it uses memory and devices, and load, contact or log nothing."""
KV_CACHE_DTYPES: Final = frozenset({"auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2"})


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
        """The interpreter as a command: a path from the root, or a name that is looked up in PATH."""
        return self.python or "python"

    @field_validator("python")
    @classmethod
    def _from_the_root(cls, python: str | None) -> str | None:
        if python is None or "/" not in python:
            return python
        try:
            path = str(Path(python).expanduser())
        except RuntimeError:
            path = python
        return os.path.abspath(path)  # noqa: PTH100 - a link tells Python its environment

    @field_validator("options")
    @classmethod
    def _harmless(cls, options: dict[str, bool | int | float | str]) -> dict[str, bool | int | float | str]:
        for name, value in options.items():
            if name not in VLLM_OPTIONS:
                close = difflib.get_close_matches(name, VLLM_OPTIONS, n=1)
                hint = f"did you mean {close[0]}?" if close else f"those that may be: {', '.join(sorted(VLLM_OPTIONS))}"
                raise ValueError(
                    f"options has {name!r}, which is no argument of vllm.LLM that a config may set; {hint}"
                )
            if isinstance(value, str) and (name != "kv_cache_dtype" or value not in KV_CACHE_DTYPES):
                kinds = (
                    f"one of {', '.join(sorted(KV_CACHE_DTYPES))}" if name == "kv_cache_dtype" else "a number or bool"
                )
                raise ValueError(f"the option {name} is a text; give {kinds}")
        return options


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
