"""Tokens a second of generate and ppo_update at one size; or the memory of log-probs.

python -m benchmarks.scaling OUT.json [--repeats 3] [--batch N] [--response-len N] [--vocabulary N] ...
python -m benchmarks.scaling OUT.json --logprobs ours|full [--positions N] [--vocabulary N]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from benchmarks.processes import peak_bytes, resident_bytes
from benchmarks.random_models import Bench, Size

from rlhf_core.ops.logprobs import Projection, token_logprobs

HIDDEN = 128
"""Width of the hidden states whose log-probs are taken."""


def throughput(size: Size, repeats: int) -> dict[str, float]:
    """Median tokens a second of response, after a warm-up; four optimiser steps in one epoch an update."""
    bench = Bench(size, torch.device("cpu"), torch.float32)
    generating: list[float] = []
    updating: list[float] = []
    for _ in range(repeats + 1):
        rollouts, seconds = bench.generate()
        generating.append(seconds)
        updating.append(bench.update(rollouts))
    tokens = size.batch * size.response_len
    rates = {"generate": generating, "ppo_update": updating}
    return {"tokens": tokens} | {name: tokens / statistics.median(seconds[1:]) for name, seconds in rates.items()}


def logprob_memory(kind: str, positions: int, vocabulary: int, values: Path) -> dict[str, float]:
    """Bytes that log-probs and entropies add, forward and backward; what they and the gradients are goes to a file."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(positions, HIDDEN, generator=generator).requires_grad_()
    weight_VD = (torch.randn(vocabulary, HIDDEN, generator=generator) / HIDDEN**0.5).requires_grad_()
    tokens_N = torch.randint(vocabulary, (positions,), generator=generator)
    torch.mm(torch.randn(256, 256), torch.randn(256, 256))  # the library's own buffers
    baseline = resident_bytes()
    if kind == "ours":
        logprobs_N, entropies_N = token_logprobs(hidden_ND, Projection(weight_VD), tokens_N, temperature=1.0)
    else:
        logp_NV = torch.nn.functional.linear(hidden_ND, weight_VD).log_softmax(dim=1)
        logprobs_N = logp_NV.gather(1, tokens_N[:, None])[:, 0]
        entropies_N = -(logp_NV.exp() * logp_NV).sum(dim=1)
    (logprobs_N.sum() + 0.01 * entropies_N.sum()).backward()
    added = peak_bytes() - baseline
    assert hidden_ND.grad is not None
    assert weight_VD.grad is not None
    found = {
        "logprobs": logprobs_N,
        "entropies": entropies_N,
        "hidden": hidden_ND.grad,
        "weight": weight_VD.grad[:1000],
    }
    np.savez(values, **{name: tensor.detach().numpy() for name, tensor in found.items()})
    return {"bytes": added}


def main() -> None:
    """Measure one size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--logprobs", choices=["ours", "full"])
    parser.add_argument("--positions", type=int, default=1024)
    for part in fields(Size):
        parser.add_argument(f"--{part.name.replace('_', '-')}", type=int, default=part.default)
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()))
    if given.logprobs:
        found = logprob_memory(given.logprobs, given.positions, given.vocabulary, given.out.with_suffix(".npz"))
    else:
        found = throughput(Size(**{part.name: getattr(given, part.name) for part in fields(Size)}), given.repeats)
    given.out.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
