"""Rendering, tokenizing and truncating one prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_policies import ALTERNATING, BOS, CHATML, LLAMA3, TEXTS, chat_policy
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_core.contracts.config import PromptsConfig
from rlhf_core.prompts.assembly import AssembledPrompt, PromptAssembler, added_tokens

LONG = "The film was slow and not what this story felt, and at its end it was slow again"
BE_BRIEF = {"role": "system", "content": "Be brief"}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


class Case:
    """One tokenizer, and what it is asked."""

    def __init__(self, folder: Path, template: str | None, post: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(chat_policy(folder / "policy", template, post=post))
        self.assembler = PromptAssembler(self.tokenizer, PromptsConfig(), {self.tokenizer.eos_token_id})

    def rendered(self, *messages: dict[str, str]) -> str:
        return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    def num_tokens(self, *messages: dict[str, str]) -> int:
        return len(self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)["input_ids"])

    def cut(self, entry: Any, longest: int) -> AssembledPrompt | None:
        return self.assembler.truncated(self.assembler.assemble(entry), longest)


@pytest.mark.parametrize(("post", "expected"), [("", (0, 0)), ("bos", (1, 0)), ("eos", (0, 1)), ("both", (1, 1))])
def test_what_a_tokenizer_adds_to_a_text(tmp_path: Path, post: str, expected: tuple[int, int]) -> None:
    before, behind = added_tokens(Case(tmp_path, None, post).tokenizer)
    assert (len(before), len(behind)) == expected


def test_what_a_tokenizer_adds_that_knows_few_characters(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, processors

    made = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "Ω": 2}, merges=[]))
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    lossy = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    assert lossy("a", add_special_tokens=False)["input_ids"] == []
    assert added_tokens(lossy) == ([0], [1])


@pytest.mark.parametrize("post", ["", "bos"])
@pytest.mark.parametrize("longest", [2, 3, 9, 200])
def test_a_text_is_cut_behind_its_bos(tmp_path: Path, post: str, longest: int) -> None:
    case = Case(tmp_path, None, post)
    whole = case.tokenizer(LONG)["input_ids"]
    bos, text = (whole[:1], whole[1:]) if post else ([], whole)
    found = case.cut(LONG, longest)
    assert found is not None
    assert found.tokens == (whole if len(whole) <= longest else bos + text[len(bos) - longest :])
    assert found.num_truncated == len(whole) - len(found.tokens)
    assert found.text == case.tokenizer.decode(found.tokens[len(bos) :])
    assert found.text in LONG


def test_a_bos_that_the_text_itself_has_stays_in_tokens_and_text(tmp_path: Path) -> None:
    case = Case(tmp_path, None, "")
    found = case.cut(BOS + LONG, 5)
    assert found is not None
    assert found.tokens[0] == case.tokenizer.bos_token_id
    assert found.text == case.tokenizer.decode(found.tokens)


def test_a_letter_that_is_cut_in_its_middle(tmp_path: Path) -> None:
    """The text holds the whole letter whose last bytes are read."""
    case = Case(tmp_path, None, "")
    found = case.cut("你好", 4)
    assert found is not None
    assert found.tokens == case.tokenizer("你好")["input_ids"][-4:]
    assert found.text == "你好"


def test_no_room_beside_bos(tmp_path: Path) -> None:
    assert Case(tmp_path, None, "bos").cut(LONG, 1) is None


@pytest.mark.parametrize("template", [CHATML, LLAMA3, ALTERNATING])
def test_the_oldest_turns_of_a_chat_go_first(tmp_path: Path, template: str) -> None:
    case = Case(tmp_path, template, "bos")
    system = [] if template is ALTERNATING else [BE_BRIEF]
    turns = [user(TEXTS[0]), said("yes"), user(TEXTS[1]), said("no"), user(TEXTS[2])]
    for kept in (turns[2:], turns[4:]):
        longest = case.num_tokens(*system, *kept)
        found = case.cut([*system, *turns], longest)
        assert found is not None
        assert list(found.messages) == [*system, *kept]
        assert found.text == case.rendered(*system, *kept)
        assert found.tokens == case.tokenizer(found.text, add_special_tokens=False)["input_ids"]
        assert found.num_truncated == case.num_tokens(*system, *turns) - longest


@pytest.mark.parametrize("template", [CHATML, LLAMA3])
def test_then_the_beginning_of_the_last_message(tmp_path: Path, template: str) -> None:
    """As much of it as fits, and every mark of the template; judged by trying each character."""
    case = Case(tmp_path, template, "bos")
    chat = [BE_BRIEF, user("Hi"), said("Hello"), user(LONG)]
    longest = case.num_tokens(BE_BRIEF, user(LONG)) - 7
    fitting = [i for i in range(len(LONG)) if case.num_tokens(BE_BRIEF, user(LONG[i:])) <= longest]
    found = case.cut(chat, longest)
    assert found is not None
    content = found.messages[-1]["content"]
    assert list(found.messages) == [BE_BRIEF, user(content)]
    assert LONG.endswith(content)
    assert 0 <= len(LONG) - fitting[0] - len(content) <= 4  # cut between tokens
    assert found.text == case.rendered(BE_BRIEF, user(content))
    assert len(found.tokens) <= longest


def test_the_system_message_goes_only_where_nothing_else_fits(tmp_path: Path) -> None:
    case = Case(tmp_path, CHATML, "")
    system = {"role": "system", "content": LONG}
    least = case.num_tokens(system, user("t"))
    with_it, without = case.cut([system, user("Is it not")], least), case.cut([system, user("Is it not")], least - 1)
    assert with_it is not None
    assert without is not None
    assert [m["role"] for m in with_it.messages] == ["system", "user"]
    assert list(without.messages) == [user("Is it not")]


def test_whether_it_can_be_cut_at_all(tmp_path: Path) -> None:
    case = Case(tmp_path, LLAMA3, "bos")
    entries: list[Any] = [LONG, [user(LONG)], [BE_BRIEF, user(LONG)], [BE_BRIEF]]
    found = {True: 0, False: 0}
    for entry in entries:
        whole = case.assembler.assemble(entry)
        for longest in range(1, len(whole.tokens), 3):
            fits = case.cut(entry, longest) is not None
            assert case.assembler.can_be_truncated(whole, longest) is fits
            found[fits] += 1
    assert min(found.values()) > 5


def test_many_at_a_time_are_tokenized_as_one_by_one(tmp_path: Path) -> None:
    case = Case(tmp_path, CHATML, "both")
    texts = [f"{BOS if i % 3 == 0 else ''}{TEXTS[i % 8]} {i} 你\n" for i in range(301)]
    one_by_one = [case.assembler.tokens([text], are_chats=False)[0] for text in texts]
    assert case.assembler.tokens(texts, are_chats=False) == one_by_one
    assert case.assembler.tokens(texts, are_chats=True) == [
        case.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts
    ]
    assert one_by_one[1] == case.tokenizer(texts[1])["input_ids"][:-1]


def test_a_tokenizer_of_its_own_is_asked_itself(tmp_path: Path) -> None:
    """A model's tokenizer class may tokenize in a way of its own."""

    class Shouting(PreTrainedTokenizerFast):
        def _encode_plus(self, text: Any, *args: Any, **more: Any) -> Any:
            return super()._encode_plus([t.upper() for t in text] if isinstance(text, list) else text.upper(), **more)

    made = Shouting.from_pretrained(chat_policy(tmp_path / "policy"))
    found = PromptAssembler(made, PromptsConfig(), {0}).tokens(["a film"] * 100, are_chats=True)
    assert found == [made("A FILM", add_special_tokens=False)["input_ids"]] * 100
