"""A response's text is what it adds to its prompt's; stop sequences are found wherever that text has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from text_tokenizers import CHAT_MARKS, byte_level, sentencepiece, word_pieces
from transformers import PreTrainedTokenizerFast

from rlhf_core.models.texts import StopDetector, can_write, prompt_ends, response_text, special_ids, token_texts

MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte level": lambda: byte_level((*CHAT_MARKS, "<think>")),
    "byte level, clean up": lambda: byte_level(clean_up_tokenization_spaces=True),
    "llama2": sentencepiece,
    "metaspace": lambda: sentencepiece("metaspace"),
    "unigram, clean up": lambda: sentencepiece("unigram", clean_up_tokenization_spaces=True),
    "word pieces, clean up": lambda: word_pieces(clean_up_tokenization_spaces=True),
}


@pytest.fixture(scope="module")
def made() -> dict[str, PreTrainedTokenizerFast]:
    return {name: make() for name, make in MAKERS.items()}


def plain(tokenizer: Any, ids: Sequence[int], **settings: Any) -> str:
    return tokenizer.decode(ids, **{"skip_special_tokens": True, "clean_up_tokenization_spaces": False, **settings})


def text_of(tokenizer: Any, prompt: Sequence[int], response: Sequence[int], **settings: Any) -> str:
    return response_text(tokenizer, prompt_ends(tokenizer, [prompt])[0], response, **settings)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("num_prompts", [1, 9])
def test_it_is_what_the_whole_decoding_has_more_than_the_prompts(name: str, num_prompts: int, made: Any) -> None:
    """Judged by transformers' decoding of prompt and response together, for random responses to texts of any length."""
    tokenizer, random = made[name], np.random.default_rng(1)
    prompt = tokenizer(" and ".join(["The film was slow, and é"] * num_prompts))["input_ids"]
    compared = 0
    for _ in range(300):
        response = random.integers(0, len(tokenizer), random.integers(0, 8)).tolist()
        whole, before = plain(tokenizer, prompt + response), plain(tokenizer, prompt)
        if whole.startswith(before):
            assert text_of(tokenizer, prompt, response) == whole[len(before) :]
            compared += 1
    assert compared > 100


def test_of_byte_level_tokens_it_is_their_own_decoding(made: Any) -> None:
    tokenizer, random = made["byte level"], np.random.default_rng(2)
    prompt = tokenizer("The film was slow é")["input_ids"]
    for _ in range(300):
        response = random.integers(0, len(tokenizer), 8).tolist()
        assert text_of(tokenizer, prompt, response) == tokenizer.decode(response, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("name", "prompt", "response", "text"),
    [
        ("llama2", ["▁The"], ["▁film"], " film"),
        ("llama2", ["▁The"], ["▁", "▁film"], "  film"),
        ("llama2", ["<s>"], ["▁film"], "film"),  # the prompt has no text: what begins the whole text loses its space
        ("llama2", ["▁The", "<s>"], ["▁film", "</s>"], " film"),
        ("llama2", ["▁The"], ["<0xC3>", "<0xA9>"], "é"),
        ("llama2", ["▁The", "<0xC3>"], ["<0xA9>", "▁film"], "é film"),  # begins with the completed character
        ("llama2", ["▁The", "<0xC3>", "<0xA9>"], ["<0xFF>", "▁film"], "� film"),  # the prompt's é stays
        ("llama2", ["▁The", *["<0xE6>", "<0x96>", "<0x87>"] * 12], ["<0xC3>", "<0xA9>"], "é"),
        ("llama2", ["<0xC3>", "<0xA9>"], ["<0xFF>"], "�"),
        ("metaspace", ["▁The"], ["▁film"], " film"),
        ("unigram, clean up", ["▁s", "lo"], ["▁w", "on"], " won"),
        ("word pieces, clean up", ["the"], ["film", ",", "it", "was", "##n"], " film , it wasn"),
        ("word pieces, clean up", ["film"], ["##s", "[SEP]"], "s"),
    ],
)
def test_at_the_border(name: str, prompt: list[str], response: list[str], text: str, made: Any) -> None:
    tokenizer = made[name]
    before, after = (tokenizer.convert_tokens_to_ids(tokens) for tokens in (prompt, response))
    assert tokenizer.unk_token_id not in before + after, "the row names tokens that there are"
    assert text_of(tokenizer, before, after) == text


@pytest.mark.parametrize("name", ["byte level", "llama2"])
def test_special_tokens_are_left_out_or_kept(name: str, made: Any) -> None:
    tokenizer = made[name]
    mark = "<think>" if name == "byte level" else "</s>"
    prompt, (space, film) = tokenizer("The film")["input_ids"], (" slow and", " not what")
    ids = [tokenizer("x" + text, add_special_tokens=False)["input_ids"][1:] for text in (space, film)]
    response = [*ids[0], tokenizer.convert_tokens_to_ids(mark), *ids[1]]
    if name == "llama2":  # its tokens are whole words behind ▁
        response = tokenizer.convert_tokens_to_ids(["▁slow", mark, "▁not"])
        space, film = " slow", " not"
    assert text_of(tokenizer, prompt, response) == f"{space}{film}"
    assert text_of(tokenizer, prompt, response, keep_special_tokens=True) == f"{space}{mark}{film}"


