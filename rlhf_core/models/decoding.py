"""Sampling responses: prefill each prompt once, then one token a step for the rows still going.

Knows language models and uniform numbers; knows nothing of rewards, PPO, files or where numbers come from.
A prompt's k samples share its prefill. Log-probs and entropies are those the token was drawn from, taken
from the same [b, V] logits: no [B, R, V] tensor ever exists. Rows that finished leave the batch.

B responses, b rows still going, Q prompts, P prompt tokens, R response tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_core.contracts.batches import Support
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.ops.sampling import Draw, sample


@dataclass(frozen=True)
class DecodingRules:
    """When a token may be drawn, and when a response ends."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    eos_ids: frozenset[int]
    has_stop: Callable[[int, list[int]], bool] | None = None
    """Whether the tokens so far of a row contain a stop sequence."""


@dataclass
class Decoded:
    """Responses in the order of the prompts, k after k."""

    tokens_BR: Tensor
    mask_BR: Tensor
    logprobs_BR: Tensor
    entropies_BR: Tensor
    values_BR: Tensor | None
    supports: list[Support] | None
    finish_reasons: list[str]


@dataclass
class _Record:
    """What is written down while decoding; rows are those of the whole batch, zero after a response's end."""

    tokens_BR: Tensor
    mask_BR: Tensor
    logprobs_BR: Tensor
    entropies_BR: Tensor
    values_BR: Tensor | None
    met_eos_B: Tensor
    met_stop_B: Tensor
    support_tokens: list[list[Tensor]]

    def write(self, rows_b: Tensor, going_b: Tensor, step: int, draw: Draw, values_b: Tensor | None) -> None:
        self.tokens_BR[rows_b, step] = draw.tokens_B * going_b
        self.mask_BR[rows_b, step] = going_b
        self.logprobs_BR[rows_b, step] = draw.logprobs_B.where(going_b, 0.0)
        self.entropies_BR[rows_b, step] = draw.entropies_B.where(going_b, 0.0)
        if values_b is not None and self.values_BR is not None:
            self.values_BR[rows_b, step] = values_b.where(going_b, 0.0)
        if draw.support_BV is not None:
            for row, kept_V in zip(rows_b[going_b].tolist(), draw.support_BV[going_b].cpu(), strict=True):
                self.support_tokens[row].append(kept_V.nonzero()[:, 0])


@torch.no_grad()
def decode(
    policy: LanguageModel,
    prompts: Sequence[Sequence[int]],
    uniforms_BR: Tensor,
    *,
    samples_per_prompt: int,
    rules: DecodingRules,
    pad_id: int,
    value_of: Callable[[Tensor], Tensor] | None = None,
) -> Decoded:
    """Sample ``samples_per_prompt`` responses for each prompt.

    Args:
        policy: the behaviour policy.
        prompts: Q token lists.
        uniforms_BR: [B, max_new_tokens] float64 in [0, 1): the draw of each token, B = Q · k.
        samples_per_prompt: k.
        rules: sampling and stopping.
        pad_id: fills prompts on the left.
        value_of: from hidden states [b, D] to values [b], where a critic shares the trunk.
    Returns: tensors on the CPU.
    """
    device, num_rows = policy.device, len(prompts) * samples_per_prompt
    record = _new_record(num_rows, rules, value_of is not None, device)
    prefix = policy.prefix(prompts, samples_per_prompt, rules.max_new_tokens, pad_id=pad_id)
    rows_b = torch.arange(num_rows, device=device)
    going_b = torch.ones(num_rows, dtype=torch.bool, device=device)
    uniforms_BR = (uniforms_BR.float() if device.type == "mps" else uniforms_BR).to(device)  # mps has no float64
    projection = policy.projection().prepared()
    eos = torch.tensor(sorted(rules.eos_ids), device=device)
    for step in range(rules.max_new_tokens):
        logits_bV = projection.logits(prefix.hidden_bD, rules.temperature)
        draw = sample(logits_bV, uniforms_BR[rows_b, step], top_k=rules.top_k, top_p=rules.top_p)
        record.write(rows_b, going_b, step, draw, None if value_of is None else value_of(prefix.hidden_bD))
        is_eos_b = going_b & torch.isin(draw.tokens_B, eos)
        record.met_eos_B[rows_b] |= is_eos_b
        going_b, tokens_b = going_b & ~is_eos_b, draw.tokens_B
        if rules.has_stop is not None:
            going_b &= ~_stopped(record, rows_b, going_b, step, rules.has_stop)
        if step == rules.max_new_tokens - 1:
            break
        if (step + 1) % prefix.steps_between_checks == 0:
            num_going = int(going_b.sum())
            if num_going == 0:
                break
            if num_going < prefix.compact_below * len(rows_b):
                keep = going_b.nonzero()[:, 0]
                prefix.select(keep)
                rows_b, tokens_b, going_b = rows_b[keep], tokens_b[keep], going_b[keep]
        prefix.advance(tokens_b)
    return _finish(record)


def _new_record(rows: int, rules: DecodingRules, has_values: bool, device: torch.device) -> _Record:
    def zeros(dtype: torch.dtype) -> Tensor:
        return torch.zeros(rows, rules.max_new_tokens, dtype=dtype, device=device)

    return _Record(
        tokens_BR=zeros(torch.int64),
        mask_BR=zeros(torch.bool),
        logprobs_BR=zeros(torch.float32),
        entropies_BR=zeros(torch.float32),
        values_BR=zeros(torch.float32) if has_values else None,
        met_eos_B=torch.zeros(rows, dtype=torch.bool, device=device),
        met_stop_B=torch.zeros(rows, dtype=torch.bool, device=device),
        support_tokens=[[] for _ in range(rows)],
    )


def _stopped(
    record: _Record, rows_b: Tensor, check_b: Tensor, step: int, has_stop: Callable[[int, list[int]], bool]
) -> Tensor:
    """[b] bool: rows whose response now contains a stop sequence; notes their finish reason."""
    stopped_b = torch.zeros_like(check_b)
    for i in check_b.nonzero()[:, 0].tolist():
        row = int(rows_b[i])
        if has_stop(row, record.tokens_BR[row, : step + 1].tolist()):
            stopped_b[i] = record.met_stop_B[row] = True
    return stopped_b


def _finish(record: _Record) -> Decoded:
    width = int(record.mask_BR.sum(dim=1).max())
    supports = None
    if any(record.support_tokens):
        supports = [
            Support(tokens=torch.cat(kept).cpu(), lens=torch.tensor([len(ids) for ids in kept]))
            for kept in record.support_tokens
        ]
    return Decoded(
        tokens_BR=record.tokens_BR[:, :width].cpu(),
        mask_BR=record.mask_BR[:, :width].cpu(),
        logprobs_BR=record.logprobs_BR[:, :width].cpu(),
        entropies_BR=record.entropies_BR[:, :width].cpu(),
        values_BR=None if record.values_BR is None else record.values_BR[:, :width].cpu(),
        supports=supports,
        finish_reasons=[
            "eos" if eos else "stop" if stop else "length"
            for eos, stop in zip(record.met_eos_B.tolist(), record.met_stop_B.tolist(), strict=True)
        ],
    )
