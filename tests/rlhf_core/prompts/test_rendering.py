"""The text that the policy reads."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from rlhf_core.contracts.errors import UserError
from rlhf_core.prompts.entries import PromptEntry
from rlhf_core.prompts.rendering import render_prompt

TEMPLATE = """
{%- for m in messages -%}
  {%- if m.role == "system" %}{{ raise_exception("no system message, please") }}{% endif -%}
  <{{ m.role }}>{{ m.content }}</>
{%- endfor -%}
{%- if add_generation_prompt %}<assistant>{% endif -%}
"""


def tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"x": 0}, unk_token="x")))
    made.chat_template = chat_template
    made.name_or_path = "tiny"
    return made


def test_text_stays_as_it_is() -> None:
    for template in (None, TEMPLATE):
        assert render_prompt("  Hi\n", tokenizer(template)) == "  Hi\n"


def test_chat_is_rendered_and_opened_for_the_answer() -> None:
    chat: PromptEntry = [
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "x"},
    ]

    assert render_prompt(chat, tokenizer(TEMPLATE)) == "<user> Hi </><assistant>Hello</><user>x</><assistant>"


def test_no_chat_template() -> None:
    with pytest.raises(UserError) as caught:
        render_prompt([{"role": "user", "content": "Hi"}], tokenizer(None))

    assert list(caught.value.problems) == [
        "prompts.column holds chats, but the tokenizer of policy.model ('tiny') has no chat template; take a "
        "policy.model that has one, set policy.chat_template, or take a prompts.column of plain texts"
    ]


def test_chat_that_the_template_refuses() -> None:
    with pytest.raises(UserError) as caught:
        render_prompt(
            [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}],
            tokenizer(TEMPLATE),
        )

    assert list(caught.value.problems) == [
        "prompts.column holds a chat of the roles system, user, which the chat template of the tokenizer of "
        "policy.model ('tiny') refuses: no system message, please"
    ]
