"""What a component reads of a sample response, for a person to look at; and the components that see special tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from text_tokenizers import CHAT_MARKS, CHATML, byte_level

from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import ComponentReward, FunctionReward, HttpReward, ModelReward
from rlhf_core.models.tokenizers import PolicyTokenizer
from rlhf_core.rewards.loading import load_component
from rlhf_core.rewards.reading import ComponentInput, component_input

CHAT = [{"role": "user", "content": "well?"}]


@pytest.fixture(scope="module")
def policy() -> PolicyTokenizer:
    tokenizer = byte_level(CHAT_MARKS, chat_template=CHATML)
    return PolicyTokenizer(tokenizer, frozenset({0}), 1)


def read(config: ComponentReward, policy: PolicyTokenizer, messages: Any, response: str = "good") -> ComponentInput:
    tokenizer: Any = policy.tokenizer
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) if messages else "well?"
    return component_input(
        config,
        field="x",
        tokenizer=policy,
        prompt_text=text,
        messages=messages,
        prompt_ids=policy.encode(text, is_chat=bool(messages)),
        response=response,
    )


def test_of_a_reward_model_with_a_template_of_its_own(policy: PolicyTokenizer, tmp_path: Path) -> None:
    own = byte_level(
        CHAT_MARKS, size=290, chat_template="{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
    )
    own.save_pretrained(tmp_path)
    found = read(ModelReward(model=str(tmp_path)), policy, CHAT)
    assert found.text == "<|im_start|>well?<|im_start|>good"
    assert list(found.token_ids) == own(found.text)["input_ids"]
    assert "".join(found.tokens) == found.text
    assert found.tokens[0] == "<|im_start|>"
    cut = read(ModelReward(model=str(tmp_path), max_len=3), policy, CHAT)
    assert list(cut.token_ids) == list(found.token_ids)[-3:]


def test_of_a_reward_model_that_reads_the_policys_tokens(policy: PolicyTokenizer, tmp_path: Path) -> None:
    policy.tokenizer.save_pretrained(tmp_path)
    found = read(ModelReward(model=str(tmp_path)), policy, CHAT)
    assert found.tokens[-1] == "<|endoftext|>"
    assert "".join(found.tokens[:-1]) == found.text


@pytest.mark.parametrize(("keep", "text"), [(False, "so"), (True, "so<|im_start|>")])
def test_of_a_function(policy: PolicyTokenizer, keep: bool, text: str) -> None:
    config = FunctionReward(function="length", keep_special_tokens=keep)
    assert read(config, policy, [], "so<|im_start|>") == ComponentInput(text, [], [])


@pytest.mark.parametrize(
    "config",
    [
        FunctionReward(function="length", keep_special_tokens=True),
        HttpReward(kind="http", url="http://localhost:1/", keep_special_tokens=True),
    ],
)
def test_special_tokens_without_a_tokenizer_to_name_them(config: ComponentReward) -> None:
    with pytest.raises(UserError, match="keep_special_tokens needs the policy's tokenizer"):
        load_component(config, field="x", columns=[], policy_vocabulary="digest", device=torch.device("cpu"))
