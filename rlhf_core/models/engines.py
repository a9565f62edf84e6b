"""Engines of others that draw responses with the policy's weights; what is learned from them is computed here.

An engine draws in batches of its own making, so that a draw depends on the whole batch: the same on the same machine,
another with another batch. Its log-probs are those of its own arithmetic, and stand in the artifact as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from rlhf_core.contracts.errors import NumericalError, UserError
from rlhf_core.models.language_model import LanguageModel

TOKENS_AT_A_TIME, PAGE = 4096, 32
"""On a CPU, where the engine cannot ask how much memory there is: tokens of a pass, and of a page of its cache."""


@dataclass(frozen=True)
class Drawn:
    """A response as an engine has drawn it."""

    tokens: list[int]
    """With the token that ends it, where there is one."""
    logprobs: list[float]
    """Of each token, in the engine's arithmetic."""


def draw_with_transformers(
    policy: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    eos_ids: Sequence[int],
    pad_id: int,
    seed: int,
) -> list[Drawn]:
    """Responses by transformers' continuous batching over a paged cache, with the weights in memory.

    Args:
        policy: without adapters. Weights are taken as they are stored: a trained bfloat16 policy answers in float32.
        prompts: B token lists, k times the same for k responses.
        max_new_tokens: length limit of a response.
        temperature: divides the logits.
        eos_ids: tokens that end a response.
        pad_id: of the tokenizer.
        seed: of all draws together.
    Returns: B responses.
    Raises:
        UserError: the policy's architecture has no paged attention.
        NumericalError: a request failed in the engine.
    Source: ``transformers.generation.continuous_batching``.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model: Any = policy.model
    asked = [list(prompt) for prompt in prompts]
    longest = max(len(prompt) for prompt in asked) + max_new_tokens
    sizes: dict[str, Any] = {}
    if policy.device.type == "cpu":
        pages = len(asked) * -(-longest // PAGE)
        sizes = {"num_blocks": pages + 1, "page_size": PAGE, "max_batch_tokens": max(TOKENS_AT_A_TIME, longest)}
    batching = ContinuousBatchingConfig(return_logprobs=True, seed=seed % 2**32, use_async_batching=False, **sizes)
    sampling = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=list(eos_ids),
        pad_token_id=pad_id,
    )
    with _plain_attention(model), _drawing_only(policy):
        try:
            found = model.generate_batch(asked, generation_config=sampling, continuous_batching_config=batching)
        except (AttributeError, NotImplementedError, ValueError) as error:
            raise UserError(
                f"generation.engine transformers does not take a {type(model).__name__}: "
                f"{str(error).splitlines()[0]}; use generation.engine own"
            ) from error
    answers = [found.get(f"req_{number}") for number in range(len(asked))]
    for number, answer in enumerate(answers):
        if answer is None or answer.error or len(answer.logprobs) != len(answer.generated_tokens):
            reason = "it has no answer" if answer is None else answer.error or "log-probs are missing"
            raise NumericalError(
                f"transformers' engine failed with response {number} of {len(asked)}: {reason}; nothing of this stage "
                "is committed: resume, and if it comes back, use generation.engine own"
            )
    return [Drawn(list(answer.generated_tokens), list(answer.logprobs)) for answer in answers if answer is not None]


@contextlib.contextmanager
def _drawing_only(policy: LanguageModel) -> Iterator[None]:
    """The engine draws from whatever logits the head gives: within, those of the policy's tokens alone."""
    if policy.drawable is None:
        yield
        return
    head: Any = cast("Any", policy.model).get_output_embeddings()
    weight_VD, bias_V, num_tokens = head.weight, head.bias, policy.drawable.num_tokens
    head.weight = torch.nn.Parameter(weight_VD.detach()[:num_tokens], requires_grad=False)
    if bias_V is not None:
        head.bias = torch.nn.Parameter(bias_V.detach()[:num_tokens], requires_grad=False)
    try:
        yield
    finally:
        head.weight, head.bias = weight_VD, bias_V


@contextlib.contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """The engine makes its own attention out of a model's, and knows that of transformers alone."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
