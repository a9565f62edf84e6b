"""Token log-probs from hidden states. N tokens, D hidden size, V vocabulary."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import BF16_OP, EXACT, F32_GRAD, F32_OP
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_core.ops.logprobs import Projection, token_logprobs

GOLDEN = Path(__file__).parents[2] / "golden"
TRL = json.loads((GOLDEN / "trl.json").read_text())["cases"]["token_logprobs"]
SCIPY = json.loads((GOLDEN / "scientific.json").read_text())["cases"]["token_logprobs"]
EXAMPLES = settings(max_examples=25)
SEEDS = st.integers(0, 2**32 - 1)
N, D, V = 7, 5, 11
CHUNKS = [V, 3 * V, 1000 * V]
"""Logits held at a time: one position, three (and one left over), all."""
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 1.5},
    "support": {"support": True},
    "everything": {"bias": True, "temperature": 1.3, "scale": 1.6, "softcap": 2.0, "support": True},
}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_support(seed: int, tokens_N: Tensor) -> Tensor:
    """About half of the vocabulary, the tokens themselves always."""
    return (draw(seed, N, V) > 0).scatter(1, tokens_N[:, None], value=True)


def draw_tokens(seed: int) -> Tensor:
    return torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed))


def identity_head(logits_NV: Tensor) -> tuple[Tensor, Projection]:
    """Hidden states and a projection whose logits are the given ones."""
    return logits_NV, Projection(torch.eye(logits_NV.shape[1]))


def loop_logprob_and_entropy(
    hidden: list[float],
    weight: list[list[float]],
    bias: list[float] | None,
    token: int,
    support: list[bool] | None,
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[float, float]:
    """One position from the definitions, in float64."""
    logits = [math.fsum(w * h for w, h in zip(row, hidden, strict=True)) for row in weight]
    if bias is not None:
        logits = [z + b for z, b in zip(logits, bias, strict=True)]
    logits = [scale * z for z in logits]
    if softcap is not None:
        logits = [softcap * math.tanh(z / softcap) for z in logits]
    logits = [z / temperature for z in logits]
    drawable = [v for v in range(len(logits)) if support is None or support[v]]
    normaliser = math.log(math.fsum(math.exp(logits[v]) for v in drawable))
    logprobs = {v: logits[v] - normaliser for v in drawable}
    return logprobs[token], -math.fsum(math.exp(x) * x for x in logprobs.values())


def autograd_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    tokens_N: Tensor,
    support_NV: Tensor | None,
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """All logits at once, differentiated by autograd."""
    logits_NV = scale * (hidden_ND @ weight_VD.T + (0.0 if bias_V is None else bias_V))
    if softcap is not None:
        logits_NV = softcap * (logits_NV / softcap).tanh()
    logits_NV = logits_NV / temperature
    if support_NV is not None:
        logits_NV = logits_NV.masked_fill(~support_NV, -1e30)  # finite, so that 0 · log 0 needs no care
    distribution = torch.distributions.Categorical(logits=logits_NV)
    probs_NV = distribution.logits.exp()
    return distribution.log_prob(tokens_N), -(probs_NV * distribution.logits).sum(dim=1)


def head(case: dict[str, Any]) -> tuple[bool, bool, dict[str, Any]]:
    """Whether a head has a bias, whether the support is truncated, and its constants."""
    constants = {name: value for name, value in case.items() if name not in ("bias", "support")}
    return case.get("bias", False), case.get("support", False), constants


def test_by_hand() -> None:
    # logits h · w for w = (1, 0), (0, 1), (0, 0) and h = (log 2, 0): log 2, 0, 0, so π = 1/2, 1/4, 1/4
    # log π(0) = -0.693147;  H = ½ log 2 + ¼ log 4 + ¼ log 4 = 1.5 log 2 = 1.039721
    weight_VD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    hidden_ND = torch.tensor([[math.log(2), 0.0]]).expand(2, 2)
    logprobs_N, entropies_N = token_logprobs(hidden_ND, Projection(weight_VD), torch.tensor([0, 2]), temperature=1.0)
    assert_close(logprobs_N, torch.tensor([-0.69314718, -1.38629436]), **F32_OP)
    assert_close(entropies_N, torch.tensor([1.03972077, 1.03972077]), **F32_OP)
    # T = 0.5 squares the odds: 4, 1, 1, so π = 2/3, 1/6, 1/6
    logprobs_N, _ = token_logprobs(hidden_ND, Projection(weight_VD), torch.tensor([0, 2]), temperature=0.5)
    assert_close(logprobs_N, torch.tensor([math.log(2 / 3), math.log(1 / 6)]), **F32_OP)
    # without the last token: 2/3 and 1/3, H = ⅔ log 3/2 + ⅓ log 3 = 0.636514
    support_NV = torch.tensor([[True, True, False]]).expand(2, 3)
    logprobs_N, entropies_N = token_logprobs(
        hidden_ND, Projection(weight_VD), torch.tensor([0, 1]), temperature=1.0, support_NV=support_NV
    )
    assert_close(logprobs_N, torch.tensor([math.log(2 / 3), math.log(1 / 3)]), **F32_OP)
    assert_close(entropies_N, torch.tensor([0.63651417, 0.63651417]), **F32_OP)


@pytest.mark.parametrize("chunk_elements", CHUNKS)
@pytest.mark.parametrize("case", HEADS.values(), ids=HEADS)
def test_agrees_with_a_loop(case: dict[str, Any], chunk_elements: int) -> None:
    has_bias, truncated, constants = head(case)
    hidden_ND, weight_VD, tokens_N = draw(1, N, D), draw(2, V, D), draw_tokens(3)
    bias_V = draw(4, V) if has_bias else None
    support_NV = draw_support(5, tokens_N) if truncated else None
    expected = [
        loop_logprob_and_entropy(
            hidden_ND[n].tolist(),
            weight_VD.tolist(),
            None if bias_V is None else bias_V.tolist(),
            int(tokens_N[n]),
            None if support_NV is None else support_NV[n].tolist(),
            **constants,
        )
        for n in range(N)
    ]
    temperature = constants.pop("temperature", 1.0)
    logprobs_N, entropies_N = token_logprobs(
        hidden_ND,
        Projection(weight_VD, bias_V, **constants),
        tokens_N,
        temperature=temperature,
        support_NV=support_NV,
        chunk_elements=chunk_elements,
    )
    assert logprobs_N.dtype == entropies_N.dtype == torch.float32
    assert_close(logprobs_N, torch.tensor([logprob for logprob, _ in expected]), **F32_OP)
    assert_close(entropies_N, torch.tensor([entropy for _, entropy in expected]), **F32_OP)


@pytest.mark.parametrize("chunk_elements", CHUNKS)
@pytest.mark.parametrize("case", HEADS.values(), ids=HEADS)
def test_gradients_agree_with_autograd_on_all_logits(case: dict[str, Any], chunk_elements: int) -> None:
    has_bias, truncated, constants = head(case)
    tokens_N = draw_tokens(3)
    support_NV = draw_support(5, tokens_N) if truncated else None
    to_logprobs_N, to_entropies_N = draw(6, N), draw(7, N)
    leaves = [draw(1, N, D), draw(2, V, D), *([draw(4, V)] if has_bias else [])]

    doubles = [leaf.double().requires_grad_() for leaf in leaves]
    logprobs_N, entropies_N = autograd_logprobs(
        doubles[0], doubles[1], doubles[2] if has_bias else None, tokens_N, support_NV, **constants
    )
    loss = (logprobs_N * to_logprobs_N).sum() + (entropies_N * to_entropies_N).sum()
    expected = torch.autograd.grad(loss, doubles)

    floats = [leaf.requires_grad_() for leaf in leaves]
    temperature = constants.pop("temperature", 1.0)
    logprobs_N, entropies_N = token_logprobs(
        floats[0],
        Projection(floats[1], floats[2] if has_bias else None, **constants),
        tokens_N,
        temperature=temperature,
        support_NV=support_NV,
        chunk_elements=chunk_elements,
    )
    loss = (logprobs_N * to_logprobs_N).sum() + (entropies_N * to_entropies_N).sum()
    for actual, wanted in zip(torch.autograd.grad(loss, floats), expected, strict=True):
        assert_close(actual.double(), wanted, **F32_GRAD)


@pytest.mark.parametrize("output", [0, 1], ids=["logprobs", "entropies"])
@pytest.mark.parametrize("chunk_elements", CHUNKS)
def test_one_output_may_go_unused(output: int, chunk_elements: int) -> None:
    hidden_ND, weight_VD, tokens_N = draw(1, N, D).requires_grad_(), draw(2, V, D).requires_grad_(), draw_tokens(3)
    outputs = token_logprobs(hidden_ND, Projection(weight_VD), tokens_N, temperature=1.0, chunk_elements=chunk_elements)
    outputs[output].sum().backward()
    hidden64_ND = hidden_ND.detach().double().requires_grad_()
    weight64_VD = weight_VD.detach().double().requires_grad_()
    autograd_logprobs(hidden64_ND, weight64_VD, None, tokens_N, None)[output].sum().backward()
    for actual, expected in [(hidden_ND.grad, hidden64_ND.grad), (weight_VD.grad, weight64_VD.grad)]:
        assert actual is not None
        assert_close(actual.double(), expected, **F32_GRAD)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden_ND, weight_VD, bias_V = draw(1, N, D).requires_grad_(), draw(2, V, D), draw(4, V)
    logprobs_N, _ = token_logprobs(hidden_ND, Projection(weight_VD, bias_V), draw_tokens(3), temperature=1.0)
    logprobs_N.sum().backward()
    assert hidden_ND.grad is not None
    assert weight_VD.grad is None
    assert bias_V.grad is None


def test_golden_trl() -> None:
    hidden_ND, projection = identity_head(torch.tensor(TRL["logits"]))
    logprobs_N, entropies_N = token_logprobs(hidden_ND, projection, torch.tensor(TRL["tokens"]), temperature=1.0)
    assert_close(logprobs_N, torch.tensor(TRL["logprobs"]), **F32_OP)
    assert_close(entropies_N, torch.tensor(TRL["entropies"]), **F32_OP)


@pytest.mark.parametrize("case", SCIPY["by_temperature"], ids=lambda case: f"T={case['temperature']}")
def test_golden_scipy(case: dict[str, Any]) -> None:
    hidden_ND, projection = identity_head(torch.tensor(SCIPY["logits"]))
    logprobs_N, entropies_N = token_logprobs(
        hidden_ND, projection, torch.tensor(SCIPY["tokens"]), temperature=case["temperature"]
    )
    assert_close(logprobs_N, torch.tensor(case["logprobs"]), **F32_OP)
    assert_close(entropies_N, torch.tensor(case["entropies"]), **F32_OP)


@EXAMPLES
@given(SEEDS, st.integers(1, 8 * V))
def test_chunks_and_order_are_irrelevant(seed: int, chunk_elements: int) -> None:
    hidden_ND, projection, tokens_N = draw(seed, N, D), Projection(draw(seed + 1, V, D)), draw_tokens(seed)
    whole = token_logprobs(hidden_ND, projection, tokens_N, temperature=1.0)
    parts = token_logprobs(hidden_ND, projection, tokens_N, temperature=1.0, chunk_elements=chunk_elements)
    assert_close(parts, whole, **F32_OP)
    order_N = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    permuted = token_logprobs(hidden_ND[order_N], projection, tokens_N[order_N], temperature=1.0)
    assert_close(permuted, tuple(result_N[order_N] for result_N in whole), **F32_OP)


@EXAMPLES
@given(SEEDS, st.floats(0.05, 20), st.floats(0.01, 30))
def test_probabilities_sum_to_1_and_entropies_are_in_range(seed: int, temperature: float, spread: float) -> None:
    tokens_N = draw_tokens(seed)
    for support_NV in (None, draw_support(seed + 1, tokens_N)):
        hidden_D = draw(seed, 1, D) * spread
        every_V = torch.arange(V) if support_NV is None else support_NV[0].nonzero()[:, 0]
        logprobs_V, entropies_V = token_logprobs(
            hidden_D.expand(len(every_V), D),
            Projection(draw(seed + 2, V, D)),
            every_V,
            temperature=temperature,
            support_NV=None if support_NV is None else support_NV[:1].expand(len(every_V), V),
        )
        assert_close(logprobs_V.exp().sum().item(), 1.0, **F32_OP)
        slack = F32_OP["atol"]
        assert (entropies_V >= -slack).all()
        assert (entropies_V <= math.log(len(every_V)) * (1 + slack) + slack).all()


def test_equal_logits_have_the_largest_entropy() -> None:
    _, entropies_N = token_logprobs(torch.zeros(2, D), Projection(draw(1, V, D)), torch.tensor([0, 1]), temperature=1.0)
    assert_close(entropies_N, torch.full((2,), math.log(V)), **F32_OP)


def test_no_tokens_at_all() -> None:
    hidden_ND = torch.zeros(0, D, requires_grad=True)
    logprobs_N, entropies_N = token_logprobs(
        hidden_ND, Projection(draw(1, V, D)), torch.zeros(0, dtype=torch.long), temperature=1.0
    )
    assert logprobs_N.shape == entropies_N.shape == (0,)
    (logprobs_N.sum() + entropies_N.sum()).backward()
    assert hidden_ND.grad is not None


@pytest.mark.parametrize("chunk_elements", CHUNKS)
def test_a_loss_under_autocast_is_the_same(chunk_elements: int) -> None:
    hidden_ND, weight_VD, tokens_N = draw(1, N, D).requires_grad_(), draw(2, V, D).requires_grad_(), draw_tokens(3)

    def results() -> tuple[Tensor, ...]:
        logprobs_N, entropies_N = token_logprobs(
            hidden_ND, Projection(weight_VD), tokens_N, temperature=1.0, chunk_elements=chunk_elements
        )
        return logprobs_N, entropies_N

    plain = results()
    with torch.autocast("cpu", torch.bfloat16):
        cast = results()
    assert_close(cast, plain, **EXACT)
    gradients = [torch.autograd.grad(torch.cat(out).sum(), [hidden_ND, weight_VD]) for out in (plain, cast)]
    assert_close(gradients[1], gradients[0], **EXACT)


def test_bfloat16_hidden_states_give_float32_results_and_bfloat16_gradients() -> None:
    hidden_ND, weight_VD, tokens_N = draw(1, N, D), draw(2, V, D), draw_tokens(3)
    expected = token_logprobs(hidden_ND, Projection(weight_VD), tokens_N, temperature=1.0)
    half_ND, weight_VD = hidden_ND.bfloat16().requires_grad_(), weight_VD.requires_grad_()
    actual = token_logprobs(half_ND, Projection(weight_VD), tokens_N, temperature=1.0)
    assert_close(actual, expected, **BF16_OP)
    actual[0].sum().backward()
    assert half_ND.grad is not None
    assert weight_VD.grad is not None
    assert (half_ND.grad.dtype, weight_VD.grad.dtype) == (torch.bfloat16, torch.float32)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@contextmanager
def largest_saved() -> Iterator[list[int]]:
    """The sizes of what is kept for the backward pass."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


