"""One Arrow schema a stage, in flow order. ``RUN/iterations/000007/02_rollouts.arrow`` holds ``GENERATE``.

Tables are narrow and keyed: ``prompt_id`` joins prompts to rollouts, ``sample_id`` joins everything else.
Token columns are lists over the response's real tokens, in order: padding is never stored. All columns are
non-nullable. The schema's metadata carries the provenance (see :mod:`rlhf_core.contracts.artifacts`).
"""

from __future__ import annotations

from typing import Final

import pyarrow as pa

SCHEMA_VERSION: Final = 2


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


def _list(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", kind, nullable=False))


_TOKENS: Final = _list(pa.int32())
_FLOATS: Final = _list(pa.float32())
_MESSAGES: Final = _list(pa.struct([_required("role", pa.string()), _required("content", pa.string())]))
_COMPONENTS: Final = _list(pa.struct([_required("name", pa.string()), _required("score", pa.float32())]))

SAMPLE_PROMPTS: Final[pa.Schema] = pa.schema(
    [
        _required("prompt_id", pa.int64()),  # row of the prompt source
        _required("prompt_text", pa.string()),  # what the policy reads, chat template applied
        _required("messages", _MESSAGES),  # the conversation; empty for plain text
        _required("prompt_tokens", _TOKENS),
        _required("num_truncated", pa.int32()),  # tokens cut on the left
        _required("columns", pa.string()),  # the row's prompts.columns, a JSON object
    ]
)
"""One row a prompt."""

GENERATE: Final[pa.Schema] = pa.schema(
    [
        _required("sample_id", pa.string()),  # i000007-p000123-s0: iteration, prompt_id, sample_index
        _required("prompt_id", pa.int64()),
        _required("sample_index", pa.int32()),  # 0 .. samples_per_prompt - 1
        _required("response_text", pa.string()),  # without special tokens
        _required("response_tokens", _TOKENS),  # with the EOS, where there is one
        _required("logprobs", _FLOATS),  # of the behaviour policy π_old, at its temperature; nats
        _required("entropies", _FLOATS),  # of π_old at each token; nats
        _required("values", _FLOATS),  # V before each token; empty without a critic
        _required("support_tokens", _TOKENS),  # top-k / top-p: the ids kept at each token, one after another
        _required("support_lens", _TOKENS),  # how many of them belong to each token; empty without truncation
        _required("finish_reason", pa.string()),  # eos | stop | length
    ]
)
"""One row a response."""

SCORE_REWARDS: Final[pa.Schema] = pa.schema(
    [
        _required("sample_id", pa.string()),
        _required("components", _COMPONENTS),  # raw value of each reward component
        _required("score", pa.float32()),  # their weighted sum
    ]
)
"""One row a response."""

REFERENCE_LOGPROBS: Final[pa.Schema] = pa.schema(
    [
        _required("sample_id", pa.string()),
        _required("ref_logprobs", _FLOATS),  # of π_ref, at the same temperature and support; nats
    ]
)
"""One row a response."""

SHAPE_REWARDS: Final[pa.Schema] = pa.schema(
    [
        _required("sample_id", pa.string()),
        _required("score", pa.float32()),  # raw, as in 03
        _required("score_normalized", pa.float32()),  # after normalisation
        _required("score_clipped", pa.float32()),  # after clipping
        _required("score_shaped", pa.float32()),  # after missing-EOS and length penalties: enters rewards
        _required("kl", pa.float32()),  # k1 summed over the response; nats
        _required("k3", pa.float32()),  # k3 summed over the response; nats
        _required("rlhf_reward", pa.float32()),  # score_shaped - β·penalty: R(x, y)
        _required("token_kl", _FLOATS),  # k1 of each token
        _required("rewards", _FLOATS),
        _required("advantages", _FLOATS),
        _required("returns", _FLOATS),  # target of the value loss; empty without a critic
    ]
)
"""One row a response: the experience."""

PPO_UPDATE: Final[pa.Schema] = pa.schema(
    [
        _required("step", pa.int32()),
        _required("epoch", pa.int32()),
        _required("minibatch", pa.int32()),
        _required("num_samples", pa.int32()),
        _required("num_tokens", pa.int32()),
        _required("loss", pa.float32()),
        _required("policy_loss", pa.float32()),
        _required("value_loss", pa.float32()),
        _required("entropy", pa.float32()),
        _required("ref_k3", pa.float32()),  # k3 of the updated policy to the reference, per token
        _required("approx_kl", pa.float32()),  # to the behaviour policy, per token at either level
        _required("clip_fraction", pa.float32()),
        _required("value_clip_fraction", pa.float32()),
        _required("ratio_mean", pa.float32()),
        _required("max_abs_log_ratio", pa.float32()),
        _required("grad_norm", pa.float32()),  # before clipping
        _required("critic_grad_norm", pa.float32()),  # 0 unless the critic is separate
        _required("learning_rate", pa.float32()),
        _required("skipped", pa.bool_()),  # non-finite: the weights were left alone
    ]
)
"""One row an optimiser step."""
