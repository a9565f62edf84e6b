"""What stages compute on: frozen dataclasses of padded tensors, and their way to and from Arrow.

    B responses (rows), Q prompts, P prompt tokens, R response tokens

Tensors are right-padded; a mask is True on real tokens. Padding exists only here: ``pad_lists`` and
``unpad_lists`` are the one pair of functions that cross between ragged columns and padded tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rlhf_core.contracts.config_io import canonical_json
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.records import read_json

Batch = TypeVar("Batch")

Message = dict[str, str]
"""{"role": ..., "content": ...}"""


def pad_lists(column: pa.ChunkedArray | pa.Array, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A list column as a right-padded tensor [rows, longest] of ``dtype`` and its mask (True = real)."""
    array = cast("pa.ListArray", column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column)
    lens = torch.from_numpy(array.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64))
    flat = torch.from_numpy(array.flatten().to_numpy(zero_copy_only=False).copy()).to(dtype)
    width = max(int(lens.max()) if len(lens) else 0, 1)
    mask = torch.arange(width)[None, :] < lens[:, None]
    padded = torch.zeros(mask.shape, dtype=dtype)
    padded[mask] = flat
    return padded, mask


def unpad_lists(tensor: Tensor, mask: Tensor, kind: pa.DataType) -> pa.ListArray:
    """The real entries of each row of a padded tensor, as a list column of ``kind``."""
    lens = mask.sum(dim=1).cpu().numpy()
    offsets = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
    flat = tensor.detach()[mask].cpu().numpy()
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, type=kind))


def _part(batch: object, rows: slice) -> dict[str, Any]:
    """Every column of a batch, cut to some rows."""
    return {name: None if column is None else column[rows] for name, column in vars(batch).items()}


@dataclass(frozen=True)
class Prompts:
    """The prompts of one iteration."""

    prompt_ids: Sequence[int]
    texts: Sequence[str]
    messages: Sequence[Sequence[Message]]
    tokens_QP: Tensor
    """int64"""
    mask_QP: Tensor
    num_truncated: Sequence[int]
    columns: Sequence[Mapping[str, Any]]
    """prompts.columns of each prompt, plain JSON, for reward functions."""

    def rows(self, rows: range) -> Prompts:
        """Some of them, as wide as before."""
        return Prompts(**_part(self, slice(rows.start, rows.stop)))

    def to_table(self) -> pa.Table:
        """As Arrow, schema SAMPLE_PROMPTS."""
        return pa.table(
            {
                "prompt_id": pa.array(self.prompt_ids, pa.int64()),
                "prompt_text": pa.array(self.texts, pa.string()),
                "messages": pa.array(
                    [list(m) for m in self.messages],
                    pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
                ),
                "prompt_tokens": unpad_lists(self.tokens_QP, self.mask_QP, pa.int32()),
                "num_truncated": pa.array(self.num_truncated, pa.int32()),
                "columns": pa.array([canonical_json(cells).decode() for cells in self.columns], pa.string()),
            }
        )

    @classmethod
    def from_table(cls, table: pa.Table) -> Prompts:
        """From Arrow, schema SAMPLE_PROMPTS."""
        tokens, mask = pad_lists(table["prompt_tokens"], torch.int64)
        return cls(
            prompt_ids=cast("list[int]", table["prompt_id"].to_pylist()),
            texts=cast("list[str]", table["prompt_text"].to_pylist()),
            messages=cast("list[list[Message]]", table["messages"].to_pylist()),
            tokens_QP=tokens,
            mask_QP=mask,
            num_truncated=cast("list[int]", table["num_truncated"].to_pylist()),
            columns=[
                read_json(cells.encode(), origin="a cell of the column columns")
                for cells in cast("list[str]", table["columns"].to_pylist())
            ],
        )


@dataclass(frozen=True)
class Support:
    """The tokens one response could have been sampled from, where top-k or top-p truncated them."""

    tokens: Tensor
    """int64 [sum of lens]: the ids kept at the first token, then at the second, ..."""
    lens: Tensor
    """int64 [response length]"""