@pytest.mark.parametrize("rows", [1, 4, 64])
@pytest.mark.parametrize("case", [{}, HEADS["everything"]], ids=["plain", "everything"])
def test_no_more_logits_are_held_than_a_chunk(case: dict[str, Any], rows: int) -> None:
    num_tokens, hidden_size, vocabulary = 64, 4, 500
    has_bias, truncated, constants = head(case)
    hidden_ND, weight_VD = draw(1, num_tokens, hidden_size), draw(2, vocabulary, hidden_size)
    tokens_N = torch.arange(num_tokens)
    support_NV = torch.ones(num_tokens, vocabulary, dtype=torch.bool) if truncated else None
    bias_V = torch.zeros(vocabulary, requires_grad=True) if has_bias else None
    temperature = constants.pop("temperature", 1.0)
    hidden_ND.requires_grad_()
    weight_VD.requires_grad_()
    with largest_saved() as saved, LargestTensor() as forward:
        logprobs_N, entropies_N = token_logprobs(
            hidden_ND,
            Projection(weight_VD, bias_V, **constants),
            tokens_N,
            temperature=temperature,
            support_NV=support_NV,
            chunk_elements=rows * vocabulary,
        )
    loss = logprobs_N.sum() + entropies_N.sum()
    with LargestTensor() as backward:
        loss.backward()
    # the weight and its gradient, 4 · 500, are there anyway
    chunk, weight, whole = rows * vocabulary, vocabulary * hidden_size, num_tokens * vocabulary
    assert forward.numel == backward.numel == max(chunk, weight)
    assert (forward.numel == whole) is (rows == num_tokens)
    # the support came from outside; log-softmax is kept only where one chunk holds it all
    kept = whole if truncated or rows == num_tokens else weight
    assert max(saved) == kept
    assert sum(size == whole for size in saved) == truncated + (rows == num_tokens)


