"""The core on an accelerator: decoding against transformers' ``generate``, and the update's share of the device's peak.

    python -m benchmarks.accelerator [--small] [--rounds 3] [--json FILE]

Needs torch, transformers, numpy, pyarrow and rlhf_core, nothing else. Without an accelerator it runs at tiny size on
the CPU, where its goals do not count.

Decoding: a GPT-2 of 124 M parameters answers 256 prompts; the peer is the faster of transformers' ``generate`` on the
same weights under the same autocast, and on a copy cast to the type. Update: a model of 1 B parameters; its operations
are those of :mod:`rlhf_core.costs.operations`, the peak is a measured matrix product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.figures import Figure, alternate, ratio
from benchmarks.matmul import matrix_peak
from benchmarks.processes import peak_bytes
from benchmarks.random_models import PROMPT_LEN, Bench, Size, gpt2

from rlhf_core.costs.operations import Models, Shape, stage_operations
from rlhf_core.models.devices import computing_in

NO_GPU = "no GPU here"
DECODE_GOAL, MFU_GOAL = 5.0, 40.0
SMALL = Size(batch=8, response_len=8, vocabulary=300, hidden_size=32, layers=2, heads=2)
DECODE = Size(batch=256, response_len=128, vocabulary=50_257, hidden_size=768, layers=12, heads=12)
UPDATE = Size(batch=64, response_len=504, vocabulary=50_257, hidden_size=2048, layers=18, heads=16)
"""1.01 B parameters, the tied head included; 16 responses an optimiser step."""


@dataclass(frozen=True)
class Device:
    """What is measured, and in which arithmetic."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def here(cls) -> Device:
        """The accelerator in bfloat16, or the CPU in float32."""
        if torch.cuda.is_available():
            return cls(torch.device("cuda"), torch.bfloat16)
        return cls(torch.device("cpu"), torch.float32)

    @property
    def counts(self) -> bool:
        """Whether goals are for this device."""
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        """For a person."""
        return torch.cuda.get_device_name(self.device) if self.counts else "CPU"

    def forget_peak(self) -> None:
        """Begin to measure memory anew, where that can be."""
        if self.counts:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> int:
        """Bytes: allocated on the accelerator; on the CPU of the process."""
        return torch.cuda.max_memory_allocated(self.device) if self.counts else peak_bytes()


def decoding(here: Device, size: Size, rounds: int) -> dict[str, Any]:
    """Tokens a second of both sides, in turns."""
    bench = Bench(size, here.device, here.dtype)
    cast = gpt2(size).to(here.device, here.dtype)
    cast.load_state_dict(bench.policy.model.state_dict())
    sides: dict[str, Callable[[int], float]] = {
        "ours": lambda _: bench.generate()[1],
        "transformers, autocast": lambda _: _their_seconds(bench.policy.model, bench, here),
        "transformers, cast": lambda _: _their_seconds(cast, bench, here),
    }
    for side in sides.values():
        side(0)  # warm-up
    here.forget_peak()
    seconds = alternate(sides, rounds)
    tokens = size.batch * size.response_len
    rates = {name: tokens / statistics.median(took) for name, took in seconds.items()}
    peer = max(rate for name, rate in rates.items() if name != "ours")
    return {"tokens_per_s": rates, "over_transformers": rates["ours"] / peer, "peak_bytes": here.peak_memory()}


@torch.no_grad()
def _their_seconds(model: Any, bench: Bench, here: Device) -> float:
    """Of transformers' own sampling, to the same length."""
    tokens = bench.prompts.tokens_QP.to(here.device)
    if here.counts:
        torch.cuda.synchronize(here.device)
    started = time.perf_counter()
    with computing_in(here.dtype, here.device):
        model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            top_k=0,
            max_new_tokens=bench.size.response_len,
            min_new_tokens=bench.size.response_len,
            pad_token_id=0,
        )
    if here.counts:
        torch.cuda.synchronize(here.device)
    return time.perf_counter() - started


def updating(here: Device, size: Size, rounds: int, peak: float) -> dict[str, Any]:
    """Seconds of an update, its operations, and their share of the device's peak."""
    here.forget_peak()
    bench = Bench(size, here.device, here.dtype)
    seconds: list[float] = []
    for _ in range(rounds + 1):
        rollouts, _ = bench.generate()
        if not seconds:
            here.forget_peak()
        seconds.append(bench.update(rollouts))
    shape = Shape.of(bench.policy.model)
    responses = [(row, size.response_len) for row in range(size.batch)]
    models = Models(policy=shape, reward=shape, critic=None)
    prompts = dict.fromkeys(range(size.batch), PROMPT_LEN)
    operations = stage_operations(models, prompts, responses, epochs=bench.config.ppo.num_ppo_epochs)["ppo_update"]
    took = statistics.median(seconds[1:])
    return {
        "seconds": took,
        "operations": operations,
        "share_of_peak": operations / took / peak,
        "tokens_per_s": size.batch * size.response_len / took,
        "parameters": sum(p.numel() for p in bench.policy.model.parameters()),
        "peak_bytes": here.peak_memory(),
    }


def measure_here(*, small: bool, rounds: int) -> dict[str, Any]:
    """Both, on this machine's accelerator; without one always small."""
    here = Device.here()
    small = small or not here.counts
    peak = matrix_peak(here.device, here.dtype, sizes=[128] if small else [4096, 8192], seconds=0.1 if small else 1.0)
    decoded = decoding(here, SMALL if small else DECODE, rounds)
    updated = updating(here, SMALL if small else UPDATE, rounds, peak)
    told = {"device": here.name, "dtype": str(here.dtype).removeprefix("torch."), "small": small}
    return told | {"counts": here.counts and not small, "peak_flop_per_s": peak, "decode": decoded, "update": updated}


def figures(found: dict[str, Any]) -> list[Figure]:
    """Against the goals; on a CPU they do not count."""
    why_not = "" if found["counts"] else "small size" if found["device"] != "CPU" else NO_GPU
    decoded, updated = found["decode"], found["update"]
    share = updated["share_of_peak"] * 100
    return [
        Figure("decoding, over transformers", decoded["over_transformers"], DECODE_GOAL, unit="x", why_not=why_not),
        Figure("update, share of the device's peak", share, MFU_GOAL, unit="%", why_not=why_not),
        Figure("decoding, tokens/s", decoded["tokens_per_s"]["ours"]),
        Figure("update, response tokens/s", updated["tokens_per_s"]),
        Figure("decoding, peak memory", ratio(decoded["peak_bytes"], 1e6), unit="MB"),
        Figure("update, peak memory", ratio(updated["peak_bytes"], 1e6), unit="MB"),
    ]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny sizes, on an accelerator too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = measure_here(small=given.small, rounds=given.rounds)
    print(f"{found['device']}, {found['dtype']}, peak {found['peak_flop_per_s'] / 1e12:.3g} TFLOP/s")
    for figure in figures(found):
        print(f"{figure.name:36} {figure.value_text:>14}   goal {figure.goal_text:8} {figure.verdict}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
