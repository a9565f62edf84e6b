"""Memory of a device, part by part, at the moments when it is fullest.

With P trained parameters of policy and critic, n devices that share them (fully sharded: weights, gradients, moments):

    weights and moments       12 · P / n       float32 master weights, AdamW's two moments
    gradients                  4 · P / n       there from the first backward pass of a step to the beginning of the next
    activations               of a micro-batch, kept for the backward pass: `kept_bytes`; with recomputation a layer's
                              input alone, and all of one layer
    cast weights               2 · linear      bfloat16 copies of float32 weights, which a pass keeps for its backward
    keys and values           responses decoded at a time x (prompt + longest response) x layers x their width
    logits                    as :func:`rlhf_core.ops.logprobs.logits_at_a_time` bounds them; in decoding, all of a step

An update is fullest either where its first backward pass begins (activations, no gradients yet), or at its end
(gradients). Both are there together with several micro-batches a step, and in the passes that are written out for a
CPU, whose backward is one function. Between updates the last gradients stay. Workers, which compute shards, generate,
score and read with whole models of their own: policy and critic in float32, as they load them. On several devices each
has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rlhf_core.costs.hardware import Hardware
from rlhf_core.costs.operations import Shape
from rlhf_core.costs.workload import BYTES, Model, Workload
from rlhf_core.ops.logprobs import logits_at_a_time

LIVE_LOGITS: Final = 3
"""Tensors as large as a decoding step's logits that are there at a time."""
MAX_SCORES_LEN: Final = 512
"""Rows up to this length keep their attention weights in the passes that are written out for GPT-2 on a CPU."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device by moment, and of what they are."""

    moments: dict[str, dict[str, float]]
    """generate, passes, update -> part -> bytes."""

    @property
    def fullest(self) -> str:
        """The moment that needs most."""
        return max(self.moments, key=self.at)

    @property
    def peak_bytes(self) -> float:
        """At that moment."""
        return self.at(self.fullest)

    def at(self, moment: str) -> float:
        """All parts of a moment."""
        return sum(self.moments[moment].values())


@dataclass(frozen=True)
class Overhead:
    """What was measured beside the parts that are counted."""

    process_bytes: float
    """Libraries, before anything is loaded."""
    share: float
    """Of all counted parts: temporaries of an operation, and freed memory that the heap keeps."""


def device_memory(work: Workload, hardware: Hardware, overhead: Overhead) -> DeviceMemory:
    """Memory of a device.

    Args:
        work: of one device.
        hardware: whose device it is.
        overhead: of devices of its kind.
    """
    base = _resident(work)
    gradients = 4 * work.trained / work.devices
    frozen = _frozen(work)
    stays = frozen if work.frozen_stay else {}
    copies = _generating_copies(work)
    update = _update(work, is_cpu=hardware.kind.is_cpu)
    moments = {
        "generate": {**base, "gradients": gradients, **copies, **stays, **_decoding(work)},
        "passes": {**base, "gradients": gradients, **copies, **frozen, **_passes(work, is_cpu=hardware.kind.is_cpu)},
    }
    has_gradients = work.micro_batches > 1 or hardware.kind.is_cpu
    update_start = {**base, **copies, **stays, **update}
    moments["update"] = update_start | ({"gradients": gradients} if has_gradients else {})
    moments["end of the update"] = {**base, "gradients": gradients, **copies, **stays}
    return DeviceMemory({name: _with_overhead(parts, overhead) for name, parts in moments.items()})


def _with_overhead(parts: dict[str, float], overhead: Overhead) -> dict[str, float]:
    beside = {"temporaries, heap": overhead.share * sum(parts.values()), "libraries": overhead.process_bytes}
    return {name: size for name, size in (parts | beside).items() if size}


