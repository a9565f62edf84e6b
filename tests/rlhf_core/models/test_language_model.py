"""The split of trunk and projection, against each architecture's own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import F32_MODEL

from rlhf_core.contracts.batches import Prompts, Rollouts
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.packing import PackedRows
from rlhf_core.models.sequences import Sequences, by_length

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 97,
}


def architectures() -> dict[str, Any]:
    """Tiny random configs of the families that people train, special logit scalings among them."""
    import transformers as t

    grouped: dict[str, Any] = {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 64, "head_dim": 16}
    return {
        "gpt2": t.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=97),
        "llama": t.LlamaConfig(**grouped),
        "qwen3": t.Qwen3Config(**grouped),
        "mistral": t.MistralConfig(**grouped, sliding_window=8),
        "gemma2-softcap": t.Gemma2Config(**grouped, final_logit_softcapping=3.0, sliding_window=8),
        "gpt_neox": t.GPTNeoXConfig(**SMALL, max_position_embeddings=64),
        "granite-scaling": t.GraniteConfig(**grouped, logits_scaling=4.0),
        "cohere-scale": t.CohereConfig(**grouped, logit_scale=0.25),
    }


@pytest.fixture(params=architectures())
def model_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    from transformers import AutoModelForCausalLM

    config = architectures()[request.param]
    config.initializer_range = 0.3
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def sequences_of(rows: list[tuple[list[int], list[int]]]) -> Sequences:
    """Sequences of (prompt tokens, response tokens) rows, by way of the batches that stages use."""
    import pyarrow as pa

    prompts = Prompts.from_table(
        pa.table(
            {
                "prompt_id": list(range(len(rows))),
                "prompt_text": ["-"] * len(rows),
                "messages": [[]] * len(rows),
                "prompt_tokens": [prompt for prompt, _ in rows],
                "num_truncated": [0] * len(rows),
                "columns": ["{}"] * len(rows),
            }
        )
    )
    zeros = [[0.0] * len(response) for _, response in rows]
    table = pa.table(
        {
            "sample_id": [str(i) for i in range(len(rows))],
            "prompt_id": list(range(len(rows))),
            "sample_index": [0] * len(rows),
            "response_text": ["-"] * len(rows),
            "response_tokens": [response for _, response in rows],
            "logprobs": zeros,
            "entropies": zeros,
            "values": pa.array([[]] * len(rows), pa.list_(pa.float32())),
            "support_tokens": pa.array([[]] * len(rows), pa.list_(pa.int32())),
            "support_lens": pa.array([[]] * len(rows), pa.list_(pa.int32())),
            "finish_reason": ["length"] * len(rows),
        }
    )
    return Sequences.build(prompts, Rollouts.from_table(table, prompts))


ROWS = [([5, 6, 7], [8, 9]), ([10], [11, 12, 13, 14]), ([20, 21, 22, 23, 24], [25])]


def test_response_logprobs_equal_the_models_own_logits_row_by_row(model_folder: Path) -> None:
    """Padding, projection and temperature: against a plain forward pass of each unpadded row."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    ours = LanguageModel.load(str(model_folder), dtype="float32", device=CPU, trainable=False)
    sequences = sequences_of(ROWS)
    with torch.no_grad():
        hidden_ND = ours.hidden_states(sequences.read, sequences.before_response_N)
        logprobs_N, entropies_N = ours.response_logprobs(sequences, hidden_ND, 0.7)
        expected, expected_entropies = [], []
        for prompt, response in ROWS:
            logits = plain(torch.tensor([prompt + response])).logits[0].double() / 0.7
            for t, token in enumerate(response):
                distribution = torch.distributions.Categorical(logits=logits[len(prompt) - 1 + t])
                expected.append(float(distribution.log_prob(torch.tensor(token))))
                expected_entropies.append(float(distribution.entropy()))
    torch.testing.assert_close(logprobs_N.double(), torch.tensor(expected).double(), **F32_MODEL)
    torch.testing.assert_close(entropies_N.double(), torch.tensor(expected_entropies).double(), **F32_MODEL)


def test_an_unknown_logit_scaling_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the scaling of the logits ignored, every log-prob would be wrong in silence."""
    from transformers import AutoModelForCausalLM

    config = architectures()["granite-scaling"]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    monkeypatch.setattr(
        "rlhf_core.models.language_model.LanguageModel.projection",
        lambda self: __import__("rlhf_core.ops.logprobs", fromlist=["Projection"]).Projection(
            self.model.get_output_embeddings().weight
        ),
    )
    with pytest.raises(UserError, match="not a projection of its trunk's output"):
        LanguageModel.load(str(tmp_path), dtype="float32", device=CPU, trainable=False)


def test_frozen_models_have_no_gradient_and_trained_ones_are_float32(tiny: Any) -> None:
    frozen = LanguageModel.load(str(tiny.policy), dtype="bfloat16", device=CPU, trainable=False)
    trained = LanguageModel.load(str(tiny.policy), dtype="bfloat16", device=CPU, trainable=True)
    assert {p.dtype for p in frozen.model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in frozen.model.parameters())
    assert {p.dtype for p in trained.model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in trained.model.parameters())


def test_dropout_is_off_even_where_the_config_asks_for_it(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=97, resid_pdrop=0.5, embd_pdrop=0.5)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = LanguageModel.load(str(tmp_path), dtype="float32", device=CPU, trainable=True)
    rows = PackedRows.of([[1, 2, 3]])
    assert torch.equal(model.hidden_states(rows), model.hidden_states(rows))


def test_missing_weights_are_named(tiny: Any, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny.policy, tmp_path / "policy")
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.0.attn.c_attn.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"policy\.model .* lacks 1 weights .*h\.0\.attn\.c_attn\.weight"):
        LanguageModel.load(str(folder), dtype="float32", device=CPU, trainable=False)


def test_rows_trim_padding_and_by_length_covers_every_row_once() -> None:
    sequences = sequences_of(ROWS)
    assert sequences.lens_B.tolist() == [5, 5, 6]
    part = sequences.rows(torch.tensor([0]))
    assert part.tokens_BL.tolist() == [[5, 6, 7, 8, 9]]
    assert part.response_mask_BR.tolist() == [[True, True]]
    parts = by_length(torch.tensor([9, 2, 5, 2]), 3)
    assert [p.tolist() for p in parts] == [[1, 3, 2], [0]]


def test_scatter_puts_values_back_in_their_places() -> None:
    sequences = sequences_of(ROWS)
    scattered = sequences.scatter(torch.arange(1.0, 8.0))
    assert scattered.tolist() == [[1, 2, 0, 0], [3, 4, 5, 6], [7, 0, 0, 0]]