def test_texts_of_single_tokens_are_the_same_in_all_places(made: Any) -> None:
    tokenizer = made["llama2"]
    ids = tokenizer.convert_tokens_to_ids(["▁film", "m", "</s>"])
    assert token_texts(tokenizer, ids) == [" film", "m", "</s>"]


class TestStop:
    @pytest.mark.parametrize("name", MAKERS)
    @pytest.mark.parametrize("stop", [["s"], ["il"], [" w", "é"], ["as no"]])
    def test_found_at_the_token_that_completes_it(self, name: str, stop: list[str], made: Any) -> None:
        """Judged by the whole text after every token."""
        tokenizer, random = made[name], np.random.default_rng(3)
        words = tokenizer("film was not slow é, quite as not", add_special_tokens=False)["input_ids"]
        prompt = tokenizer("The film")["input_ids"]
        (end,) = prompt_ends(tokenizer, [prompt])
        detector, found = StopDetector(tokenizer, stop), 0
        for _ in range(60):
            special = sorted(special_ids(tokenizer))
            response = [int(random.choice(words if random.random() < 0.6 else special)) for _ in range(30)]
            for length in range(1, 31):
                has = any(text in text_of(tokenizer, prompt, response[:length]) for text in stop)
                assert detector.has_stop(end, response[:length]) == has
                if has:
                    found += 1
                    break
        assert found > 5 or stop == ["as no"]

    @pytest.mark.parametrize("gap", [0, 5, 40])
    def test_across_tokens_without_text(self, gap: int, made: Any) -> None:
        tokenizer = made["byte level"]
        (end,) = prompt_ends(tokenizer, [tokenizer("The film")["input_ids"]])
        ids = tokenizer("Hu", add_special_tokens=False)["input_ids"]
        ids += [tokenizer.convert_tokens_to_ids("<think>")] * gap
        ids += tokenizer("man:", add_special_tokens=False)["input_ids"]
        detector = StopDetector(tokenizer, ["Human:"])
        assert [detector.has_stop(end, ids[:n]) for n in (len(ids) - 1, len(ids))] == [False, True]

    @pytest.mark.parametrize("num_characters", [1, 3, 30])
    def test_in_a_run_of_bytes(self, num_characters: int, made: Any) -> None:
        """Byte fallback decodes a run of bytes as one: cut inside a character it would be nothing."""
        tokenizer = made["llama2"]
        ids = tokenizer("文" * num_characters + "字", add_special_tokens=False)["input_ids"]
        assert len(ids) > 3 * num_characters
        (end,) = prompt_ends(tokenizer, [tokenizer("The film")["input_ids"]])
        detector = StopDetector(tokenizer, ["文字"])
        assert [detector.has_stop(end, ids[:n]) for n in range(1, len(ids) + 1)] == [False] * (len(ids) - 1) + [True]

    @pytest.mark.parametrize(
        ("stop", "tokens", "has"),
        [
            ("<|im_end|>", ["<|im_end|>"], True),
            ("<|im_end|>", ["<|im_start|>"], False),
            ("s<|im_end|>", ["s", "<|im_end|>"], True),
            ("s<|im_end|>", ["s", "<|im_start|>", "<|im_end|>"], True),  # tokens that nobody names are not seen
            ("<|im_end|>", list("<|im_end|>"), True),
            ("im_end", ["<|im_end|>"], False),
        ],
    )
    def test_that_names_a_special_token(self, stop: str, tokens: list[str], has: bool, made: Any) -> None:
        tokenizer = made["byte level"]
        (end,) = prompt_ends(tokenizer, [tokenizer("The film")["input_ids"]])
        ids = tokenizer.convert_tokens_to_ids(tokens)
        assert None not in ids
        assert StopDetector(tokenizer, [stop, "another"]).has_stop(end, ids) == has

    @pytest.mark.parametrize(
        ("name", "text", "can"),
        [
            ("byte level", "Human:", True),
            ("byte level", "<|im_end|>\n", True),
            ("llama2", "Human:", True),
            ("llama2", " 文", True),
            ("word pieces, clean up", "film", True),
            ("word pieces, clean up", "Film", False),
            ("word pieces, clean up", "film.", False),
            ("unigram, clean up", "文", False),
        ],
    )
    def test_whether_a_text_can_be_written(self, name: str, text: str, can: bool, made: Any) -> None:
        assert can_write(made[name], text) == can