@dataclass(frozen=True)
class Rollouts:
    """The responses of one iteration, and what the behaviour policy and critic said of them."""

    sample_ids: Sequence[str]
    prompt_ids: Sequence[int]
    """Row of each response's prompt in the prompt source."""
    prompt_rows: Tensor
    """int64 [B]: row of each response's prompt in Prompts."""
    sample_indices: Sequence[int]
    texts: Sequence[str]
    tokens_BR: Tensor
    """int64"""
    response_mask_BR: Tensor
    logprobs_BR: Tensor
    entropies_BR: Tensor
    values_BR: Tensor | None
    supports: Sequence[Support] | None
    finish_reasons: Sequence[str]

    def of_prompts(self, rows: range) -> Rollouts:
        """Those to some prompts, as wide as before; ``prompt_rows`` go on counting all prompts."""
        first, last = torch.searchsorted(self.prompt_rows, torch.tensor([rows.start, rows.stop])).tolist()
        return Rollouts(**_part(self, slice(first, last)))

    def to_table(self) -> pa.Table:
        """As Arrow, schema GENERATE."""
        rows, mask = len(self.sample_ids), self.response_mask_BR
        empty: list[list[int]] = [[]] * rows
        supports = self.supports
        values = empty if self.values_BR is None else unpad_lists(self.values_BR, mask, pa.float32())
        return pa.table(
            {
                "sample_id": pa.array(self.sample_ids, pa.string()),
                "prompt_id": pa.array(self.prompt_ids, pa.int64()),
                "sample_index": pa.array(self.sample_indices, pa.int32()),
                "response_text": pa.array(self.texts, pa.string()),
                "response_tokens": unpad_lists(self.tokens_BR, mask, pa.int32()),
                "logprobs": unpad_lists(self.logprobs_BR, mask, pa.float32()),
                "entropies": unpad_lists(self.entropies_BR, mask, pa.float32()),
                "values": pa.array(values, pa.list_(pa.float32())),
                "support_tokens": pa.array(
                    empty if supports is None else [s.tokens.numpy() for s in supports], pa.list_(pa.int32())
                ),
                "support_lens": pa.array(
                    empty if supports is None else [s.lens.numpy() for s in supports], pa.list_(pa.int32())
                ),
                "finish_reason": pa.array(self.finish_reasons, pa.string()),
            }
        )

    @classmethod
    def from_table(cls, table: pa.Table, prompts: Prompts) -> Rollouts:
        """From Arrow, schema GENERATE. Raises IntegrityError when a prompt_id is not in ``prompts``."""
        row_of = {prompt_id: row for row, prompt_id in enumerate(prompts.prompt_ids)}
        ids = cast("list[int]", table["prompt_id"].to_pylist())
        if not row_of.keys() >= set(ids):
            raise IntegrityError(f"rollouts name prompts that were not sampled: {sorted(set(ids) - set(row_of))[:5]}")
        prompt_rows = [row_of[i] for i in ids]
        if prompt_rows != sorted(prompt_rows):
            raise IntegrityError(f"the rollouts stand in another order than their prompts; {_COMPUTE_AGAIN}")
        tokens, mask = pad_lists(table["response_tokens"], torch.int64)
        values, values_mask = pad_lists(table["values"], torch.float32)
        support_tokens = cast("list[Any]", table["support_tokens"].to_pylist())
        support_lens = cast("list[Any]", table["support_lens"].to_pylist())
        supports = [
            Support(torch.tensor(t), torch.tensor(n)) for t, n in zip(support_tokens, support_lens, strict=True)
        ]
        return cls(
            sample_ids=cast("list[str]", table["sample_id"].to_pylist()),
            prompt_ids=ids,
            prompt_rows=torch.tensor(prompt_rows, dtype=torch.int64),
            sample_indices=cast("list[int]", table["sample_index"].to_pylist()),
            texts=cast("list[str]", table["response_text"].to_pylist()),
            tokens_BR=tokens,
            response_mask_BR=mask,
            logprobs_BR=pad_lists(table["logprobs"], torch.float32)[0],
            entropies_BR=pad_lists(table["entropies"], torch.float32)[0],
            values_BR=values if bool(values_mask.any()) else None,
            supports=supports if any(support_lens) else None,
            finish_reasons=cast("list[str]", table["finish_reason"].to_pylist()),
        )


