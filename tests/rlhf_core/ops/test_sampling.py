"""Truncated support and inverse-CDF sampling. B rows, V vocabulary."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import EXACT, F32_EXP, F32_OP, F64_OP, SIGMAS
from torch import Tensor
from torch.testing import assert_close

from rlhf_core.ops.logprobs import Projection, token_logprobs
from rlhf_core.ops.randomness import seeded_generator
from rlhf_core.ops.sampling import sample, truncated_support

GOLDEN = Path(__file__).parents[2] / "golden"
SCIPY = json.loads((GOLDEN / "scientific.json").read_text())["cases"]["inverse_cdf"]
TRANSFORMERS = json.loads((GOLDEN / "transformers.json").read_text())["cases"]
EXAMPLES = settings(max_examples=40)
SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(2, 40)
TOP_KS = st.one_of(st.none(), st.integers(1, 45))
TOP_PS = st.floats(0.01, 1.0)
BELOW_1 = 1.0 - 2.0**-24
"""The largest float32 below 1."""
UNIFORMS = st.one_of(st.floats(0, BELOW_1, width=32), st.sampled_from([0.0, BELOW_1, 1.0 - 2.0**-23]))


def draw(seed: int, *shape: int, std: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (std * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def logits_of(*rows: list[float]) -> Tensor:
    """Logits of given probabilities."""
    return torch.tensor(rows).log()


def loop_probs(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(z - top) for z in logits]
    return [w / math.fsum(weights) for w in weights]


def loop_support(logits: list[float], top_k: int | None, top_p: float) -> list[bool]:
    """Fan et al. 2018, then Holtzman et al. 2020: the k most likely; of those, the smallest set that holds p."""
    ranked = sorted(range(len(logits)), key=lambda v: (-logits[v], v))
    if top_k is not None:
        ranked = ranked[:top_k]
    probs = loop_probs([logits[v] for v in ranked])
    kept, held = set(), 0.0
    for v, prob in zip(ranked, probs, strict=True):
        if held >= top_p and top_p < 1:
            break
        kept.add(v)
        held += prob
    return [v in kept for v in range(len(logits))]


def loop_draw(logits: list[float], support: list[bool], uniform: float) -> tuple[int, float, float]:
    """The token, its log-prob and the entropy, from the definitions."""
    drawable = [v for v, keep in enumerate(support) if keep]
    probs = loop_probs([logits[v] for v in drawable])
    cumulative, token = 0.0, drawable[-1]
    for v, prob in zip(drawable, probs, strict=True):
        cumulative += prob
        if cumulative > uniform:
            token = v
            break
    entropy = -math.fsum(p * math.log(p) for p in probs if p > 0)
    return token, math.log(probs[drawable.index(token)]), entropy


# --- support


def test_support_by_hand() -> None:
    logits_BV = logits_of([0.1, 0.5, 0.15, 0.25])

    def kept(top_k: int | None, top_p: float) -> list[int]:
        support_BV = truncated_support(logits_BV, top_k=top_k, top_p=top_p)
        assert support_BV is not None
        return support_BV[0].nonzero()[:, 0].tolist()

    assert kept(2, 1.0) == [1, 3]
    assert kept(None, 0.4) == [1]  # 0.5 is enough
    assert kept(None, 0.6) == [1, 3]  # 0.5 is not, 0.75 is
    assert kept(None, 0.8) == [1, 2, 3]
    assert kept(None, 0.95) == [0, 1, 2, 3]
    assert kept(2, 0.6) == [1]  # of the two, renormalised: 2/3 is enough
    assert kept(2, 0.7) == [1, 3]
    assert truncated_support(logits_BV, top_k=None, top_p=1.0) is None
    assert truncated_support(logits_BV, top_k=4, top_p=1.0) is None
    assert truncated_support(logits_BV, top_k=9, top_p=1.0) is None


def test_ties_at_the_edge_of_top_k_are_all_kept() -> None:
    support_BV = truncated_support(torch.tensor([[1.0, 2.0, 1.0, 0.0]]), top_k=2, top_p=1.0)
    assert support_BV is not None
    assert support_BV.tolist() == [[True, True, True, False]]


@EXAMPLES
@given(SEEDS, SIZES, TOP_KS, TOP_PS)
def test_support_agrees_with_a_loop(seed: int, size: int, top_k: int | None, top_p: float) -> None:
    logits_BV = draw(seed, 3, size)
    support_BV = truncated_support(logits_BV, top_k=top_k, top_p=top_p)
    expected = [loop_support(row, top_k, top_p) for row in logits_BV.tolist()]
    if support_BV is None:
        assert all(all(row) for row in expected)
        return
    assert support_BV.tolist() == expected
    counts_B = support_BV.sum(dim=1)
    assert (counts_B >= 1).all()
    assert (counts_B <= (size if top_k is None else top_k)).all()
    # no token left out is likelier than one that stays
    least_kept_B = logits_BV.masked_fill(~support_BV, math.inf).amin(dim=1)
    most_cut_B = logits_BV.masked_fill(support_BV, -math.inf).amax(dim=1)
    assert (least_kept_B >= most_cut_B).all()


def test_top_p_adds_nothing_to_top_k_where_rounding_leaves_the_sum_below_p() -> None:
    logits_BV = draw(0, 50, 20, dtype=torch.float32)
    support_BV = truncated_support(logits_BV, top_k=5, top_p=1 - 1e-9)
    assert support_BV is not None
    assert support_BV.sum(dim=1).tolist() == [5] * 50


@pytest.mark.parametrize("case", TRANSFORMERS["supports"], ids=lambda case: f"k={case['top_k']},p={case['top_p']}")
def test_support_golden_transformers(case: dict) -> None:
    logits_BV = torch.tensor(TRANSFORMERS["logits"])
    support_BV = truncated_support(logits_BV, top_k=case["top_k"], top_p=case["top_p"])
    assert support_BV is not None
    assert support_BV.tolist() == case["support"]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (-3, 1.0), (None, 0.0), (None, -0.5), (None, 1.01)])
def test_bad_truncations_are_refused(top_k: int | None, top_p: float) -> None:
    with pytest.raises(ValueError, match="top_k"):
        truncated_support(torch.zeros(1, 4), top_k=top_k, top_p=top_p)
    with pytest.raises(ValueError, match="top_k"):
        sample(torch.zeros(1, 4), torch.zeros(1), top_k=top_k, top_p=top_p)


# --- draws


def test_draws_by_hand() -> None:
    # cumulative 0.5, 0.8, 1: [0, 0.5) is token 0, [0.5, 0.8) token 1, [0.8, 1) token 2
    uniforms = [0.0, 0.49, 0.51, 0.79, 0.81, BELOW_1]
    draw_ = sample(logits_of(*[[0.5, 0.3, 0.2]] * 6), torch.tensor(uniforms))
    assert draw_.tokens_B.tolist() == [0, 0, 1, 1, 2, 2]
    assert_close(draw_.logprobs_B.exp(), torch.tensor([0.5, 0.5, 0.3, 0.3, 0.2, 0.2]), **F32_OP)
    # 0.5 log 2 + 0.3 log 10/3 + 0.2 log 5 = 0.346574 + 0.361192 + 0.321888 = 1.029653
    assert_close(draw_.entropies_B, torch.full((6,), 1.0296530), **F32_OP)
    assert draw_.support_BV is None
    # the two likeliest: 0.625 and 0.375
    draw_ = sample(logits_of(*[[0.5, 0.3, 0.2]] * 2), torch.tensor([0.62, 0.63]), top_k=2)
    assert draw_.tokens_B.tolist() == [0, 1]
    assert_close(draw_.logprobs_B.exp(), torch.tensor([0.625, 0.375]), **F32_OP)
    assert_close(draw_.entropies_B, torch.full((2,), 0.6615632), **F32_OP)  # 0.625 log 1.6 + 0.375 log 8/3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (4, 1.0), (None, 0.8), (6, 0.7)])
def test_draws_agree_with_a_loop(top_k: int | None, top_p: float, dtype: torch.dtype) -> None:
    logits_BV = draw(1, 60, 9, dtype=dtype)
    uniforms_B = torch.rand(60, generator=torch.Generator().manual_seed(2), dtype=dtype)
    draw_ = sample(logits_BV, uniforms_B, top_k=top_k, top_p=top_p)
    expected = [
        loop_draw(row, loop_support(row, top_k, top_p), uniform)
        for row, uniform in zip(logits_BV.tolist(), uniforms_B.tolist(), strict=True)
    ]
    tokens, logprobs, entropies = zip(*expected, strict=True)
    tolerance = F64_OP if dtype == torch.float64 else F32_OP
    assert draw_.tokens_B.tolist() == list(tokens)
    assert_close(draw_.logprobs_B.double(), torch.tensor(logprobs, dtype=torch.float64), **tolerance)
    assert_close(draw_.entropies_B.double(), torch.tensor(entropies, dtype=torch.float64), **tolerance)


def test_draws_golden_scipy() -> None:
    logits_BV = torch.tensor(SCIPY["logits"])
    for uniforms, tokens in zip(SCIPY["uniforms"], SCIPY["tokens"], strict=True):
        assert sample(logits_BV, torch.tensor(uniforms)).tokens_B.tolist() == tokens


@EXAMPLES
@given(SEEDS, SIZES, UNIFORMS, st.floats(0.1, 30))
def test_a_token_of_probability_0_is_never_drawn(seed: int, size: int, uniform: float, std: float) -> None:
    impossible_BV = draw(seed + 1, 4, size) > 0
    impossible_BV[0, -1] = impossible_BV[1, 0] = True  # at both ends, where rounding would find them
    impossible_BV[torch.arange(4), torch.tensor([0, size - 1, size // 2, size // 2])] = False
    logits_BV = draw(seed, 4, size, std=std, dtype=torch.float32).masked_fill(impossible_BV, -math.inf)
    tokens_B = sample(logits_BV, torch.full((4,), uniform)).tokens_B
    assert not impossible_BV.gather(1, tokens_B[:, None]).any()


@pytest.mark.parametrize("top_k", [None, 3])
def test_the_entropy_where_logits_rule_tokens_out(top_k: int | None) -> None:
    # two tokens are left, equally likely: log 2
    draw_ = sample(torch.tensor([[0.0, -math.inf, -math.inf, 0.0]]), torch.tensor([0.7]), top_k=top_k)
    assert draw_.tokens_B.tolist() == [3]
    assert_close(draw_.entropies_B, torch.tensor([math.log(2)]), **F32_OP)


@pytest.mark.parametrize("uniform", [BELOW_1, 1.0])
@pytest.mark.parametrize("size", [10, 1000, 20_000, 50_257])
def test_the_last_possible_token_at_the_upper_end(size: int, uniform: float) -> None:
    # the float32 sum of many small probabilities ends above 1 (20,000) or below 1 - 2^-22 (50,257, GPT-2's
    # vocabulary); and 1.0 is what float32 makes of 1 - 1e-9
    logits_BV = torch.cat([torch.zeros(3, size), torch.full((3, 7), -math.inf)], dim=1)
    logits_BV[1, 0], logits_BV[2, size - 1] = 8.0, 8.0
    tokens_B = sample(logits_BV, torch.full((3,), uniform)).tokens_B
    assert (tokens_B < size).all()
    assert (tokens_B >= size * 0.99 - 1).all()


@pytest.mark.parametrize("uniform", [0.0, 1e-30])
def test_the_first_possible_token_at_the_lower_end(uniform: float) -> None:
    logits_BV = torch.cat([torch.full((1, 7), -math.inf), torch.zeros(1, 10)], dim=1)
    assert sample(logits_BV, torch.tensor([uniform])).tokens_B.tolist() == [7]


@EXAMPLES
@given(SEEDS, SIZES, UNIFORMS, TOP_KS, TOP_PS)
def test_draws_stay_in_the_support(seed: int, size: int, uniform: float, top_k: int | None, top_p: float) -> None:
    logits_BV = draw(seed, 3, size, dtype=torch.float32)
    draw_ = sample(logits_BV, torch.full((3,), uniform), top_k=top_k, top_p=top_p)
    support_BV = truncated_support(logits_BV, top_k=top_k, top_p=top_p)
    assert (draw_.support_BV is None) == (support_BV is None)
    slack = F32_OP["atol"]
    largest_B = torch.full((3,), math.log(size))
    if support_BV is not None and draw_.support_BV is not None:
        assert_close(draw_.support_BV, support_BV, **EXACT)
        assert support_BV.gather(1, draw_.tokens_B[:, None]).all()
        largest_B = support_BV.sum(dim=1).log()
    assert (draw_.entropies_B >= -slack).all()
    assert (draw_.entropies_B <= largest_B + slack * (1 + largest_B)).all()
    assert (draw_.logprobs_B <= slack).all()


@EXAMPLES
@given(SEEDS, st.integers(1, 6), TOP_KS, TOP_PS)
def test_a_draw_does_not_depend_on_the_rest_of_the_batch(seed: int, rows: int, top_k: int | None, top_p: float) -> None:
    logits_BV = draw(seed, rows, 17, dtype=torch.float32)
    uniforms_B = torch.rand(rows, generator=torch.Generator().manual_seed(seed))
    together = sample(logits_BV, uniforms_B, top_k=top_k, top_p=top_p)
    for b in range(rows):
        alone = sample(logits_BV[b : b + 1], uniforms_B[b : b + 1], top_k=top_k, top_p=top_p)
        assert alone.tokens_B[0] == together.tokens_B[b]
        assert_close(alone.logprobs_B[0], together.logprobs_B[b], **F32_OP)
        assert_close(alone.entropies_B[0], together.entropies_B[b], **F32_OP)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (5, 1.0), (None, 0.7)])
def test_an_even_grid_of_uniforms_gives_the_probabilities(top_k: int | None, top_p: float) -> None:
    # each token owns an interval as long as its probability: n · π grid points, one more or less at either end
    count = 4000
    logits_1V = draw(3, 1, 12, dtype=torch.float32)
    uniforms_B = (torch.arange(count) + 0.5) / count
    tokens_B = sample(logits_1V.expand(count, 12), uniforms_B, top_k=top_k, top_p=top_p).tokens_B
    row = logits_1V[0].tolist()
    support = loop_support(row, top_k, top_p)
    probs = loop_probs([z if keep else -math.inf for z, keep in zip(row, support, strict=True)])
    counts = torch.bincount(tokens_B, minlength=12).tolist()
    for n, prob in zip(counts, probs, strict=True):
        assert abs(n - prob * count) <= 1.01
        assert n == 0 or prob > 0
    assert_close(tokens_B.sort().values, tokens_B, **EXACT)  # the cumulative distribution is inverted in order


def flat_distribution(size: int) -> tuple[Tensor, np.ndarray]:
    """(float32 logits of a flat-ish distribution, its cumulative distribution by NumPy in float64)."""
    logits = np.random.default_rng(5).normal(0, 0.7, size).astype(np.float32)
    weights = np.exp(logits.astype(np.float64))
    return torch.from_numpy(logits), np.cumsum(weights) / weights.sum()


def share_that_is_off(dtype: torch.dtype) -> float:
    """Of some tokens out of 150,000, the rarest among them: the worst one's share of the numbers, against its π."""
    logits_V, ends = flat_distribution(150_000)
    probs = np.diff(ends, prepend=0.0)
    tokens = np.concatenate([np.argsort(probs)[:12], np.arange(999, 150_000, 12_500)])
    edges = np.stack([tokens - 1, tokens], axis=1).ravel()  # a token begins where the one before it ends
    low, high = np.clip(ends[edges] - 1e-6, 0, 1), np.clip(ends[edges] + 1e-6, 0, 1)
    for _ in range(24):  # 2e-6 / 2^24 = 1e-13
        middle = (low + high) / 2
        numbers = torch.from_numpy(middle).to(dtype)
        drawn = sample(logits_V.expand(len(edges), len(logits_V)), numbers).tokens_B.numpy()
        low, high = np.where(drawn <= edges, middle, low), np.where(drawn <= edges, high, middle)
    lengths = np.diff(high.reshape(-1, 2), axis=1)[:, 0]
    return float(np.abs(lengths / probs[tokens] - 1).max())


