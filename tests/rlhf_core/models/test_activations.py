"""The tanh approximation of GELU as one operation."""

from __future__ import annotations

import math

import torch
from tolerances import F32_GRAD, F32_OP
from torch.testing import assert_close

from rlhf_core.models.activations import TanhGELU, fuse_activations


def test_by_hand() -> None:
    # x = 1: ½ (1 + tanh(0.7978845608 · 1.044715)) = ½ (1 + tanh(0.8335619)) = ½ · 1.6823839 = 0.8411920
    # large |x|: x and 0
    found = TanhGELU()(torch.tensor([1.0, 0.0, 30.0, -30.0]))
    assert_close(found, torch.tensor([0.8411920, 0.0, 30.0, 0.0]), **F32_OP)


def test_values_and_gradients_agree_with_the_definition_in_float64() -> None:
    x = torch.linspace(-12, 12, 4001, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    weight = torch.linspace(0.5, 1.5, 4001)
    TanhGELU()(x).mul(weight).sum().backward()
    value = 0.5 * exact * (1 + torch.tanh(math.sqrt(2 / math.pi) * (exact + 0.044715 * exact**3)))
    value.mul(weight.double()).sum().backward()
    assert x.grad is not None
    assert exact.grad is not None
    assert_close(TanhGELU()(x).double(), value, **F32_OP)
    assert_close(x.grad.double(), exact.grad, **F32_GRAD)


def test_half_precision_stays_half() -> None:
    x = torch.linspace(-3, 3, 11, dtype=torch.bfloat16)
    assert torch.equal(TanhGELU()(x), torch.nn.functional.gelu(x, approximate="tanh"))


def test_only_what_has_this_formula_is_exchanged() -> None:
    from transformers.activations import ACT2FN

    names = ["gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu", "relu", "quick_gelu", "silu"]
    layers = torch.nn.ModuleDict({name: torch.nn.Sequential(ACT2FN[name]) for name in names})
    x = torch.linspace(-4, 4, 101)
    before = {name: layer(x) for name, layer in layers.items()}
    fuse_activations(layers)
    exchanged = [name for name in names if isinstance(layers[name][0], TanhGELU)]  # type: ignore[index]
    assert exchanged == ["gelu_new", "gelu_fast", "gelu_pytorch_tanh"]
    for name, layer in layers.items():
        assert_close(layer(x), before[name], **F32_OP)
