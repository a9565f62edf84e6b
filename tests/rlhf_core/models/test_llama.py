"""Llama's passes written out give what transformers gives for each row alone, with adapters and shared beginnings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import SMALL, save_random
from tolerances import F32_MODEL
from torch.testing import assert_close

from rlhf_core.contracts.policy_config import LoraConfig
from rlhf_core.models.adapters import TRAINED, attach, new_adapter
from rlhf_core.models.decoding import DecodingRules, decode
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.llama import LlamaPasses
from rlhf_core.models.packing import PackedRows
from rlhf_core.models.tokenizers import load_tokenizer

CPU = torch.device("cpu")
HEAD = list(range(40, 52))
ROWS = [[*HEAD, 60, 61, 62], [*HEAD, 70], [*HEAD, 60, 61, 62], [*HEAD, 60, 99, 98, 97, 96]]
LAYERS = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}


def kinds(vocab_size: int) -> dict[str, Any]:
    import transformers as t

    small: dict[str, Any] = {**SMALL, **LAYERS, "vocab_size": vocab_size}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {
        "llama": t.LlamaConfig(**small, tie_word_embeddings=True),
        "llama with biases": t.LlamaConfig(**small, attention_bias=True, mlp_bias=True),
        "llama 3": t.LlamaConfig(
            **small, rope_parameters={**llama3, "rope_theta": 1e4, "original_max_position_embeddings": 16}
        ),
        "mistral": t.MistralConfig(**small, sliding_window=None),
        "qwen2": t.Qwen2Config(**small),
        "qwen3": t.Qwen3Config(**small),
    }


@pytest.fixture(scope="module", params=list(kinds(300)))
def saved(request: pytest.FixtureRequest, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = load_tokenizer(str(tiny.policy), field="x")
    config = kinds(len(tokenizer))[request.param]
    return save_random(config, "AutoModelForCausalLM", tmp_path_factory.mktemp("m"), tokenizer)


def load(folder: Path, *, trainable: bool = False) -> LanguageModel:
    return LanguageModel.load(str(folder), dtype="float32", device=CPU, trainable=trainable)


def adapted(folder: Path) -> LanguageModel:
    """With a LoRA adapter that changes the answers."""
    plain = load(folder)
    adapters = attach(plain.model, str(folder), {}, fresh=new_adapter(LoraConfig(rank=4), plain.model))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in plain.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.3, generator=generator)
    return LanguageModel(plain.model, dtype=torch.float32, device=CPU, adapters=adapters)


def alone(model: LanguageModel, rows: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model.alone(row) for row in rows])


@pytest.mark.parametrize("answers_as", ["whole model", TRAINED, None])
def test_hidden_states_are_those_of_transformers(saved: Path, answers_as: str | None) -> None:
    model = load(saved) if answers_as == "whole model" else adapted(saved).view(answers_as)
    rows = PackedRows.of(ROWS)
    with torch.no_grad():
        assert model._reads.reading is not None
        assert model._reads.reading.takes(rows.longest)
        found = model.hidden_states(rows)
        some = model.hidden_states(rows, torch.tensor([14, 27, 42]))
    expected = alone(model, ROWS)
    assert_close(found, expected, **F32_MODEL)
    assert_close(some, expected[[14, 27, 42]], **F32_MODEL)


def test_an_adapter_changes_what_is_read(saved: Path) -> None:
    policy = adapted(saved)
    with torch.no_grad():
        with_adapter, without = (m.hidden_states(PackedRows.of(ROWS)) for m in (policy, policy.view(None)))
    assert float((with_adapter - without).abs().max()) > 0.1


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("has_adapter", [False, True])
def test_decoding_draws_what_a_cache_of_transformers_draws(saved: Path, samples: int, *, has_adapter: bool) -> None:
    """Rows finish at different steps and leave; prompts have different lengths."""
    rules = DecodingRules(16, 1.0, None, 1.0, frozenset(range(0, 300, 9)))
    uniforms = torch.rand(len(ROWS) * samples, 16, generator=torch.Generator().manual_seed(2))
    model = adapted(saved) if has_adapter else load(saved)
    ours = decode(model, ROWS, uniforms, samples_per_prompt=samples, rules=rules, pad_id=1)
    model._reads.leave_to_transformers()
    theirs = decode(model, ROWS, uniforms, samples_per_prompt=samples, rules=rules, pad_id=1)
    assert torch.equal(ours.tokens_BR, theirs.tokens_BR)
    assert torch.equal(ours.mask_BR, theirs.mask_BR)
    assert_close(ours.logprobs_BR, theirs.logprobs_BR, **F32_MODEL)
    assert_close(ours.entropies_BR, theirs.entropies_BR, **F32_MODEL)


def test_a_step_sees_weights_as_they_are_now(saved: Path) -> None:
    model = load(saved, trainable=True)
    rules = DecodingRules(1, 1.0, None, 1.0, frozenset())
    half = torch.full((len(ROWS), 1), 0.5)
    before = decode(model, ROWS, half, samples_per_prompt=1, rules=rules, pad_id=1)
    with torch.no_grad():
        for parameter in model.trunk.parameters():
            parameter.mul_(0.5)
    after = decode(model, ROWS, half, samples_per_prompt=1, rules=rules, pad_id=1)
    assert float((before.entropies_BR - after.entropies_BR).abs().max()) > 1e-3


class TestWhatIsLeftToTransformers:
    @pytest.fixture
    def config(self) -> Any:
        return kinds(300)["llama"]

    @pytest.mark.parametrize(
        "change",
        [
            {"hidden_act": "gelu"},
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        ],
    )
    def test_another_formula(self, config: Any, change: dict[str, Any]) -> None:
        from transformers import AutoModel

        for name, value in change.items():
            setattr(config, name, value)
        assert LlamaPasses.of(AutoModel.from_config(config), None) is None

    def test_another_family(self, config: Any) -> None:
        from transformers import AutoModel, Gemma2Config

        assert (
            LlamaPasses.of(AutoModel.from_config(Gemma2Config(**{**SMALL, **LAYERS, "vocab_size": 300})), None) is None
        )

    def test_half_precision(self, config: Any) -> None:
        from transformers import AutoModel

        assert LlamaPasses.of(AutoModel.from_config(config, dtype=torch.bfloat16), None) is None

    def test_a_hook(self, config: Any) -> None:
        from transformers import AutoModel

        module = AutoModel.from_config(config)
        passes = LlamaPasses.of(module, None)
        assert passes is not None
        assert passes.takes(64)
        assert not passes.takes(65), "it has 64 positions"
        module.layers[0].register_forward_hook(lambda *_: None)
        assert not passes.takes(8)

    def test_a_window_that_rows_reach(self) -> None:
        from transformers import AutoModel, MistralConfig

        config = MistralConfig(**{**SMALL, **LAYERS, "vocab_size": 300}, sliding_window=8)
        passes = LlamaPasses.of(AutoModel.from_config(config), None)
        assert passes is None or not passes.takes(9)
