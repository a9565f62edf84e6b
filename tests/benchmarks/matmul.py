"""What a device can do at best: sustained matrix products of a few sizes, in one arithmetic.

python -m benchmarks.matmul OUT.json [--seconds 2] [--sizes 512 1024 2048]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch


def matrix_peak(device: torch.device, dtype: torch.dtype, *, sizes: Sequence[int], seconds: float) -> float:
    """Floating-point operations a second: of each size the median product, of all sizes the best.

    Args:
        device: to measure.
        dtype: of both factors.
        sizes: n of the n x n products; each is 2 n³ operations.
        seconds: measured for each size, after a warm-up of a tenth.
    """
    return max(_sustained(device, dtype, size, seconds) for size in sizes)


def _sustained(device: torch.device, dtype: torch.dtype, size: int, seconds: float) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    found = torch.empty_like(left)
    took: list[float] = []
    until = time.perf_counter() + seconds * 1.1
    measured_from = until - seconds
    while time.perf_counter() < until or not took:
        started = time.perf_counter()
        torch.mm(left, right, out=found)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if started >= measured_from:
            took.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(took)


def main() -> None:
    """Measure float32 on the CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048])
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()))
    peak = matrix_peak(torch.device("cpu"), torch.float32, sizes=given.sizes, seconds=given.seconds)
    given.out.write_text(json.dumps({"flop_per_s": peak, "threads": torch.get_num_threads()}) + "\n")


if __name__ == "__main__":
    main()
