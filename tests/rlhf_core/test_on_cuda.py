"""What only CUDA can show: captured steps, the stages on a device, and whether the same update gives the same bits.

    pytest -m gpu tests/rlhf_core

Needs torch with CUDA and what the package's core imports; neither prefect nor mlflow.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import decoders, save_random
from iteration import Bench
from tolerances import F32_MODEL

from rlhf_core.contracts.config import RunConfig
from rlhf_core.models.decoding import Decoded, DecodingRules, decode
from rlhf_core.models.graphed_prefix import GraphedPrefix
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.tokenizers import load_tokenizer

pytestmark = pytest.mark.gpu
Configure = Callable[..., RunConfig]
PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
ROWS, NEW = 30, 40


def policy_of(family: str, dtype: torch.dtype) -> LanguageModel:
    from transformers import AutoModelForCausalLM

    config = decoders(300)[family]
    config.initializer_range = 0.2
    torch.manual_seed(5)
    return LanguageModel(AutoModelForCausalLM.from_config(config), dtype=dtype, device=torch.device("cuda"))


def decoded(policy: LanguageModel, **changes: Any) -> Decoded:
    uniforms = torch.rand(ROWS, NEW, generator=torch.Generator().manual_seed(3))
    settings: dict[str, Any] = {"top_k": None, "top_p": 1.0, "eos_ids": frozenset(range(12)), **changes}
    rules = DecodingRules(max_new_tokens=NEW, temperature=1.0, **settings)
    return decode(policy, PROMPTS, uniforms, samples_per_prompt=ROWS // len(PROMPTS), rules=rules, pad_id=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma", "gpt_neox"])
def test_a_replayed_step_is_the_step(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with rows that end and leave, and a width that grows."""
    monkeypatch.setattr("rlhf_core.models.graphed_prefix.FIRST_WIDTH", 16)
    policy = policy_of(family, dtype)
    captures: list[Any] = []
    whole = GraphedPrefix._capture
    monkeypatch.setattr(GraphedPrefix, "_capture", lambda self: captures.append(whole(self)) or captures[-1])
    found = decoded(policy)
    assert len(captures) >= 2, "one to begin with, one after rows have left"
    assert None not in captures
    monkeypatch.setattr(GraphedPrefix, "_capture", lambda _self: None)
    expected = decoded(policy)
    for name in ("tokens_BR", "mask_BR", "logprobs_BR", "entropies_BR"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.finish_reasons == expected.finish_reasons
    assert set(found.finish_reasons) == {"eos", "length"}


@pytest.mark.parametrize(
    "changes", [{"top_k": 5}, {"top_p": 0.7}, {"has_stop": lambda _row, ids: ids[-1] >= 200}], ids=str
)
def test_truncation_and_stops_beside_a_graph(changes: dict[str, Any]) -> None:
    found = decoded(policy_of("llama", torch.float32), **changes)
    lens = found.mask_BR.sum(dim=1).tolist()
    assert ("stop" in found.finish_reasons) == ("has_stop" in changes)
    assert (found.supports is not None) == ("has_stop" not in changes)
    if found.supports is not None:
        assert [len(support.lens) for support in found.supports] == lens


def test_a_model_that_looks_at_its_numbers_is_decoded_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy = policy_of("gpt2", torch.float32)
    expected = decoded(policy)
    policy.trunk.h[0].register_forward_pre_hook(lambda _module, args: bool(args[0].isfinite().all()) and None)  # pyright: ignore
    found = decoded(policy)
    assert torch.equal(found.tokens_BR, expected.tokens_BR)
    torch.testing.assert_close(found.logprobs_BR, expected.logprobs_BR, **F32_MODEL)
    assert any("without a CUDA graph" in record.getMessage() for record in caplog.records)
    assert torch.equal(decoded(policy).tokens_BR, expected.tokens_BR), "the device is as good as before"


@pytest.mark.parametrize("family", list(decoders(300)))
def test_two_iterations_of_every_family(family: str, tiny: Any, tiny_config: Configure, tmp_path: Path) -> None:
    """Decoding agrees with full passes before and after an update, and KL is 0 at iteration 0."""
    tokenizer = load_tokenizer(str(tiny.policy), field="x")
    policy, reward = (decoders(len(tokenizer))[family] for _ in range(2))
    reward.num_labels = 1
    save_random(policy, "AutoModelForCausalLM", tmp_path / "policy", tokenizer)
    save_random(reward, "AutoModelForSequenceClassification", tmp_path / "reward", tokenizer)
    models = [f"policy.model={tmp_path}/policy", f"reference.model={tmp_path}/policy"]
    models += [f"reward.components.0.model={tmp_path}/reward", "policy.critic.init=reward"]
    bench = Bench.of(tiny_config([*models, "device=cuda", "generation.max_new_tokens=20", "ppo.learning_rate=1e-2"]))
    first = bench.until_experience()
    assert first[2].token_kl_BR.abs().max() < F32_MODEL["atol"]
    update = bench.update(*first)
    assert update.metrics["guard/first_max_abs_log_ratio"] < F32_MODEL["atol"]
    prompts = bench.prompts().batch
    rollouts = bench.rollouts(prompts, iteration=1).batch
    reference = bench.ref_logprobs(prompts, rollouts).batch
    second = bench.experience(rollouts, bench.scores(prompts, rollouts).batch, reference).batch
    assert second.token_kl_BR.abs().max() > 1e-2, "the policy has left the reference"
    again = bench.update(prompts, rollouts, second, iteration=1)
    assert again.metrics["guard/first_max_abs_log_ratio"] < F32_MODEL["atol"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_iteration_gives_the_same_bits(dtype: str, tiny_config: Configure) -> None:
    """What a resume relies on."""

    def iteration() -> tuple[str, torch.Tensor]:
        bench = Bench.of(tiny_config(["device=cuda", f"policy.dtype={dtype}", "generation.max_new_tokens=20"]))
        prompts, rollouts, experience = bench.until_experience()
        bench.update(prompts, rollouts, experience)
        return bench.trainer.digest(), rollouts.logprobs_BR

    (first, logprobs), (second, again) = iteration(), iteration()
    assert torch.equal(logprobs, again)
    assert first == second


def test_the_head_in_bfloat16_sums_in_float32() -> None:
    """A logit near 20 rounded to bfloat16 is off by up to a sixteenth; one that is summed in float32 is not."""
    from rlhf_core.ops.logprobs import Projection

    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 512, generator=generator).bfloat16() for n in (64, 1000))
    exact = hidden.double() @ weight.double().t()
    found = Projection(weight.cuda(), dtype=torch.bfloat16).logits(hidden.cuda(), 1.0).cpu().double()
    assert exact.abs().max() > 60
    assert (found - exact).abs().max() < 1e-3
