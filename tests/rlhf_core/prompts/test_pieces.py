"""Tokens as a person reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_policies import BOS, chat_policy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_core.prompts.pieces import Piece, token_pieces, visible


def test_bytes_special_tokens_and_invisible_characters(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_policy(tmp_path / "policy"))
    pieces = token_pieces(tokenizer, tokenizer(f"{BOS}The film\n你\x1b")["input_ids"])
    assert "".join(piece.text for piece in pieces) == rf"{BOS}The·film⏎\xe4\xbd\xa0\x1b"
    assert [piece.text for piece in pieces if piece.is_special] == [BOS]
    assert [piece.text for piece in pieces if piece.ends_line] == ["⏎"]


def test_a_vocabulary_of_sentencepiece() -> None:
    names = {"<s>": 0, "▁The": 1, "▁": 2, "film": 3, "<0x0A>": 4, "<0xE4>": 5}
    made = Tokenizer(models.WordLevel(names, unk_token="▁"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")
    assert token_pieces(tokenizer, range(6)) == [
        Piece(0, "<s>", is_special=True),
        Piece(1, "·The", is_special=False),
        Piece(2, "·", is_special=False),
        Piece(3, "film", is_special=False),
        Piece(4, "⏎", is_special=False, ends_line=True),
        Piece(5, r"\xe4", is_special=False),
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b", "a·b"),
        ("\t\r\n", "⇥␍⏎"),
        ("\x1b[31m", r"\x1b[31m"),
        ("a\u200bb\u202e", r"a\u200bb\u202e"),
        ("é 你", "é·你"),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert visible(text) == shown
