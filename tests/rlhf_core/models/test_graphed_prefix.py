"""Keys and values in memory that stays where it is: the same steps as with a cache that grows.

A graph itself needs CUDA (``tests/rlhf_core/test_on_cuda.py``); here each step is run as it is.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import decoders
from tolerances import BF16_OP, F32_MODEL

from rlhf_core.models import graphed_prefix
from rlhf_core.models.graphed_prefix import GraphedPrefix
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.prefixes import CachedPrefix, Prefix
from rlhf_core.models.trunk import Trunk

CPU = torch.device("cpu")
VOCABULARY, NEW = 300, 24
PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
KEEPS_ALL = ["gpt2", "llama", "qwen3", "gemma", "gpt_neox"]


def trunk_of(family: str, dtype: torch.dtype = torch.float32) -> tuple[Trunk, Any]:
    from transformers import AutoModel

    config = decoders(VOCABULARY)[family]
    config.initializer_range = 0.2
    with torch.random.fork_rng():
        torch.manual_seed(5)
        module = AutoModel.from_config(config).eval()
    return Trunk(module, dtype=dtype), config


def begun(trunk: Trunk, config: Any) -> CachedPrefix:
    return CachedPrefix(trunk.run, config, CPU, PROMPTS, 2, pad_id=0)


@torch.no_grad()
def steps(prefix: Prefix) -> list[torch.Tensor]:
    """Hidden states while tokens are read; rows leave on the way."""
    seen = [prefix.hidden_bD.clone()]
    rows = torch.arange(6)
    for step in range(NEW):
        if step == 7:
            keep = torch.tensor([0, 2, 5])
            prefix.select(keep)
            rows = rows[keep]
        prefix.advance(20 + 3 * rows + step)
        seen.append(prefix.hidden_bD.clone())
    return seen


@pytest.mark.parametrize("width", [4, 16, 256])
@pytest.mark.parametrize("family", KEEPS_ALL)
def test_the_same_as_with_a_cache_that_grows(family: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed_prefix, "FIRST_WIDTH", width)
    trunk, config = trunk_of(family)
    with torch.no_grad():
        expected = steps(begun(trunk, config))
        read = begun(trunk, config)
        assert GraphedPrefix.suits(trunk, read)
        found = steps(GraphedPrefix(trunk, read, NEW, captures=False))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **F32_MODEL)


def test_bfloat16_copies_its_weights_once() -> None:
    trunk, config = trunk_of("gpt2", torch.bfloat16)
    copies = trunk.weights_as_computed()
    assert {t.dtype for t in copies.values()} == {torch.bfloat16}
    assert not any("ln_" in name or "wte" in name for name in copies), "autocast leaves norms and embeddings alone"
    assert len(copies) == 2 * 2 * 4, "weight and bias of four linear layers in two blocks"
    with torch.no_grad():
        expected = steps(begun(trunk, config))
        found = steps(GraphedPrefix(trunk, begun(trunk, config), NEW, captures=False))
    assert all(p.dtype is torch.float32 for p in trunk.module.parameters())
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), **BF16_OP)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_windows_keep_their_own_cache(family: str) -> None:
    trunk, config = trunk_of(family)
    with torch.no_grad():
        assert not GraphedPrefix.suits(trunk, begun(trunk, config))


def test_a_model_that_no_graph_can_hold_goes_on_without(caplog: pytest.LogCaptureFixture) -> None:
    """A capture fails on a CPU build, as it does where a model looks at its numbers on the way."""
    if torch.cuda.is_available():
        pytest.skip("here a capture does not fail")
    trunk, config = trunk_of("gpt2")
    with torch.no_grad():
        found = steps(GraphedPrefix(trunk, begun(trunk, config), NEW, captures=True))
        expected = steps(GraphedPrefix(trunk, begun(trunk, config), NEW, captures=False))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    assert [r.getMessage() for r in caplog.records if "CUDA graph" in r.getMessage()], "said once, and only once"
    assert sum("CUDA graph" in r.getMessage() for r in caplog.records) == 1


def test_steps_that_are_asked_about_seldom_give_the_same_responses(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that have ended are read on for a while, and nothing of it is written down."""
    from rlhf_core.models.decoding import Decoded, DecodingRules, decode

    policy = LanguageModel.load(str(tiny.policy), dtype="float32", device=CPU, trainable=True)
    uniforms = torch.rand(30, 40, generator=torch.Generator().manual_seed(3))
    rules = DecodingRules(max_new_tokens=40, temperature=1.0, top_k=None, top_p=1.0, eos_ids=frozenset({2}))

    def run() -> Decoded:
        return decode(
            policy, PROMPTS, uniforms, samples_per_prompt=10, rules=rules, pad_id=0, value_of=lambda h: h.sum(dim=1)
        )

    expected = run()
    trunk = policy._reads
    monkeypatch.setattr(
        policy,
        "prefix",
        lambda prompts, k, new, *, pad_id: GraphedPrefix(
            trunk, CachedPrefix(trunk.run, policy.config, CPU, prompts, k, pad_id=pad_id), new, captures=False
        ),
    )
    found = run()
    assert "eos" in expected.finish_reasons
    assert found.finish_reasons == expected.finish_reasons
    assert torch.equal(found.tokens_BR, expected.tokens_BR)
    assert torch.equal(found.mask_BR, expected.mask_BR)
    torch.testing.assert_close(found.logprobs_BR, expected.logprobs_BR, **F32_MODEL)
    assert found.values_BR is not None
    assert not bool(found.values_BR[~found.mask_BR].any())