def test_every_token_of_a_large_vocabulary_has_its_probability() -> None:
    """The interval of numbers that draw a token is as long as its probability, found by bisection.

    Numbers of 24 bits fall on a grid of 6e-8, where a token of 6e-7 has ten places, or nine, or eleven.
    """
    assert share_that_is_off(torch.float64) < F32_EXP["rtol"]
    assert share_that_is_off(torch.float32) > 0.02, "the test can tell"


def test_seeded_draws_have_the_frequencies_of_the_policy() -> None:
    count = 4000
    probs = [0.4, 0.3, 0.15, 0.1, 0.05]
    uniforms = [seeded_generator(1, "generate", 0, prompt, 0).random() for prompt in range(count)]
    tokens_B = sample(logits_of(probs).expand(count, 5), torch.tensor(uniforms)).tokens_B
    for n, prob in zip(torch.bincount(tokens_B, minlength=5).tolist(), probs, strict=True):
        assert abs(n / count - prob) < SIGMAS * math.sqrt(prob * (1 - prob) / count)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (5, 1.0), (None, 0.7), (8, 0.9)])
def test_the_update_sees_the_logprobs_of_the_draw(top_k: int | None, top_p: float) -> None:
    # ρ = 1 on the first minibatch: the same logits, tokens and support give the same log-probs in both ops
    logits_BV = draw(4, 30, 13, dtype=torch.float32)
    draw_ = sample(logits_BV, torch.rand(30, generator=torch.Generator().manual_seed(1)), top_k=top_k, top_p=top_p)
    logprobs_B, entropies_B = token_logprobs(
        logits_BV, Projection(torch.eye(13)), draw_.tokens_B, temperature=1.0, support_NV=draw_.support_BV
    )
    assert_close(logprobs_B, draw_.logprobs_B, **F32_OP)
    assert_close(entropies_B, draw_.entropies_B, **F32_OP)
