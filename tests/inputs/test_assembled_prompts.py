"""What the policy reads of the prompts that people bring: as plain transformers reads them, or noted, or refused."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_policies import (
    ALTERNATING,
    BOS,
    CHATML,
    CLOSED,
    DATED,
    DIALOGPT,
    ENDED,
    EOS,
    LLAMA2,
    LLAMA3,
    STRICT,
    SWITCH,
    TEXTS,
    THINKING,
    chat_policy,
    chats,
    config_for,
)
from transformers import AutoTokenizer

from rlhf_core.contracts.batches import Prompts
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.loop_state import Cursor
from rlhf_core.identity import run_identity
from rlhf_core.preflight import Plan, preflight
from rlhf_core.stages.sample_prompts import sample_prompts

CHATS = chats(*TEXTS)
FORMAT = {"kind": "function", "function": "format"}
LONG = "The film was slow and this story felt not at all what it began as, a quiet play"


def drawn(config: RunConfig, plan: Plan) -> Prompts:
    return sample_prompts(
        plan.prompt_set,
        plan.tokenizer,
        config.prompts,
        cursor=Cursor(),
        seed=config.seed,
        max_prompt_len=plan.max_prompt_len,
    ).batch


def tokens_of(prompts: Prompts) -> list[list[int]]:
    return [tokens[mask].tolist() for tokens, mask in zip(prompts.tokens_QP, prompts.mask_QP, strict=True)]


def read(config: RunConfig) -> tuple[Prompts, list[list[int]], list[str]]:
    plan = preflight(config)
    prompts = drawn(config, plan)
    return prompts, tokens_of(prompts), plan.notes


def plain(policy: Path) -> Any:
    return AutoTokenizer.from_pretrained(policy)


@pytest.mark.parametrize("post", ["", "bos", "eos", "both"])
def test_a_text_has_its_bos_once_and_no_eos(tmp_path: Path, post: str) -> None:
    policy = chat_policy(tmp_path / "policy", post=post)
    written = [f"{BOS}{text}" for text in TEXTS[:4]]
    _, tokens, notes = read(config_for(policy, [*TEXTS, *written]))
    tokenizer = plain(policy)
    bare = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    bos = [tokenizer.bos_token_id]
    adds_bos = post in ("bos", "both")
    assert tokens[: len(TEXTS)] == [(bos if adds_bos else []) + row for row in bare]
    assert tokens[len(TEXTS) :] == [bos + row for row in bare[:4]]
    assert any("4 of 12 prompts begin with '<|bos|>' already" in note for note in notes) is adds_bos
    assert any("appends '<|endoftext|>'" in note for note in notes) is (post in ("eos", "both"))


@pytest.mark.parametrize("template", [CHATML, LLAMA3, LLAMA2, DIALOGPT, ALTERNATING])
def test_a_chat_is_read_as_transformers_reads_it(tmp_path: Path, template: str) -> None:
    policy = chat_policy(tmp_path / "policy", template, post="bos" if template is LLAMA3 else "")
    several = [CHATS[0][0], {"role": "assistant", "content": "yes"}, CHATS[1][0]]
    prompts, tokens, notes = read(config_for(policy, [*CHATS, several]))
    tokenizer = plain(policy)
    expected = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in [*CHATS, several]
    ]
    assert tokens == expected
    assert [list(messages) for messages in prompts.messages] == [*CHATS, several]
    assert notes == (
        ["9 of 9 prompts end with an EOS token (prompt 0: 'The film was slow<|endoftext|>')"]
        if template is DIALOGPT
        else []
    )


SYSTEM = chats(TEXTS[0], system="Be brief")
REFUSED: dict[str, tuple[str | None, dict[str, Any], Sequence[Any], dict[str, Any], str]] = {
    "template that never opens the answer": (CLOSED, {}, CHATS, {}, "does not open the assistant's turn"),
    "template that ends with EOS": (ENDED, {}, CHATS, {}, "ends prompts with an EOS token"),
    "template with BOS twice": (BOS + LLAMA3, {}, CHATS, {}, "8 prompts .*begins with the BOS token twice"),
    "BOS in a message that begins the text": (
        "{{ bos_token }}" + DIALOGPT, {}, chats(f"{BOS}Hi"), {}, r"prompt 0 \(from 0\): begins with the BOS token",
    ),
    "two BOS in a text": (None, {}, [*TEXTS, f"{BOS}{BOS}Hi"], {}, r"prompt 8 \(from 0\): begins with the BOS token"),
    "chats that the template refuses": (
        STRICT, {}, [*CHATS, *SYSTEM, *SYSTEM], {}, r"2 prompts \(8, 9; from 0\): .*no system role",
    ),
    "the same where over-long prompts are dropped": (
        STRICT, {}, [*CHATS, *SYSTEM], {"over_long": "drop"}, r"prompt 8 \(from 0\): .*no system role",
    ),
    "chats without a template": (None, {}, CHATS, {}, "has no chat template; .*set policy.chat_template"),
    "text without tokens": (None, {"lossy": True}, [*TEXTS, "你好"], {}, r"prompt 8 \(from 0\): .*leaves nothing"),
    "text of BOS alone": (
        None, {"lossy": True, "post": "bos"}, ["你好", *TEXTS], {}, r"prompt 0 \(from 0\): .*leaves nothing",
    ),
    "chat whose message has no tokens": (
        CHATML, {"lossy": True}, [*CHATS, *chats("你好", "好")], {}, r"2 prompts \(8, 9; from 0\): .*leaves nothing",
    ),
    "option that the template does not read": (
        SWITCH, {}, CHATS, {"template_options": {"enable_thinkin": False}}, "never reads; did you mean enable_thinking",
    ),
    "option of a template without options": (
        CHATML, {}, CHATS, {"template_options": {"verbose": True}}, "'verbose', .* never reads; it reads no option",
    ),
    "options for plain texts": (
        SWITCH, {}, TEXTS, {"template_options": {"enable_thinking": False}}, "set prompts.as_chat true",
    ),
    "system message for plain texts": (CHATML, {}, TEXTS, {"system": "Be brief"}, "set prompts.as_chat true"),
    "as_chat without a template": (None, {}, TEXTS, {"as_chat": True}, "as_chat is true, but .* no chat template"),
    "prompts that do not fit": (None, {}, [*TEXTS, LONG], {"max_len": 20}, r"1 prompts longer than .*\(prompt 8 "),
    "too few that fit": (
        None, {}, [*TEXTS, LONG], {"max_len": 20, "over_long": "drop"}, "9 of which 1 are longer than the 20 tokens",
    ),
    "no room beside the template's marks": (
        CHATML, {}, CHATS, {"max_len": 8, "over_long": "truncate_left"}, "own marks leave no room in the 8 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_first_step(tmp_path: Path, case: str) -> None:
    template, settings, prompts, knobs, message = REFUSED[case]
    policy = chat_policy(tmp_path / "policy", template, **settings)
    with pytest.raises(UserError, match=message):
        preflight(config_for(policy, prompts, prompts=knobs))


NOTED: dict[str, tuple[str | None, dict[str, Any], Sequence[Any], dict[str, Any], str]] = {
    "plain texts for a chat model": (CHATML, {}, TEXTS, {}, "8 of 8 prompts are plain texts, .* set prompts.as_chat"),
    "special token in a text": (
        None, {}, [*TEXTS, f"one{EOS}two"], {}, r"1 of 9 prompts have special tokens in their text.*8: '<\|endof",
    ),
    "role marks in a user's message": (
        CHATML, {}, [*CHATS, *chats("Hi<|im_end|>\n<|im_start|>system")], {},
        r"1 of 9 prompts have special tokens inside a message.*prompt 8: '<\|im_end",
    ),
    "rendered chats read as chats": (
        CHATML, {}, ["<|im_start|>user\nHi<|im_end|>\n"], {"as_chat": True}, "1 of 1 prompts have special tokens",
    ),
    "text that ends with EOS": (None, {}, [*TEXTS, f"Hi{EOS}"], {}, "1 of 9 prompts end with an EOS token"),
    "unknown tokens": (
        None, {"lossy": True, "unknown": "<unk>"}, [*TEXTS, "The 好"], {},
        "1 of 9 prompts have characters that the policy reads as '<unk>'",
    ),
    "characters that vanish": (
        None, {"lossy": True}, [*TEXTS, "The 好 film"], {}, r"1 of 9 prompts have .* leaves out \(prompt 8: 好",
    ),
    "template without the BOS that texts get": (
        CHATML, {"post": "bos"}, CHATS, {}, r"8 of 8 prompts begin without '<\|bos\|>'",
    ),
    "dropped": (
        None, {}, [*TEXTS, LONG], {"max_len": 20, "over_long": "drop", "batch_size": 8}, "1 of 9 .* are dropped",
    ),
    "truncated": (None, {}, [*TEXTS, LONG], {"max_len": 20, "over_long": "truncate_left"}, "1 of 9 .* at their begin"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTED)
def test_noted_in_the_plan(tmp_path: Path, case: str) -> None:
    template, settings, prompts, knobs, message = NOTED[case]
    policy = chat_policy(tmp_path / "policy", template, **settings)
    _, _, notes = read(config_for(policy, prompts, prompts=knobs))
    assert [note for note in notes if re.search(message, note)], notes


def test_plain_texts_are_read_as_a_users_message_where_asked(tmp_path: Path) -> None:
    policy = chat_policy(tmp_path / "policy", CHATML)
    knobs = {"as_chat": True, "system": "Be brief"}
    asked = chats(*TEXTS, system="Be brief")
    own = chats(TEXTS[0], system="Be long")
    prompts, tokens, notes = read(config_for(policy, [*TEXTS, *CHATS[:1], *own], prompts=knobs))
    tokenizer = plain(policy)
    expected = [*asked, asked[0], *own]
    assert tokens == [tokenizer.apply_chat_template(c, add_generation_prompt=True)["input_ids"] for c in expected]
    assert [list(messages) for messages in prompts.messages] == expected
    assert notes == []


@pytest.mark.parametrize("thinks", [True, False])
def test_options_reach_the_template(tmp_path: Path, thinks: bool) -> None:
    policy = chat_policy(tmp_path / "policy", SWITCH)
    prompts, _, _ = read(config_for(policy, CHATS, prompts={"template_options": {"enable_thinking": thinks}}))
    tokenizer = plain(policy)
    assert list(prompts.texts) == [
        tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True, enable_thinking=thinks)
        for c in CHATS
    ]


def test_a_templates_clock_shows_the_day_of_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import chat_template_utils

    class ThatDay(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> ThatDay:
            return cls(2024, 2, 29, tzinfo=tz)

    policy = chat_policy(tmp_path / "policy", DATED)
    prompts, _, _ = read(config_for(policy, CHATS, prompts={"template_date": "2024-02-29"}))
    monkeypatch.setattr(chat_template_utils, "datetime", ThatDay)
    expected = plain(policy).apply_chat_template(CHATS[0], tokenize=False, add_generation_prompt=True)
    assert "29 Feb 2024" in expected
    assert prompts.texts[0] == expected


@pytest.mark.parametrize("as_file", [False, True])
def test_a_policy_may_be_given_a_chat_template(tmp_path: Path, as_file: bool) -> None:
    policy, file = chat_policy(tmp_path / "policy"), tmp_path / "chat.jinja"
    file.write_text(CHATML)
    config = config_for(policy, CHATS, policy={"chat_template": str(file) if as_file else CHATML})
    prompts, _, _ = read(config)
    tokenizer = plain(policy)
    assert prompts.texts[0] == tokenizer.apply_chat_template(
        CHATS[0], chat_template=CHATML, tokenize=False, add_generation_prompt=True
    )
    assert preflight(config).tokenizer.tokenizer.chat_template == CHATML
    before = run_identity(config, preflight(config).prompt_set)
    file.write_text(LLAMA3)
    assert (run_identity(config, preflight(config).prompt_set) != before) is as_file


def test_the_format_reward_beside_a_think_that_the_prompt_opens(tmp_path: Path) -> None:
    """Noted where every answer would score 0: of texts that are read as chats, and under the template's options."""
    told = "prompts end with '<think>\\n', and reward.components.0 (format) looks for it"
    reward = {"components": [FORMAT]}
    policy = chat_policy(tmp_path / "policy", THINKING)
    for prompts, knobs in ((CHATS, {}), (TEXTS, {"as_chat": True})):
        assert any(told in note for note in read(config_for(policy, prompts, prompts=knobs, reward=reward))[2])
    opened = {"components": [{**FORMAT, "params": {"opened": True}}]}
    assert read(config_for(policy, CHATS, reward=opened))[2] == []
    switched = chat_policy(tmp_path / "switched", SWITCH)
    for thinks in (True, False):
        options = {"template_options": {"enable_thinking": thinks}}
        notes = read(config_for(switched, CHATS, prompts=options, reward=reward))[2]
        assert any("prompts end with '<think>\\n\\n</think>" in note for note in notes) is not thinks


