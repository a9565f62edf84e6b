"""Seconds of each stage: a sum of terms, each what the hardware could do at best, times a fitted coefficient.

    seconds = Σ_t c_t · ideal_t        c_t ≥ 0; 1 / c_t is the share of peak or bandwidth that is reached

    products         operations / peak                               c: Williams et al. 2009 ("roofline"), as a sum
    traffic          bytes of activations written and read / bandwidth
    logits           4 · positions · V bytes / bandwidth, of passes over whole sequences
    weights          bytes of all weights / bandwidth, at each step of decoding
    cache            bytes of keys and values looked at / bandwidth, in decoding
    sampling         4 · V bytes / bandwidth for each token that is drawn
    decoding_calls   layers x steps of decoding                      c: seconds of a layer's calls
    calls            layers x passes, forward and backward           c: seconds likewise
    optimizer        36 bytes a trained parameter and step / bandwidth: AdamW reads p, g, m, v and writes p, m, v (28);
                     the norm and its clipping read g and write it   (8)
    digest           4 bytes a trained parameter / (1 GB/s x threads): SHA-256 of what was trained, on the host
    stage            1: reading and writing artifacts                c: seconds
    start            1: beginning to decode                          c: seconds
    collectives      bytes that a ring hands on / its bandwidth; nothing is overlapped
    files            bytes of weights handed to generating processes / 1 GB/s

Operations are those of :mod:`rlhf_core.costs.operations`. Of a ring over n devices each hands on (n - 1) / n of what is
gathered or scattered. A micro-batch gathers the weights, as they are stored, for its forward and for its backward pass,
and scatters float32 gradients of what is trained (Rajbhandari et al. 2020, ZeRO stage 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from rlhf_core.costs.hardware import Hardware
from rlhf_core.costs.operations import Shape
from rlhf_core.costs.workload import BYTES, Model, Workload

TIMED_STAGES: Final = ("generate", "score_rewards", "reference_logprobs", "ppo_update")
DIGEST_BYTES_PER_S: Final = 1e9
FILE_BYTES_PER_S: Final = 1e9
OPTIMIZER_BYTES: Final = 36
FORWARD_AND_BACKWARD: Final = 3
CRITIC_ROWS: Final = 64

Terms = dict[str, float]


def stage_terms(work: Workload, hardware: Hardware, threads: int) -> dict[str, Terms]:
    """Stage -> term -> ideal seconds (or a count, where the coefficient is in seconds).

    Args:
        work: of one device.
        hardware: all of it.
        threads: of the host, for digests.
    """
    costs = _Costs(hardware, threads)
    return {
        "generate": costs.generate(work),
        "score_rewards": costs.score(work),
        "reference_logprobs": costs.reference(work),
        "ppo_update": costs.update(work),
    }


def seconds_of(terms: Mapping[str, float], coefficients: Mapping[str, float]) -> float:
    """Their sum. Raises KeyError for a term without a coefficient."""
    return sum(coefficients[name] * ideal for name, ideal in terms.items())


class _Costs:
    """Ideal seconds on a device.

    Args:
        hardware: whose device it is.
        threads: of its host.
    """

    def __init__(self, hardware: Hardware, threads: int) -> None:
        self._hardware, self._kind, self._threads = hardware, hardware.kind, threads

    def generate(self, work: Workload) -> Terms:
        shape, width = work.policy.shape, BYTES[work.policy.dtype]
        p, r, rows = work.prompt_len, work.response_len, work.rows
        groups = -(-rows // work.decoding_rows)
        steps = groups * (work.longest_response - 1)
        contexts = rows * sum(range(p + 1, p + r))
        weights = shape.linear_parameters + shape.vocabulary * shape.hidden_size
        operations = work.prompts * shape.trunk(p) + rows * (shape.trunk(r - 1, before=p) + shape.logits(r))
        decoding = {
            "products": self._products(operations, work.policy),
            "traffic": self._traffic(shape, work.prompts * p, width),
            "weights": self._moved(steps * weights * width),
            "cache": self._moved(contexts * shape.layers * shape.kv_width * width),
            "sampling": self._moved(4 * rows * r * shape.vocabulary),
            "decoding_calls": steps * shape.layers,
            "calls": groups * shape.layers,
            "stage": 1,
            "start": groups,
        }
        values = {} if work.critic is None else self._forward(work.critic, rows, work.read, CRITIC_ROWS)
        handed_out = 2 * 4 * work.trained if work.workers else 0  # written once, read by each node
        return _added(decoding, values, {"files": handed_out / FILE_BYTES_PER_S})

    def score(self, work: Workload) -> Terms:
        passes = (self._forward(r, work.rows, work.read + 1, work.reward_rows, at_once=2) for r in work.rewards)
        return _added({"stage": 1}, *passes)

    def reference(self, work: Workload) -> Terms:
        positions = work.rows * work.response_len
        trunk = self._forward(work.reference, work.rows, work.read, work.reference_rows, at_once=2)
        return _added({"stage": 1}, trunk, self._logits(work.reference, positions, 1, at_once=2))

    def update(self, work: Workload) -> Terms:
        """Epochs of minibatches; with LoRA the backward pass has no gradients of weights, half of it."""
        models = [model for model in (work.policy, work.critic) if model is not None]
        positions = work.minibatch_rows * work.response_len
        step = _added(
            *(self._trained(work, model) for model in models),
            self._logits(work.policy, positions, FORWARD_AND_BACKWARD - bool(work.adapter)),
            {"optimizer": self._moved(OPTIMIZER_BYTES * work.trained / work.devices)},
        )
        digest = 4 * work.trained / (DIGEST_BYTES_PER_S * self._threads)
        return _added({name: work.steps * ideal for name, ideal in step.items()}, {"digest": digest, "stage": 1})

    def _trained(self, work: Workload, model: Model) -> Terms:
        """A trunk forward and backward over a minibatch."""
        rows, passes = work.minibatch_rows, work.micro_batches
        times = 2 if work.adapter and model is work.policy else FORWARD_AND_BACKWARD
        operations = rows * model.shape.trunk(work.read) * (times + work.recomputes)
        return {
            "products": self._products(operations, model),
            "traffic": times * self._traffic(model.shape, rows * work.read, BYTES[model.dtype]),
            "calls": FORWARD_AND_BACKWARD * passes * model.shape.layers,
            "collectives": passes * self._sharded_pass(work, model),
        }

    def _forward(self, model: Model, rows: int, read: int, rows_at_a_time: int, *, at_once: int = 1) -> Terms:
        """A pass over whole sequences; two stages that run at the same time have half of a CPU's cores each."""
        share = at_once if self._kind.is_cpu else 1
        return {
            "products": share * self._products(rows * model.shape.trunk(read), model),
            "traffic": share * self._traffic(model.shape, rows * read, BYTES[model.dtype]),
            "calls": -(-rows // rows_at_a_time) * model.shape.layers,
        }

    def _logits(self, model: Model, positions: int, times: int, *, at_once: int = 1) -> Terms:
        share = at_once if self._kind.is_cpu else 1
        return {
            "products": share * times * self._products(model.shape.logits(positions), model),
            "logits": share * times * self._moved(4 * positions * model.shape.vocabulary),
        }

    def _sharded_pass(self, work: Workload, model: Model) -> float:
        """Seconds of the collectives of one micro-batch."""
        if work.devices == 1:
            return 0.0
        is_adapted = work.adapter and model is work.policy
        trained = work.adapter if is_adapted else model.parameters
        stored = 4 * trained + (model.stored_bytes if is_adapted else 0)
        moved = 2 * stored + 4 * trained
        n = work.devices
        return moved * (n - 1) / n / self._hardware.collective_bytes_per_s

    def _products(self, operations: float, model: Model) -> float:
        return operations / self._kind.flop_per_s[model.dtype]

    def _moved(self, num_bytes: float) -> float:
        return num_bytes / self._kind.bytes_per_s

    def _traffic(self, shape: Shape, tokens: int, width: int) -> float:
        return self._moved(2 * tokens * shape.layers * activation_numbers(shape) * width)


def _added(*parts: Terms) -> Terms:
    """Term by term; those that are nothing are left out."""
    names = dict.fromkeys(name for part in parts for name in part)
    sums = {name: sum(part.get(name, 0.0) for part in parts) for name in names}
    return {name: ideal for name, ideal in sums.items() if ideal}


def activation_numbers(shape: Shape) -> int:
    """Numbers that a layer computes of a token: two norms and their inputs, q, k, v, attended, feed-forward."""
    mlp = (4 if shape.is_gated else 3) * shape.mlp_width
    return 4 * shape.hidden_size + 2 * shape.attention_width + shape.kv_width + mlp