def kept_bytes(shape: Shape, dtype: str, *, rows: int, row_len: int, is_cpu: bool) -> float:
    """Activations of all layers that a backward pass needs.

    In float32 all numbers that a layer computes; in bfloat16 the residual stream and what norms keep stay float32, and
    GELU keeps no gate. GPT-2's own passes (float32, CPU) keep the attention weights of short rows.

    Args:
        shape: of the model.
        dtype: of the computation.
        rows: of the micro-batch.
        row_len: tokens read of a row.
        is_cpu: rather than a GPU.
    """
    d, attention = shape.hidden_size, 2 * shape.attention_width + shape.kv_width
    if dtype == "float32":
        each = 4 * (4 * d + attention + (4 if shape.is_gated else 3) * shape.mlp_width)
    else:
        each = 4 * 2 * d + 2 * (2 * d + attention + (4 if shape.is_gated else 2) * shape.mlp_width)
    if shape.is_gated:
        each += 2 * 2 * 4 * d  # norms without a mean are spelled out, and keep what they normalised
    if is_cpu and dtype == "float32" and not shape.is_gated and row_len <= MAX_SCORES_LEN:
        each += 4 * row_len * shape.heads
    return rows * row_len * shape.layers * each


def _resident(work: Workload) -> dict[str, float]:
    trunk = work.policy.stored_bytes if work.adapter else 0
    return {
        "frozen trunk": trunk / work.devices,
        "trained weights": 4 * work.trained / work.devices,
        "AdamW's moments": 8 * work.trained / work.devices,
    }


def _frozen(work: Workload) -> dict[str, float]:
    reference = 0 if work.reference_shares_trunk else work.reference.stored_bytes
    rewards = sum(reward.stored_bytes for reward in work.rewards)
    holders = max(1, work.workers)
    return {"reference": reference * holders, "reward models": rewards * holders}


def _generating_copies(work: Workload) -> dict[str, float]:
    """Whole models of workers, beside what is trained."""
    policy = work.policy.stored_bytes if work.adapter else 4 * work.policy.parameters
    critic = 4 * work.critic.parameters if work.critic else 0
    return {"whole copies that generate": (policy + critic) * work.workers}


def _decoding(work: Workload) -> dict[str, float]:
    shape, columns = work.policy.shape, work.prompt_len + work.longest_response
    cache = work.decoding_rows * columns * shape.layers * shape.kv_width * BYTES[work.policy.dtype]
    return {
        "cast weights": work.policy.cast_bytes * max(1, work.workers),
        "keys and values": cache,
        "logits": 4 * LIVE_LOGITS * work.decoding_rows * shape.vocabulary,
    }


def _passes(work: Workload, *, is_cpu: bool) -> dict[str, float]:
    """A reading pass keeps nothing but what the operation that it is in needs, and the residual stream."""
    shape, rows = work.reference.shape, min(work.reference_rows, work.rows)
    mlp = (3 if shape.is_gated else 2) * shape.mlp_width
    attention = 2 * shape.attention_width + shape.kv_width
    each = 4 * 2 * shape.hidden_size + BYTES[work.reference.dtype] * max(attention, mlp)
    held = min(logits_at_a_time("cpu" if is_cpu else "cuda"), rows * work.response_len * shape.vocabulary)
    return {"activations": rows * work.read * each, "logits": 4 * held}


def _update(work: Workload, *, is_cpu: bool) -> dict[str, float]:
    rows, n = work.micro_batch_rows, work.devices
    activations = cast = 0.0
    for model in (work.policy, work.critic):
        if model is None:
            continue
        whole = kept_bytes(model.shape, model.dtype, rows=rows, row_len=work.read, is_cpu=is_cpu)
        if work.recomputes:
            whole = whole / model.shape.layers + 4 * rows * work.read * model.shape.layers * model.shape.hidden_size
        activations += whole
        cast += _pass_weights(model, n)
    shape = work.policy.shape
    held = min(logits_at_a_time("cpu" if is_cpu else "cuda"), rows * work.response_len * shape.vocabulary)
    return {"cast weights": cast, "activations": activations, "logits": 4 * held}


def _pass_weights(model: Model, devices: int) -> float:
    """Beside a device's own: bfloat16 copies of all; of shards two gathered layers, and what lies around the layers."""
    if devices == 1:
        return model.cast_bytes
    shape = model.shape
    of_layers = 2 * shape.linear_parameters / max(1, shape.layers)
    return model.cast_bytes + 4 * (of_layers + model.parameters - shape.linear_parameters)
