"""The part of vLLM that :mod:`rlhf_core.models.vllm_process` asks, by transformers; and some of its misfortunes.

It stands in for vLLM in the tests' own environment, where it cannot be installed. With RLHF_VLLM_PYTHON set, the same
tests run against vLLM itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class SamplingParams:
    temperature: float
    max_tokens: int
    seed: int
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    detokenize: bool


@dataclass(frozen=True)
class Logprob:
    logprob: float


@dataclass
class CompletionOutput:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]]


@dataclass
class RequestOutput:
    outputs: list[CompletionOutput]


class LLM:
    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        skip_tokenizer_init: bool,
        logprobs_mode: str,
        disable_log_stats: bool,
        seed: int,
        enable_sleep_mode: bool,
        enforce_eager: bool,
        gpu_memory_utilization: float = 0.9,
        max_num_seqs: int = 256,
    ) -> None:
        assert (skip_tokenizer_init, logprobs_mode) == (True, "processed_logprobs"), "what the artifact needs"
        misfortune = os.environ.get("RLHF_VLLM_MISFORTUNE", "")
        if misfortune == "refuses":
            raise ValueError(f"max_num_seqs {max_num_seqs} does not fit")
        self._dtype, self._misfortune, self._forgotten = getattr(torch, dtype), misfortune, True
        self._load(model)

    def collective_rpc(self, method: str, kwargs: Mapping[str, Any]) -> None:
        assert method == "reload_weights", method
        self._load(kwargs["weights_path"])
        self._forgotten = False

    def reset_prefix_cache(self) -> None:
        self._forgotten = True

    def generate(
        self, prompts: Sequence[Mapping[str, list[int]]], sampling: Sequence[SamplingParams], *, use_tqdm: bool
    ) -> list[RequestOutput]:
        assert self._forgotten, "what is cached was computed with other weights"
        assert not use_tqdm, "stdout is for answers"
        print("vLLM prints what it likes")
        if self._misfortune == "dies":
            os._exit(3)
        if self._misfortune == "hangs":
            time.sleep(600)
        return [
            RequestOutput([self._response(prompt["prompt_token_ids"], how)])
            for prompt, how in zip(prompts, sampling, strict=True)
        ]

    @torch.no_grad()
    def _response(self, prompt: list[int], how: SamplingParams) -> CompletionOutput:
        generator, drawn = torch.Generator().manual_seed(how.seed), CompletionOutput([], [])
        for _ in range(how.max_tokens):
            logits = self._model(torch.tensor([prompt + drawn.token_ids])).logits[0, -1].float()
            logprobs = (logits / how.temperature).log_softmax(-1)
            token = int(torch.multinomial(logprobs.exp(), 1, generator=generator))
            drawn.token_ids.append(token)
            drawn.logprobs.append({token: Logprob(float(logprobs[token]))})
            if token in how.stop_token_ids:
                break
        return drawn

    def _load(self, folder: str) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=self._dtype).eval()
