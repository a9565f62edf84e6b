"""Tokens as a person can read them: special tokens by their names, every invisible character made visible."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN: Final = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
_BYTE: Final = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Piece:
    """One token. Example: ``Piece(262, "·the", is_special=False)``."""

    token: int
    text: str
    is_special: bool
    ends_line: bool = False


def token_pieces(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> list[Piece]:
    """Each token as it stands in the vocabulary, its bytes as text.

    Args:
        tokenizer: whose tokens they are.
        tokens: of a text.
    """
    special = special_tokens(tokenizer)
    alphabet = _byte_alphabet(tokenizer)
    pieces: list[Piece] = []
    for token in tokens:
        name = cast("str | None", tokenizer.convert_ids_to_tokens(token))
        if name is None:
            pieces.append(Piece(token, f"[{token}]", is_special=True))
        elif token in special and not _BYTE.fullmatch(name):
            pieces.append(Piece(token, visible(name), is_special=True))
        else:
            text = _text(name, alphabet)
            pieces.append(Piece(token, visible(text), is_special=False, ends_line=text.endswith("\n")))
    return pieces


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Id -> text of the tokens that a tokenizer reads as special ones wherever their text stands."""
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    added = {token: about.content for token, about in tokenizer.added_tokens_decoder.items() if about.special}
    return {**added, **dict(named)}


def visible(text: str) -> str:
    r"""A text whose blanks are ``·``, line ends ``⏎``, and whose other invisible characters are escapes (``\x1b``)."""
    return "".join(SHOWN.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def _text(name: str, alphabet: dict[str, int]) -> str:
    """The text of a token of the vocabulary; a part of a character as escaped bytes."""
    if byte := _BYTE.fullmatch(name):
        raw = bytes([int(byte[1], 16)])
    elif alphabet and all(c in alphabet for c in name):
        raw = bytes(alphabet[c] for c in name)
    else:
        return name.replace("▁", " ")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("ascii", errors="backslashreplace")


def _byte_alphabet(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Character -> byte of a byte-level vocabulary; empty for others."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if not tokenizer.is_fast or "ByteLevel" not in str(cast("Any", tokenizer).backend_tokenizer.decoder):
        return {}
    return {character: byte for byte, character in bytes_to_unicode().items()}
