"""Responses of one policy to all prompts of an evaluation, with their scores and KL.

The stages are used as they are. Samples are drawn in parts of PART_SIZE a prompt, so that a stopped evaluation goes
on from its last part, more samples are added to those there are, and memory stays bounded. The dice of sample i of a
prompt are the same for every policy.

Q prompts, K samples a prompt, B = Q K responses (prompt after prompt), R response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rlhf_core.contracts.batches import Prompts, Rollouts, pad_lists, unpad_lists
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.models.actor_critic import ActorCritic
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.tokenizers import PolicyTokenizer
from rlhf_core.ops.kl import token_kl
from rlhf_core.ops.randomness import seeded_generator
from rlhf_core.stages.generate import generate
from rlhf_core.stages.reference_logprobs import reference_logprobs

PART_SIZE = 32
"""Samples a prompt in one part. It belongs to the dice: sample i is draw i % 32 of part i // 32."""

PART: Final[pa.Schema] = pa.schema(
    [
        pa.field("prompt_id", pa.int64(), nullable=False),  # row of the prompt source
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("response_text", pa.string(), nullable=False),
        pa.field("response_tokens", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),  # eos | stop | length
        pa.field("score", pa.float32(), nullable=False),  # raw, as in 03_scores.arrow
        pa.field("kl", pa.float32(), nullable=False),  # k1 to the reference, summed over the response; nats
        pa.field("k3", pa.float32(), nullable=False),  # likewise
        pa.field("entropy", pa.float32(), nullable=False),  # of the policy, summed over the response; nats
    ]
)
"""One row a response, prompt after prompt; the samples of one policy in one part."""

_NUMBERS = ("score", "kl", "k3", "entropy")


@dataclass(frozen=True)
class Samples:
    """Responses of one policy, K to each prompt."""

    prompt_ids: Sequence[int]
    first_index: int
    """Index of each prompt's first sample here."""
    texts: list[str]
    """B"""
    finish_reasons: list[str]
    """B"""
    tokens_BR: Tensor
    mask_BR: Tensor
    score_QK: Tensor
    kl_QK: Tensor
    """k1 summed over the response; nats. 0 for the reference."""
    k3_QK: Tensor
    entropy_QK: Tensor

    @property
    def num_samples(self) -> int:
        """K."""
        return self.score_QK.shape[1]

    @property
    def len_QK(self) -> Tensor:
        """Response tokens, float64."""
        return self.mask_BR.sum(dim=1).double().view(self.score_QK.shape)

    @property
    def eos_QK(self) -> Tensor:
        """1 where the response ended with EOS, float64."""
        ended = [float(reason == "eos") for reason in self.finish_reasons]
        return torch.tensor(ended, dtype=torch.float64).view(self.score_QK.shape)

    def first(self, count: int) -> Samples:
        """The first ``count`` samples of each prompt."""
        rows = torch.arange(len(self.texts)).view(self.score_QK.shape)[:, :count].flatten()
        index = rows.tolist()
        return Samples(
            self.prompt_ids,
            self.first_index,
            [self.texts[i] for i in index],
            [self.finish_reasons[i] for i in index],
            self.tokens_BR[rows],
            self.mask_BR[rows],
            *(getattr(self, f"{name}_QK")[:, :count] for name in _NUMBERS),
        )

    def to_table(self) -> pa.Table:
        """As Arrow, schema PART."""
        count = self.num_samples
        columns: dict[str, Any] = {
            "prompt_id": np.repeat(np.asarray(self.prompt_ids), count),
            "sample_index": np.tile(np.arange(self.first_index, self.first_index + count), len(self.prompt_ids)),
            "response_text": self.texts,
            "response_tokens": unpad_lists(self.tokens_BR, self.mask_BR, pa.int32()),
            "finish_reason": self.finish_reasons,
        }
        columns |= {name: getattr(self, f"{name}_QK").flatten().numpy() for name in _NUMBERS}
        return pa.table({name: pa.array(columns[name], PART.field(name).type) for name in PART.names}, schema=PART)

    @classmethod
    def from_tables(cls, tables: Sequence[pa.Table], prompt_ids: Sequence[int]) -> Samples:
        """The samples of consecutive parts together. Raises IntegrityError if they are not of these prompts."""
        num_prompts, order = len(prompt_ids), []
        start = 0
        for table in tables:
            count = table.num_rows // num_prompts
            if table["prompt_id"].to_pylist() != [i for i in prompt_ids for _ in range(count)]:
                raise IntegrityError("the samples are of other prompts than the evaluation's")
            order.append(start + np.arange(table.num_rows).reshape(num_prompts, count))
            start += table.num_rows
        whole = pa.concat_tables(tables).take(pa.array(np.concatenate(order, axis=1).ravel()))
        tokens_BR, mask_BR = pad_lists(whole["response_tokens"], torch.int64)
        numbers = {
            f"{name}_QK": torch.from_numpy(whole[name].to_numpy().copy()).view(num_prompts, -1) for name in _NUMBERS
        }
        return cls(
            prompt_ids=list(prompt_ids),
            first_index=cast("int", tables[0]["sample_index"][0].as_py()),
            texts=cast("list[str]", whole["response_text"].to_pylist()),
            finish_reasons=cast("list[str]", whole["finish_reason"].to_pylist()),
            tokens_BR=tokens_BR,
            mask_BR=mask_BR,
            **numbers,
        )