@dataclass(frozen=True)
class Scores:
    """What the reward components said of each response."""

    sample_ids: Sequence[str]
    names: Sequence[str]
    components_BC: Tensor
    """float32 [B, components], raw; 0 where masked."""
    components_mask_BC: Tensor
    """bool: False where a component failed on a response and was dropped."""
    score_B: Tensor

    def to_table(self) -> pa.Table:
        """As Arrow, schema SCORE_REWARDS: a dropped component is not in the list of its response."""
        rows = [
            [{"name": n, "score": v} for n, v, kept in zip(self.names, values, mask, strict=True) if kept]
            for values, mask in zip(self.components_BC.tolist(), self.components_mask_BC.tolist(), strict=True)
        ]
        return pa.table(
            {
                "sample_id": pa.array(self.sample_ids, pa.string()),
                "components": pa.array(rows, pa.list_(pa.struct([("name", pa.string()), ("score", pa.float32())]))),
                "score": pa.array(self.score_B.numpy(), pa.float32()),
            }
        )

    @classmethod
    def from_table(cls, table: pa.Table, names: Sequence[str] | None = None) -> Scores:
        """From Arrow, schema SCORE_REWARDS.

        Args:
            table: of the artifact.
            names: of the components; None: those that appear, in the order in which they first do.
        """
        rows = cast("list[list[dict[str, Any]]]", table["components"].to_pylist())
        by_name = [{str(c["name"]): float(c["score"]) for c in row} for row in rows]
        names = names or list(dict.fromkeys(name for row in by_name for name in row))
        shape = len(rows), len(names)
        return cls(
            sample_ids=cast("list[str]", table["sample_id"].to_pylist()),
            names=names,
            components_BC=torch.tensor([[row.get(name, 0.0) for name in names] for row in by_name]).reshape(shape),
            components_mask_BC=torch.tensor([[n in row for n in names] for row in by_name], dtype=torch.bool).reshape(
                shape
            ),
            score_B=_floats(table, "score"),
        )


@dataclass(frozen=True)
class ReferenceLogprobs:
    """log π_ref of every response token."""

    sample_ids: Sequence[str]
    ref_logprobs_BR: Tensor
    response_mask_BR: Tensor

    def to_table(self) -> pa.Table:
        """As Arrow, schema REFERENCE_LOGPROBS."""
        return pa.table(
            {
                "sample_id": pa.array(self.sample_ids, pa.string()),
                "ref_logprobs": unpad_lists(self.ref_logprobs_BR, self.response_mask_BR, pa.float32()),
            }
        )

    @classmethod
    def from_table(cls, table: pa.Table) -> ReferenceLogprobs:
        """From Arrow, schema REFERENCE_LOGPROBS."""
        logprobs, mask = pad_lists(table["ref_logprobs"], torch.float32)
        return cls(cast("list[str]", table["sample_id"].to_pylist()), logprobs, mask)


@dataclass(frozen=True)
class Experience:
    """Shaped rewards and advantages: what the update learns from."""

    sample_ids: Sequence[str]
    score_B: Tensor
    score_normalized_B: Tensor
    score_clipped_B: Tensor
    score_shaped_B: Tensor
    kl_B: Tensor
    k3_B: Tensor
    rlhf_reward_B: Tensor
    token_kl_BR: Tensor
    rewards_BR: Tensor
    advantages_BR: Tensor
    returns_BR: Tensor | None
    response_mask_BR: Tensor

    def to_table(self) -> pa.Table:
        """As Arrow, schema SHAPE_REWARDS."""
        per_sample = ("score", "score_normalized", "score_clipped", "score_shaped", "kl", "k3", "rlhf_reward")
        per_token = ("token_kl", "rewards", "advantages")
        mask = self.response_mask_BR
        columns: dict[str, Any] = {"sample_id": pa.array(self.sample_ids, pa.string())}
        columns |= {name: pa.array(getattr(self, f"{name}_B").numpy(), pa.float32()) for name in per_sample}
        columns |= {name: unpad_lists(getattr(self, f"{name}_BR"), mask, pa.float32()) for name in per_token}
        no_returns: list[list[float]] = [[]] * len(self.sample_ids)
        returns = no_returns if self.returns_BR is None else unpad_lists(self.returns_BR, mask, pa.float32())
        columns["returns"] = pa.array(returns, pa.list_(pa.float32()))
        return pa.table(columns)

    @classmethod
    def from_table(cls, table: pa.Table) -> Experience:
        """From Arrow, schema SHAPE_REWARDS."""
        advantages, mask = pad_lists(table["advantages"], torch.float32)
        returns, returns_mask = pad_lists(table["returns"], torch.float32)
        return cls(
            sample_ids=cast("list[str]", table["sample_id"].to_pylist()),
            score_B=_floats(table, "score"),
            score_normalized_B=_floats(table, "score_normalized"),
            score_clipped_B=_floats(table, "score_clipped"),
            score_shaped_B=_floats(table, "score_shaped"),
            kl_B=_floats(table, "kl"),
            k3_B=_floats(table, "k3"),
            rlhf_reward_B=_floats(table, "rlhf_reward"),
            token_kl_BR=pad_lists(table["token_kl"], torch.float32)[0],
            rewards_BR=pad_lists(table["rewards"], torch.float32)[0],
            advantages_BR=advantages,
            returns_BR=returns if bool(returns_mask.any()) else None,
            response_mask_BR=mask,
        )