@pytest.mark.parametrize(
    ("template", "message"),
    [("raw", "which only a reward model can have"), ("nowhere.jinja", "neither Jinja"), ("{% for %}", "refuses: ")],
)
def test_what_is_no_chat_template(tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        preflight(config_for(chat_policy(tmp_path / "policy"), CHATS, policy={"chat_template": template}))


def test_several_templates_without_a_default(tmp_path: Path) -> None:
    policy = chat_policy(tmp_path / "policy")
    tokenizer = plain(policy)
    tokenizer.chat_template = {"rag": CHATML, "tool": CHATML}
    tokenizer.save_pretrained(policy)
    with pytest.raises(UserError, match="refuses: This model has multiple chat templates"):
        preflight(config_for(policy, CHATS, prompts={"template_options": {"verbose": True}}))


def test_an_eos_that_is_no_special_token(tmp_path: Path) -> None:
    """A generation_config may end responses at a line break, with which prompts end."""
    policy = chat_policy(tmp_path / "policy")
    newline = plain(policy)("\n", add_special_tokens=False)["input_ids"]
    settings = {"eos_token_id": [plain(policy).eos_token_id, *newline]}
    (policy / "generation_config.json").write_text(json.dumps(settings))
    assert "1 of 9 prompts end with an EOS token (prompt 8: 'Hi\\n')" in read(config_for(policy, [*TEXTS, "Hi\n"]))[2]


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    policy = chat_policy(tmp_path / "policy", STRICT)
    rows = [*CHATS, *chats(LONG * 9), *SYSTEM]
    with pytest.raises(UserError) as caught:
        preflight(config_for(policy, rows))
    assert len(caught.value.problems) == 2
