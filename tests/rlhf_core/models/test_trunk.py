"""Each way of running a trunk gives the hidden states of each row alone, and their gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import decoders, save_random
from tolerances import F32_MODEL
from torch.testing import assert_close

from rlhf_core.models.decoding import DecodingRules, decode
from rlhf_core.models.gpt2 import GPT2Passes
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.packing import PackedRows
from rlhf_core.models.recompute import recompute_activations
from rlhf_core.models.tokenizers import load_tokenizer
from rlhf_core.models.trunk import Trunk

CPU = torch.device("cpu")
ROWS = [[40, 41, 42, 43, 44, 45, 46, 47, 48, 49], [50], [61, 62, 63], [40, 41, 42, 43, 44, 45, 46]]
PACKS = {"gpt2", "llama", "qwen3", "mistral", "gemma", "gemma3", "gpt_neox"}
"""Gemma 2 caps the scores of its attention."""


@pytest.fixture(scope="module", params=decoders(300))
def saved(request: pytest.FixtureRequest, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    tokenizer = load_tokenizer(str(tiny.policy), field="x")
    config = decoders(len(tokenizer))[request.param]
    return request.param, save_random(config, "AutoModelForCausalLM", tmp_path_factory.mktemp("m"), tokenizer)


def load(folder: Path, *, trainable: bool = False) -> LanguageModel:
    return LanguageModel.load(str(folder), dtype="float32", device=CPU, trainable=trainable)


def of_each_row(folder: Path, weight: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states of each row by transformers alone, and gradients of their weighted sum."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    hidden = [model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0] for row in ROWS]
    states = torch.cat(hidden)
    (states * weight).sum().backward()
    return states.detach(), {n: p.grad for n, p in model.base_model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", ["fastest", "transformers", "padded"])
def test_hidden_states_and_gradients(saved: tuple[str, Path], way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are longer than the windows of 8 tokens, which Mistral and Gemma have here."""
    family, folder = saved
    if way != "fastest":
        monkeypatch.setattr(GPT2Passes, "of", lambda _module: None)
    if way == "padded":
        monkeypatch.setattr(Trunk, "packs", False)
    model = load(folder, trainable=True)
    assert (model._reads.written_out is not None) == (family == "gpt2" and way == "fastest")
    assert model._reads.packs == (family in PACKS and way != "padded")
    rows = PackedRows.of(ROWS)
    weight = torch.randn(len(rows.tokens_T), model.hidden_size, generator=torch.Generator().manual_seed(0))
    expected, gradients = of_each_row(folder, weight)
    states = model.hidden_states(rows)
    assert_close(states, expected, **F32_MODEL)
    (states * weight).sum().backward()
    assert len(gradients) > 10
    for name, parameter in model.trunk.named_parameters():
        assert parameter.grad is not None
        scale = gradients[name].abs().max()
        assert_close(parameter.grad / scale, gradients[name] / scale, **F32_MODEL)
    wanted = torch.tensor([9, 3, 20, 10])
    some = model.hidden_states(rows, wanted)
    assert_close(some, expected[wanted], **F32_MODEL)


def test_gradients_of_the_tokens_asked_for(saved: tuple[str, Path]) -> None:
    """As if every other token weighed nothing."""
    model = load(saved[1], trainable=True)
    rows, wanted = PackedRows.of(ROWS), torch.tensor([9, 3, 20, 10])
    weight = torch.zeros(len(rows.tokens_T), model.hidden_size)
    weight[wanted] = torch.randn(4, model.hidden_size, generator=torch.Generator().manual_seed(1))
    parameters = list(model.trunk.parameters())
    (some, every) = (
        torch.autograd.grad((states * by).sum(), parameters)
        for states, by in ((model.hidden_states(rows, wanted), weight[wanted]), (model.hidden_states(rows), weight))
    )
    for a, b in zip(some, every, strict=True):
        scale = b.abs().max().clamp(min=1e-6)
        assert_close(a / scale, b / scale, **F32_MODEL)