def test_bad_arguments_are_refused() -> None:
    projection = Projection(draw(1, V, D))
    with pytest.raises(ValueError, match="tokens"):
        token_logprobs(draw(1, N, D), projection, torch.zeros(N - 1, dtype=torch.long), temperature=1.0)
    for temperature in (0.0, -1.0):
        with pytest.raises(ValueError, match="temperature"):
            token_logprobs(draw(1, N, D), projection, draw_tokens(1), temperature=temperature)


@pytest.mark.parametrize("chunk_elements", CHUNKS)
@pytest.mark.parametrize("head", [{}, {"temperature": 0.7, "softcap": 1.5, "scale": 0.25}], ids=["plain", "scaled"])
def test_ids_that_are_no_token_are_as_if_their_rows_were_not_there(head: dict[str, float], chunk_elements: int) -> None:
    """V = 8 of 11 rows, and two holes among them: values and gradients by autograd over the six rows that are left."""
    tokens_n = torch.tensor([0, 1, 3, 4, 6, 7])
    hidden_ND, weight_VD, bias_V = (t.requires_grad_() for t in (draw(1, N, D), draw(2, V, D), draw(3, V)))
    picked_N = torch.randint(len(tokens_n), (N,), generator=torch.Generator().manual_seed(4))
    scale, softcap, temperature = head.get("scale", 1.0), head.get("softcap"), head.get("temperature", 1.0)
    projection = Projection(weight_VD, bias_V, scale, softcap, num_tokens=8, holes_H=torch.tensor([2, 5]))
    found = token_logprobs(
        hidden_ND, projection, tokens_n[picked_N], temperature=temperature, chunk_elements=chunk_elements
    )
    z_Nn = scale * (hidden_ND @ weight_VD[tokens_n].t() + bias_V[tokens_n])
    z_Nn = z_Nn if softcap is None else softcap * torch.tanh(z_Nn / softcap)
    logp_Nn = (z_Nn / temperature).log_softmax(dim=1)
    expected = logp_Nn.gather(1, picked_N[:, None])[:, 0], -(logp_Nn.exp() * logp_Nn).sum(dim=1)
    weights_2N, grads = draw(5, 2, N), []
    for logprobs_N, entropies_N in (found, expected):
        loss = (logprobs_N * weights_2N[0] + entropies_N * weights_2N[1]).sum()
        grads.append(torch.autograd.grad(loss, (hidden_ND, weight_VD, bias_V)))
    assert_close(found, expected, **F32_OP)
    assert_close(grads[0], grads[1], **F32_GRAD)
    logits_NV = projection.prepared().logits(hidden_ND.detach(), temperature)
    assert logits_NV.shape == (N, 8)
    assert bool((logits_NV.softmax(dim=1)[:, [2, 5]] == 0).all())