@dataclass(frozen=True)
class UpdateStatistics:
    """One record an optimiser step; keys are the columns of PPO_UPDATE."""

    steps: Sequence[dict[str, float | int | bool]]

    def to_table(self) -> pa.Table:
        """As Arrow, schema PPO_UPDATE."""
        return pa.Table.from_pylist([dict(step) for step in self.steps])


def check_aligned(sample_ids: Sequence[str], *others: Sequence[str]) -> None:
    """Raise IntegrityError unless all artifacts hold the same samples in the same order."""
    for other in others:
        if list(sample_ids) != list(other):
            raise IntegrityError(
                "the artifacts of this iteration hold different samples or another order: one of them was changed; "
                "delete that artifact with its manifest (.json), or all after 01_prompts, and resume: computed again"
            )


def check_as_long(sample_ids: Sequence[str], mask_BR: Tensor, **others_BR: Tensor) -> None:
    """Raise IntegrityError, naming samples, unless other artifacts have as many tokens of each response."""
    for name, other_BR in others_BR.items():
        bad_B = other_BR.sum(dim=1) != mask_BR.sum(dim=1)
        if bool(bad_B.any()):
            raise IntegrityError(
                f"{name} of {some_rows(sample_ids, bad_B)} is of another length than the response; {_COMPUTE_AGAIN}"
            )


def check_vocabulary(names: Sequence[object], tokens_BR: Tensor, num_tokens: int) -> None:
    """Raise IntegrityError, naming rows, for a token that the policy's vocabulary does not have; padding is 0."""
    bad_B = (tokens_BR >= num_tokens).any(dim=1)
    if bool(bad_B.any()):
        raise IntegrityError(
            f"token {int(tokens_BR.max())} in {some_rows(names, bad_B)} is not in the vocabulary of policy.model "
            f"(0 to {num_tokens - 1}); {_COMPUTE_AGAIN}"
        )


_COMPUTE_AGAIN = "delete that artifact with its manifest (.json) and resume, which computes it again"


def some_rows(names: Sequence[object], bad_B: Tensor) -> str:
    """How many rows are bad, and the first of them by name: ``4 of 64 rows (i0-p3-s0, i0-p5-s0, i0-p8-s1 …)``."""
    rows = cast("list[int]", bad_B.nonzero()[:, 0].tolist())
    shown = ", ".join(str(names[row]) for row in rows[:3])
    return f"{len(rows)} of {len(bad_B)} rows ({shown}{' …' if rows[3:] else ''})"


def _floats(table: pa.Table, name: str) -> Tensor:
    return torch.from_numpy(table[name].to_numpy().astype(np.float32, copy=True))


@dataclass(frozen=True)
class StageResult(Generic[Batch]):
    """What a stage returns: the content of its artifact, numbers for the tracker, and its part of the loop state."""

    batch: Batch
    metrics: Mapping[str, float]
    """Deterministic; names as in METRIC_MEANINGS."""
    state: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Plain JSON: the cursor after sample_prompts, the moments after shape_rewards, everything after ppo_update."""
    outputs: Mapping[str, str] = field(default_factory=dict[str, str])
    """Digests of results that are not in the artifact: the weights after ppo_update."""
    worker_s: float = 0.0
    """Wall-clock seconds for which workers were at it before; measured, so not part of any identity."""