def test_without_gradients_nothing_is_kept_for_them(saved: tuple[str, Path]) -> None:
    """The same numbers, and fewer bytes held at a time."""
    model = load(saved[1], trainable=True)
    rows = PackedRows.of([[40 + i % 20 for i in range(30)]] * 32)
    with_gradients = model.hidden_states(rows)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as seen:
        without = model.hidden_states(rows)
    assert_close(with_gradients.detach(), without, **F32_MODEL)
    with torch.profiler.profile(profile_memory=True) as seen_with:
        model.hidden_states(rows)
    assert most_held(seen) < most_held(seen_with) * 0.8


def most_held(seen: Any) -> int:
    """Bytes: the highest point of what was allocated less what was freed, in the order of the profile."""
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_a_row_is_the_same_in_any_company(saved: tuple[str, Path]) -> None:
    model = load(saved[1])
    together = model.hidden_states(PackedRows.of(ROWS))
    backwards = model.hidden_states(PackedRows.of(ROWS[::-1]))
    assert_close(together[: len(ROWS[0])], backwards[-len(ROWS[0]) :], **F32_MODEL)


@pytest.mark.parametrize("samples", [1, 3])
def test_decoding_draws_the_same_by_each_way(samples: int, tiny: Any, tmp_path: Path) -> None:
    """Rows finish at different steps and leave; prompts have different lengths."""
    tokenizer = load_tokenizer(str(tiny.policy), field="x")
    folder = save_random(decoders(len(tokenizer))["gpt2"], "AutoModelForCausalLM", tmp_path, tokenizer)
    eos = frozenset(range(0, 300, 9))
    rules = DecodingRules(max_new_tokens=20, temperature=1.0, top_k=None, top_p=1.0, eos_ids=eos)
    uniforms = torch.rand(len(ROWS) * samples, 20, generator=torch.Generator().manual_seed(2))

    def drawn() -> Any:
        model = load(folder)
        is_written_out = model._reads.written_out is not None
        return is_written_out, decode(model, ROWS, uniforms, samples_per_prompt=samples, rules=rules, pad_id=1)

    is_written_out, fastest = drawn()
    assert is_written_out
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(GPT2Passes, "of", lambda _module: None)
        is_written_out, plain = drawn()
    assert not is_written_out
    assert len(set(fastest.mask_BR.sum(dim=1).tolist())) > 2
    assert torch.equal(fastest.tokens_BR, plain.tokens_BR)
    assert torch.equal(fastest.mask_BR, plain.mask_BR)
    assert_close(fastest.logprobs_BR, plain.logprobs_BR, **F32_MODEL)
    assert_close(fastest.entropies_BR, plain.entropies_BR, **F32_MODEL)


class TestWhatIsBuiltIntoGPT2:
    """Passes that are written out would not see it: transformers runs it."""

    @pytest.fixture
    def model(self, tiny: Any) -> LanguageModel:
        model = load(tiny.policy, trainable=True)
        assert model._reads.written_out is not None
        return model

    def test_a_hook(self, model: LanguageModel) -> None:
        calls: list[int] = []
        model.trunk.get_submodule("h.0").register_forward_hook(lambda *_: calls.append(1))
        model.hidden_states(PackedRows.of(ROWS))
        assert calls

    def test_recomputation(self, model: LanguageModel) -> None:
        recompute_activations(model.trunk, field="policy.model")
        assert model._reads.written_out is not None
        assert not model._reads.written_out.takes(8)

    def test_adapters(self, tiny_config: Any) -> None:
        from rlhf_core.models.policy import load_policy

        policy = load_policy(tiny_config(["policy.lora.rank=2", "policy.critic.kind=shared"]), CPU)
        assert policy._reads.written_out is None

    @pytest.mark.parametrize(
        "change",
        [{"activation_function": "relu"}, {"scale_attn_by_inverse_layer_idx": True}, {"reorder_and_upcast_attn": True}],
    )
    def test_another_formula(self, change: dict[str, Any], tiny: Any) -> None:
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.from_pretrained(tiny.policy, **change)
        assert GPT2Passes.of(AutoModel.from_config(config)) is None

    def test_rows_that_are_too_long(self, model: LanguageModel) -> None:
        passes = model._reads.written_out
        assert passes is not None
        assert passes.takes(64)
        assert not passes.takes(65), "the tiny policy has 64 positions"

    def test_weights_in_half_precision(self, tiny: Any) -> None:
        model = LanguageModel.load(str(tiny.policy), dtype="bfloat16", device=CPU, trainable=False)
        assert model._reads.written_out is None
