"""A fingerprint of how this process computes: a small computation whose last bits depend on the machine.

Another CPU maker, another BLAS, or a setting of MKL, oneDNN or OpenMP changes the order in which products are summed,
and with it last bits that no version number tells of. So the results of a few operations stand in a run's identity:
matrix products, exp, softmax, attention and layer norm, float32 and bfloat16, at the run's number of threads.

The inputs are made of integers and powers of two, so that they are the same everywhere; no generator is asked.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from rlhf_core.models.devices import using_threads

DIGITS = 32
"""Hexadecimal digits of the sha256."""
_STEP, _START, _RANGE = 40_503, 12_345, 65_536


def fingerprint(num_threads: int) -> str:
    """Digest of the small computation on this machine's CPU.

    Args:
        num_threads: intra-op threads, which it is computed with.
    Returns: hexadecimal digits, computed once a process for each number of threads and precision setting.
    """
    return _fingerprint(num_threads, torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled())


@functools.cache
def _fingerprint(num_threads: int, *_settings: object) -> str:
    digest = hashlib.sha256()
    with using_threads(num_threads), torch.no_grad(), torch.autocast("cpu", enabled=False):
        for dtype in (torch.float32, torch.bfloat16):
            for result in _results(dtype):
                digest.update(result.float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:DIGITS]


def _results(dtype: torch.dtype) -> Iterator[Tensor]:
    """The operations of a model's forward pass, on sizes that are, and are not, multiples of a vector's length."""
    hidden, weight, wide = _numbers(96, 257), _numbers(257, 130), _numbers(48, 2_051)
    yield hidden.to(dtype) @ weight.to(dtype)
    yield functional.linear(_numbers(7, 512).to(dtype), _numbers(385, 512).to(dtype), _numbers(385).to(dtype))
    yield (_numbers(40, 1_003).to(dtype) * 3).exp()
    yield functional.softmax(wide.to(dtype) * 4, dim=-1)
    yield functional.log_softmax(wide.to(dtype) * 4, dim=-1)
    yield functional.gelu(hidden.to(dtype), approximate="tanh")
    query, key, value = (_numbers(2, 3, 37, 24, shift=shift).to(dtype) for shift in (1, 2, 3))
    yield functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    yield functional.layer_norm(hidden.to(dtype), (257,), _numbers(257).to(dtype), _numbers(257, shift=5).to(dtype))
    yield _numbers(150_001).to(dtype).sum()[None]


def _numbers(*shape: int, shift: int = 0) -> Tensor:
    """Numbers from -1 to 1 that float32 holds exactly, in a fixed order without a pattern."""
    size = torch.Size(shape).numel()
    whole = (torch.arange(size, dtype=torch.int64) * _STEP + _START * (shift + 1)) % _RANGE
    return ((whole - _RANGE // 2).to(torch.float32) / (_RANGE // 2)).reshape(shape)