def part_sizes(num_samples: int) -> list[int]:
    """Samples a prompt of each part: full ones, then the rest."""
    return [min(PART_SIZE, num_samples - start) for start in range(0, num_samples, PART_SIZE)]


def draw_part(
    policy: LanguageModel,
    reference: LanguageModel,
    score: Callable[[Prompts, Rollouts], Tensor],
    tokenizer: PolicyTokenizer,
    prompts: Prompts,
    config: RunConfig,
    *,
    part: int,
    num_samples: int,
) -> Samples:
    """Sample, score and compare with the reference: ``num_samples`` responses to each prompt.

    Args:
        policy: that answers; where it is the reference itself, no KL is computed: it is 0.
        reference: π_ref, frozen.
        score: the score of each response, [B].
        tokenizer: the policy's.
        prompts: of the evaluation.
        config: generation, reference, seed.
        part: from 0.
        num_samples: at most PART_SIZE.
    Returns: the samples with index part · PART_SIZE and following.
    Raises: NumericalError if a log-prob or score is not finite.
    Source: definition.
    """
    rollouts, kl_B, k3_B = draw_responses(
        policy, reference, tokenizer, prompts, config, part=part, num_samples=num_samples
    )
    shape = (len(prompts.prompt_ids), num_samples)
    return Samples(
        prompt_ids=list(prompts.prompt_ids),
        first_index=part * PART_SIZE,
        texts=list(rollouts.texts),
        finish_reasons=list(rollouts.finish_reasons),
        tokens_BR=rollouts.tokens_BR,
        mask_BR=rollouts.response_mask_BR,
        score_QK=score(prompts, rollouts).float().view(shape),
        kl_QK=kl_B.view(shape),
        k3_QK=k3_B.view(shape),
        entropy_QK=rollouts.entropies_BR.sum(dim=1).view(shape),
    )


def draw_responses(
    policy: LanguageModel,
    reference: LanguageModel,
    tokenizer: PolicyTokenizer,
    prompts: Prompts,
    config: RunConfig,
    *,
    part: int,
    num_samples: int,
) -> tuple[Rollouts, Tensor, Tensor]:
    """Sample and compare with the reference; arguments as in :func:`draw_part`.

    Returns: the responses, and the KL of each by k1 and by k3, summed over its tokens; nats.
    Raises: NumericalError if a log-prob is not finite.
    Source: definition.
    """
    rollouts = generate(
        ActorCritic(policy, None),
        tokenizer,
        prompts,
        config.generation,
        samples_per_prompt=num_samples,
        seed=evaluation_seed(config.seed),
        iteration=part,
    ).batch
    if policy is reference:
        return rollouts, torch.zeros(len(rollouts.texts)), torch.zeros(len(rollouts.texts))
    ref_logprobs_BR = reference_logprobs(
        reference, prompts, rollouts, config.reference, temperature=config.generation.temperature
    ).batch.ref_logprobs_BR
    kl_B, k3_B = (
        token_kl(rollouts.logprobs_BR, ref_logprobs_BR, rollouts.response_mask_BR, estimator=estimator).sum(dim=1)
        for estimator in ("k1", "k3")
    )
    return rollouts, kl_B, k3_B


def evaluation_seed(seed: int) -> int:
    """The seed of an evaluation's draws, none of which a training run with the same seed has seen."""
    return int(seeded_generator(seed, "evaluate").integers(2**63 - 1))
