"""Stage 2: the policy as it stands answers each prompt, k times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rlhf_core.batch_metrics import rollout_metrics
from rlhf_core.contracts.batches import Prompts, Rollouts, StageResult, some_rows
from rlhf_core.contracts.errors import NumericalError
from rlhf_core.contracts.generation_config import GenerationConfig
from rlhf_core.models.actor_critic import ActorCritic
from rlhf_core.models.decoding import Decoded, DecodingRules, decode
from rlhf_core.models.engines import Drawn, draw_with_transformers
from rlhf_core.models.sequences import Sequences, by_length
from rlhf_core.models.texts import StopDetector, prompt_ends, response_text
from rlhf_core.models.tokenizers import PolicyTokenizer
from rlhf_core.models.vllm_engine import draw_with_vllm
from rlhf_core.ops.randomness import seeded_generator, uniforms

CRITIC_ROWS = 64
"""Rows a separate critic reads at a time."""


def generate(
    actor_critic: ActorCritic,
    tokenizer: PolicyTokenizer,
    prompts: Prompts,
    config: GenerationConfig,
    *,
    samples_per_prompt: int,
    seed: int,
    iteration: int,
) -> StageResult[Rollouts]:
    """Sample responses, with behaviour log-probs, entropies and values.

    The draw of a response depends on (seed, iteration, prompt id, sample index) alone, unless another engine draws.

    Args:
        actor_critic: policy (π_old from here on) and critic; not changed.
        tokenizer: the policy's.
        prompts: of this iteration.
        config: temperature, truncation, stopping.
        samples_per_prompt: k.
        seed: the run's seed.
        iteration: from 0.
    Returns: k responses after one another for each prompt, and rollout metrics.
    Raises: NumericalError if the policy's log-probs are not finite.
    Source: ancestral sampling; :mod:`rlhf_core.models.decoding`.
    """
    rules = DecodingRules(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        eos_ids=tokenizer.eos_ids,
    )
    texts = _Texts(tokenizer, prompts, config.stop, samples_per_prompt)
    if config.engine != "own":
        drawn = _drawn_elsewhere(actor_critic, tokenizer, prompts, config, samples_per_prompt, (seed, iteration), texts)
        rollouts = _as_rollouts([drawn], prompts, texts, samples_per_prompt, iteration)
        rollouts = _evaluated(rollouts, prompts, actor_critic, config.temperature)
        _check_finite(rollouts)
        return StageResult(rollouts, rollout_metrics(rollouts))
    critic = actor_critic.critic
    value_of = critic.head.values if critic is not None and critic.trunk is None else None
    rows_at_once = max(1, (config.batch_size or len(prompts.prompt_ids) * samples_per_prompt) // samples_per_prompt)
    parts: list[Decoded] = []
    for start in range(0, len(prompts.prompt_ids), rows_at_once):
        part = slice(start, start + rows_at_once)
        ids = prompts.prompt_ids[part]
        parts.append(
            decode(
                actor_critic.policy,
                [t[m].tolist() for t, m in zip(prompts.tokens_QP[part], prompts.mask_QP[part], strict=True)],
                _uniforms(seed, iteration, ids, samples_per_prompt, config.max_new_tokens),
                samples_per_prompt=samples_per_prompt,
                rules=replace(rules, has_stop=texts.stop_detector(start * samples_per_prompt)),
                pad_id=tokenizer.pad_id,
                value_of=value_of,
            )
        )
    rollouts = _as_rollouts(parts, prompts, texts, samples_per_prompt, iteration)
    if critic is not None and critic.trunk is not None:
        rollouts = _with_values(rollouts, prompts, actor_critic)
    _check_finite(rollouts)
    return StageResult(rollouts, rollout_metrics(rollouts))


def _drawn_elsewhere(
    actor_critic: ActorCritic,
    tokenizer: PolicyTokenizer,
    prompts: Prompts,
    config: GenerationConfig,
    k: int,
    seeds: tuple[int, int],
    texts: _Texts,
) -> Decoded:
    """What another engine has drawn, cut where a stop sequence is complete; entropies and values are still missing."""
    asked = [t[m].tolist() for t, m in zip(prompts.tokens_QP, prompts.mask_QP, strict=True) for _ in range(k)]
    seed_of = [
        int(seeded_generator(seeds[0], "generate", seeds[1], prompt_id, sample).integers(2**32))
        for prompt_id in prompts.prompt_ids
        for sample in range(k)
    ]
    rules = {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "eos_ids": sorted(tokenizer.eos_ids),
    }
    if config.engine == "vllm":
        drawn = draw_with_vllm(actor_critic.policy, asked, config.vllm, seeds=seed_of, **rules)
    else:
        pad_id = tokenizer.pad_id
        drawn = draw_with_transformers(actor_critic.policy, asked, seed=seed_of[0], pad_id=pad_id, **rules)
    has_stop = texts.stop_detector(0)
    rows: list[Drawn] = []
    reasons: list[str] = []
    for row, each in enumerate(drawn):
        length = next((n for n in range(1, len(each.tokens) + 1) if has_stop and has_stop(row, each.tokens[:n])), None)
        kept = each if length is None else Drawn(each.tokens[:length], each.logprobs[:length])
        rows.append(kept)
        reasons.append("eos" if kept.tokens[-1] in tokenizer.eos_ids else "length" if length is None else "stop")
    lens_B = torch.tensor([len(row.tokens) for row in rows])
    mask_BR = torch.arange(int(lens_B.max())) < lens_B[:, None]
    tokens_BR = torch.full(mask_BR.shape, tokenizer.pad_id).masked_scatter(
        mask_BR, torch.tensor([token for row in rows for token in row.tokens])
    )
    logprobs_BR = torch.zeros(mask_BR.shape).masked_scatter(
        mask_BR, torch.tensor([logprob for row in rows for logprob in row.logprobs], dtype=torch.float32)
    )
    return Decoded(tokens_BR, mask_BR, logprobs_BR, torch.zeros_like(logprobs_BR), None, None, reasons)


@torch.no_grad()
def _evaluated(rollouts: Rollouts, prompts: Prompts, actor_critic: ActorCritic, temperature: float) -> Rollouts:
    """With the policy's entropies, and the critic's values."""
    sequences, critic = Sequences.build(prompts, rollouts), actor_critic.critic
    entropies_BR = torch.zeros_like(rollouts.logprobs_BR)
    values_BR = None if critic is None else torch.zeros_like(rollouts.logprobs_BR)
    for index in by_length(sequences.lens_B, CRITIC_ROWS):
        part = sequences.rows(index).to(actor_critic.policy.device)
        now = actor_critic.evaluate(part, temperature)
        width = now.entropies_BR.shape[1]
        entropies_BR[index, :width] = now.entropies_BR.cpu()
        if critic is not None and values_BR is not None:
            values_BR[index, :width] = part.scatter(critic.values(part, now.hidden_ND)).cpu()
    return Rollouts(**{**vars(rollouts), "entropies_BR": entropies_BR, "values_BR": values_BR})


def _uniforms(seed: int, iteration: int, prompt_ids: Sequence[int], k: int, length: int) -> Tensor:
    """[Q · k, length] float64: the draw of each token, from what each response is."""
    rows = [
        uniforms(length, seed, "generate", iteration, prompt_id, sample)
        for prompt_id in prompt_ids
        for sample in range(k)
    ]
    return torch.from_numpy(np.stack(rows))


class _Texts:
    """Texts of responses, each behind its own prompt; rows are those of the whole batch, k after k."""

    def __init__(self, tokenizer: PolicyTokenizer, prompts: Prompts, stop: list[str], k: int) -> None:
        self._tokenizer, self._k = tokenizer.tokenizer, k
        self._ends = prompt_ends(
            tokenizer.tokenizer,
            [t[m].tolist() for t, m in zip(prompts.tokens_QP, prompts.mask_QP, strict=True)],
        )
        self._detector = StopDetector(tokenizer.tokenizer, stop) if stop else None

    def text(self, row: int, token_ids: list[int]) -> str:
        return response_text(self._tokenizer, self._ends[row // self._k], token_ids)

    def stop_detector(self, first: int) -> Callable[[int, list[int]], bool] | None:
        """Whether a response contains a stop sequence; rows count from ``first`` on. None: there are none."""
        detector = self._detector
        if detector is None:
            return None
        return lambda row, token_ids: detector.has_stop(self._ends[(first + row) // self._k], token_ids)


def _as_rollouts(parts: list[Decoded], prompts: Prompts, texts: _Texts, k: int, iteration: int) -> Rollouts:
    width = max(part.tokens_BR.shape[1] for part in parts)

    def join(tensors: list[Tensor]) -> Tensor:
        return torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in tensors])

    tokens_BR, mask_BR = join([p.tokens_BR for p in parts]), join([p.mask_BR for p in parts])
    values = [part.values_BR for part in parts if part.values_BR is not None]
    supports = [support for part in parts for support in part.supports or []]
    rows = range(len(tokens_BR))
    prompt_ids = [prompts.prompt_ids[row // k] for row in rows]
    return Rollouts(
        sample_ids=[f"i{iteration:06d}-p{prompt_ids[row]:06d}-s{row % k}" for row in rows],
        prompt_ids=prompt_ids,
        prompt_rows=torch.arange(len(prompts.prompt_ids)).repeat_interleave(k),
        sample_indices=[row % k for row in rows],
        texts=[texts.text(row, tokens_BR[row][mask_BR[row]].tolist()) for row in rows],
        tokens_BR=tokens_BR,
        response_mask_BR=mask_BR,
        logprobs_BR=join([p.logprobs_BR for p in parts]),
        entropies_BR=join([p.entropies_BR for p in parts]),
        values_BR=join(values) if values else None,
        supports=supports or None,
        finish_reasons=[reason for part in parts for reason in part.finish_reasons],
    )


@torch.no_grad()
def _with_values(rollouts: Rollouts, prompts: Prompts, actor_critic: ActorCritic) -> Rollouts:
    """One pass of a separate critic over prompts and responses."""
    assert actor_critic.critic is not None
    sequences = Sequences.build(prompts, rollouts)
    values_BR = torch.zeros_like(rollouts.logprobs_BR)
    for index in by_length(sequences.lens_B, CRITIC_ROWS):
        part = sequences.rows(index).to(actor_critic.policy.device)
        part_values = part.scatter(actor_critic.critic.values(part, None)).cpu()
        values_BR[index, : part_values.shape[1]] = part_values
    return Rollouts(**{**vars(rollouts), "values_BR": values_BR})


def _check_finite(rollouts: Rollouts) -> None:
    mask_BR = rollouts.response_mask_BR
    finite_BR = torch.isfinite(rollouts.logprobs_BR) & torch.isfinite(rollouts.entropies_BR)
    if rollouts.values_BR is not None:
        finite_BR &= torch.isfinite(rollouts.values_BR)
    finite_BR |= ~mask_BR
    if not bool(finite_BR.all()):
        raise NumericalError(
            f"a log-prob, entropy or value is not finite in {some_rows(rollouts.sample_ids, (~finite_BR).any(dim=1))}: "
            "the weights of policy or critic have diverged, or generation.temperature is too small; nothing of this "
            "stage is committed: resume, and if it comes back, begin again with a lower ppo.learning_rate"
        )
