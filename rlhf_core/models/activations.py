"""Activations that a library spells out in eight operations, as the one operation that they are."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

SPELLED_OUT = frozenset({"NewGELUActivation", "FastGELUActivation", "GELUTanh"})
"""transformers' classes of the tanh approximation of GELU."""
A, B = 1.5957691216057308, 0.07135481627260025
"""2 √(2/π), and that times 0.044715."""


def fuse_activations(model: Any) -> None:
    """Exchange them in place. The formula is the same; its result differs in the last bits.

    Args:
        model: of transformers. Activations have no weights, so that what is saved stays the same.
    """
    for module in list(cast("nn.Module", model).modules()):
        for name, child in module.named_children():
            if type(child).__name__ in SPELLED_OUT:
                setattr(module, name, TanhGELU())


class TanhGELU(nn.Module):
    """½ x (1 + tanh(√(2/π) (x + 0.044715 x³))) = x σ(A x + B x³); Hendrycks & Gimpel 2016 (arXiv 1606.08415).

    On a CPU torch's tanh takes four times as long as its sigmoid, and is taken twice: so it is written out here.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise, any shape."""
        if x.device.type == "cpu" and x.dtype is torch.float32:
            return cast("Tensor", _SigmoidGELU.apply(x))
        return nn.functional.gelu(x, approximate="tanh")


def gelu_gate(x: Tensor) -> Tensor:
    """The gate s = σ(A x + B x³), by which x is multiplied; new memory."""
    return (x * x).mul_(B).add_(A).mul_(x).sigmoid_()


def gelu_slope(x: Tensor, s: Tensor) -> Tensor:
    """The derivative s (1 + x (1 - s) (A + 3 B x²)) of x s; new memory."""
    slope = (x * x).mul_(3 * B).add_(A).mul_(x)
    return slope.addcmul_(slope, s, value=-1).add_(1).mul_(s)


class _SigmoidGELU(torch.autograd.Function):
    """With s = σ(A x + B x³):  y = x s,  dy/dx = s (1 + x (1 - s) (A + 3 B x²))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = gelu_gate(x)
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, s = ctx.saved_tensors
        return gelu_slope(x, s).mul_(grads[0])
