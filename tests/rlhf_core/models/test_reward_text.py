"""What a reward model reads: whose template, which tokens frame it, and what is left of a long text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from text_tokenizers import CHAT_MARKS, CHATML, byte_level, sentencepiece, word_pieces

from rlhf_core.models.reward_text import Conversation, RewardReader, text_with_special_tokens

QUESTION = [{"role": "user", "content": "well?"}]
ANSWER = [*QUESTION, {"role": "assistant", "content": "good"}]
OWN = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
BOS = "{{ bos_token }}" + OWN


def chatty(template: str | None = CHATML, **settings: Any) -> Any:
    return byte_level(CHAT_MARKS, chat_template=template, **settings)


def reader(own: Any, policy: Any = None, *, shares: bool = False, **settings: Any) -> RewardReader:
    return RewardReader(own, policy, shares_vocabulary=shares, **settings)


def chat(policy: Any, answer: str = "good") -> Conversation:
    text = policy.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    prompt, response = (policy(t, add_special_tokens=False)["input_ids"] for t in (text, answer))
    return Conversation(text, answer, QUESTION, [*prompt, *response, policy.eos_token_id], len(prompt), {}, "eos")


def rendered(tokenizer: Any, template: str | None = None) -> list[int]:
    """By transformers itself."""
    return list(tokenizer.apply_chat_template(ANSWER, chat_template=template)["input_ids"])


class TestWhoseTemplate:
    @pytest.mark.parametrize("shares", [False, True])
    def test_its_own_where_the_policy_has_another_one(self, shares: bool) -> None:
        policy, own = chatty(), chatty(OWN)
        assert reader(own, policy, shares=shares).token_ids(chat(policy)) == rendered(own)

    def test_the_policys_tokens_where_vocabulary_and_template_are_the_same(self) -> None:
        policy = chatty()
        asked = chat(policy)
        assert reader(chatty(), policy, shares=True).token_ids(asked) == asked.policy_tokens
        assert reader(chatty(), policy).token_ids(asked) == rendered(policy)

    @pytest.mark.parametrize("shares", [False, True])
    def test_none_is_refused_until_one_is_chosen(self, shares: bool) -> None:
        policy, own = chatty(), chatty(None)
        with pytest.raises(ValueError, match="it has no chat template"):
            reader(own, policy, shares=shares).token_ids(chat(policy))
        assert reader(own, policy, shares=shares, template=OWN).token_ids(chat(policy)) == rendered(own, OWN)

    def test_raw_is_what_the_policy_has_read_and_written(self) -> None:
        policy, own = chatty(), chatty(None)
        asked = chat(policy)
        assert reader(own, policy, shares=True, raw=True).token_ids(asked) == asked.policy_tokens
        text = "<|im_start|>user\nwell?<|im_end|>\n<|im_start|>assistant\ngood"
        assert reader(own, policy, raw=True).token_ids(asked) == own(text)["input_ids"]

    def test_options_reach_the_template(self) -> None:
        own = chatty("{{ mood }} " + OWN)
        wanted = list(own.apply_chat_template(ANSWER, mood="kind")["input_ids"])
        assert (
            reader(own, chatty(own.chat_template), shares=True, options={"mood": "kind"}).token_ids(chat(own)) == wanted
        )

    def test_a_template_shows_the_date_of_the_run(self) -> None:
        own = chatty("{{ strftime_now('%d %b %Y') }} " + OWN)
        found = reader(own, date="2024-07-26").text(chat(chatty()))
        assert found == "26 Jul 2024 [user] well? [assistant] good "

    @pytest.mark.parametrize("shares", [False, True])
    def test_plain_prompts_are_read_as_they_are(self, shares: bool) -> None:
        own = chatty()
        plain = Conversation("well?", "good", [], [5, 6], 1)
        assert reader(own, own, shares=shares).token_ids(plain) == ([5, 6] if shares else own("well?good")["input_ids"])


class TestFrame:
    @pytest.mark.parametrize("make", [word_pieces, sentencepiece, lambda: chatty(frame=("", "<|endoftext|>"))])
    @pytest.mark.parametrize("max_len", [3, 4, 6, 60])
    def test_of_a_long_text_is_that_of_transformers(self, make: Callable[[], Any], max_len: int) -> None:
        own = make()
        text = "the film was slow and quiet"
        own.truncation_side = "left"
        wanted = own(text, truncation=True, max_length=max_len)["input_ids"]
        found = reader(own, max_len=max_len).token_ids(Conversation(text[:8], text[8:], [], []))
        assert found == wanted

    @pytest.mark.parametrize("max_len", [4, 6, 100])
    @pytest.mark.parametrize("writes", [False, True])
    def test_an_encoders_stays_around_a_rendered_text(self, max_len: int, writes: bool) -> None:
        """Whether the template writes [CLS] and [SEP] itself or not: the score is read at [CLS]."""
        own = word_pieces(chat_template="[CLS]" + OWN + "[SEP]" if writes else OWN)
        plain = own("[user] well? [assistant] good ", add_special_tokens=False)["input_ids"]
        found = reader(own, max_len=max_len).token_ids(chat(chatty()))
        assert found == [own.cls_token_id, *plain[-(max_len - 2) :], own.sep_token_id]

    @pytest.mark.parametrize("max_len", [3, 5, 100])
    def test_bos_stays_before_a_rendered_text_and_is_not_doubled(self, max_len: int) -> None:
        own = chatty(BOS, bos="<|im_start|>", frame=("<|im_start|>", ""))
        whole = rendered(own)
        assert whole.count(own.bos_token_id) == 1
        wanted = whole if len(whole) <= max_len else [own.bos_token_id, *whole[-(max_len - 1) :]]
        assert reader(own, max_len=max_len).token_ids(chat(chatty())) == wanted

    @pytest.mark.parametrize(("max_len", "wanted"), [(3, [1, 8, 9]), (2, [1, 9]), (1, [9]), (9, [1, 5, 6, 7, 8, 9])])
    def test_bos_stays_before_the_policys_tokens(self, max_len: int, wanted: list[int]) -> None:
        found = reader(sentencepiece(), shares=True, max_len=max_len)
        assert found.token_ids(Conversation("", "", [], [1, 5, 6, 7, 8, 9])) == wanted

    @pytest.mark.parametrize("frame", [("<|im_start|>", ""), ("", "<|im_end|>"), ("<|im_start|>", "<|im_end|>")])
    def test_a_text_that_has_it_already_gets_no_second_one(self, frame: tuple[str, str]) -> None:
        own = chatty(bos="<|im_start|>", frame=frame)
        found = reader(own).token_ids(Conversation(f"{frame[0]}The film", f" was{frame[1]}", [], []))
        assert found == own("The film was")["input_ids"]


class TestSpecialTokens:
    @pytest.fixture
    def policy(self) -> Any:
        return byte_level((*CHAT_MARKS, "<think>"))

    @pytest.mark.parametrize(
        ("response", "reason", "text"),
        [
            ("<think>so<|endoftext|>", "eos", "<think>so"),
            ("<think>so", "length", "<think>so"),
            ("<think>so<|im_end|>", "stop", "<think>so"),
            ("<think>so.", "stop", "<think>so."),
            ("<|endoftext|>", "eos", ""),
        ],
    )
    def test_are_kept_but_for_the_one_that_ended_the_response(
        self, policy: Any, response: str, reason: str, text: str
    ) -> None:
        prompt, ids = policy("The film ")["input_ids"], policy(response)["input_ids"]
        found = Conversation("The film ", "so", [], [*prompt, *ids], len(prompt), {}, reason)
        assert text_with_special_tokens(policy, found) == text
        other = chatty()
        kept = reader(other, policy, keep_special_tokens=True).token_ids(found)
        assert kept == other(f"The film {text}")["input_ids"]
        assert reader(other, policy).token_ids(found) == other("The film so")["input_ids"]
