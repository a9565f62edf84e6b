"""Operations are counted as by hand, and as torch counts them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_core.costs.operations import Models, Shape, stage_operations

COUNTED = Shape(linear_parameters=100, layers=2, attention_width=4, hidden_size=4, vocabulary=10)


class TestOperations:
    def test_of_a_pass_by_hand(self) -> None:
        # 3 tokens: 2·100·3 = 600; contexts 1 + 2 + 3 = 6: 4·4·2·6 = 192
        assert COUNTED.trunk(3) == 792
        # the next 2 tokens see 4 and 5: 2·100·2 = 400; 4·4·2·9 = 288
        assert COUNTED.trunk(2, before=3) == 688
        assert COUNTED.trunk(5) == 792 + 688
        assert COUNTED.trunk(0, before=3) == 0
        assert COUNTED.logits(2) == 2 * 4 * 10 * 2
        assert COUNTED.scalars(2) == 2 * 4 * 2

    def test_of_the_stages_by_hand(self) -> None:
        """One prompt of 3 tokens, one response of 2: 4 tokens are read, 5 to score."""
        reward = Shape(linear_parameters=50, layers=1, attention_width=4, hidden_size=4)
        counted = stage_operations(Models(COUNTED, reward, critic=reward), {7: 3}, [(7, 2)], epochs=2)
        taught = 2 * 100 * 4 + 4 * 4 * 2 * 10
        head = 2 * 4 * 10 * 2
        values = 2 * 50 * 4 + 4 * 4 * 1 * 10 + 2 * 4 * 2
        assert counted == {
            "sample_prompts": 0,
            "generate": taught + head + values,
            "score_rewards": 2 * 50 * 5 + 4 * 4 * 1 * 15 + 2 * 4,
            "reference_logprobs": taught + head,
            "shape_rewards": 0,
            "ppo_update": 2 * 3 * (taught + head + values),
        }

    def test_a_prompt_is_read_once_for_its_samples(self) -> None:
        one = stage_operations(Models(COUNTED, COUNTED, None), {0: 3}, [(0, 2)], epochs=1)
        two = stage_operations(Models(COUNTED, COUNTED, None), {0: 3}, [(0, 2), (0, 2)], epochs=1)
        assert two["generate"] == 2 * one["generate"] - COUNTED.trunk(3)
        assert two["ppo_update"] == 2 * one["ppo_update"]

    @pytest.mark.parametrize("kind", ["gpt2", "llama"])
    def test_reads_the_shape_off_the_layers(self, kind: str) -> None:
        shape = Shape.of(_model(kind))
        assert (shape.layers, shape.attention_width, shape.hidden_size, shape.vocabulary) == (2, 8, 8, 30)
        # GPT-2: D·3D + D·D + D·4D + 4D·D.  Llama: q and o D·D, k and v D·D/2 (half of the heads), three D·20
        by_layer = {"gpt2": 12 * 64, "llama": 2 * 64 + 2 * 32 + 3 * 160}
        assert shape.linear_parameters == 2 * by_layer[kind]

    @pytest.mark.parametrize("kind", ["gpt2", "llama"])
    def test_is_what_torch_counts(self, kind: str) -> None:
        """But for attention, where torch counts what the causal mask hides, too."""
        model = _model(kind)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 16, dtype=torch.int64, device="meta"))
        shape = Shape.of(model)
        hidden = 4 * shape.attention_width * shape.layers * (16 * 16 - 16 * 17 // 2)
        assert counter.get_total_flops() == shape.trunk(16) + shape.logits(16) + hidden


def _model(kind: str) -> Any:
    """Two layers of width 8, without weights."""
    sizes: dict[str, Any] = {"vocab_size": 30, "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    if kind == "llama":
        sizes |= {"intermediate_size": 20, "num_key_value_heads": 1}
    config = AutoConfig.for_model(kind, **sizes)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")
