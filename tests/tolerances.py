"""How close is close enough: every tolerance of the tests, with its reason. Nowhere else is one written.

Each is a pair for ``torch.testing.assert_close(actual, expected, **F64_OP)``: |actual - expected| must be at most
atol + rtol · |expected|.
"""

from __future__ import annotations

from typing import Final, TypedDict


class Tolerance(TypedDict):
    """Relative and absolute part."""

    rtol: float
    atol: float


EXACT: Final = Tolerance(rtol=0.0, atol=0.0)
"""Same operations in the same order, or no arithmetic at all: any difference is an error."""

F64_OP: Final = Tolerance(rtol=1e-10, atol=1e-10)
"""An op fed float64 against a float64 loop or a golden number: the two differ in the order of their sums alone
(some 1e-15 a term); 1e-10 leaves room for tens of terms, a division by a small std, and nothing else."""

F32_OP: Final = Tolerance(rtol=1e-6, atol=1e-6)
"""An op that computes in float32, on numbers of order 1, against float64: what the project promises. A float32
carries 6e-8, so this is a dozen roundings."""

HAND: Final = Tolerance(rtol=0.0, atol=1e-8)
"""Python floats against numbers worked out by hand and written with eight digits."""

F32_CANCELLED: Final = Tolerance(rtol=1e-3, atol=0.0)
"""A float32 result in which three digits of the inputs cancel, as they do in expm1(x) - x at x = 1e-3."""

F32_EXP: Final = Tolerance(rtol=1e-5, atol=0.0)
"""exp of a float32 log-prob of -15: that carries 1e-6, and so does the probability relative to itself."""

F32_GRAD: Final = Tolerance(rtol=1e-5, atol=2e-6)
"""A float32 gradient against float64 autograd: a sum over positions or over the vocabulary of products that have
been rounded already, some of which cancel."""

F32_SUM: Final = Tolerance(rtol=1e-5, atol=1e-5)
"""Float32 sums over a batch, in two different orders or with values of order 10."""

BF16_OP: Final = Tolerance(rtol=2e-2, atol=5e-2)
"""bfloat16 hidden states carry 8 bits, 4e-3 relative, through a product of a few terms."""

JAX_F32: Final = Tolerance(rtol=1e-6, atol=0.0)
"""optax computes its schedules in float32, and they are compared to a Python float; relative alone, because a
learning rate is far below 1."""

SIGMAS: Final = 5.0
"""A frequency may lie this many standard errors from its probability: one failure in two million draws of a seed,
and the seeds are fixed."""

F32_MODEL: Final = Tolerance(rtol=1e-4, atol=1e-4)
"""A float32 transformer in two batch compositions, with and without cache: 8e-5 was measured on real models."""

RANKS_LOSS: Final = Tolerance(rtol=1e-6, atol=1e-6)
"""A loss of an update by two ranks against one process, in float32: as promised, relative to 1 or more."""

RANKS_WEIGHT: Final = Tolerance(rtol=0.0, atol=1e-5)
"""Weights and moments after three iterations of such updates; an optimiser step moves a weight by 1e-3 here."""
