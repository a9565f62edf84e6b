"""Token ids and embedding rows: which ids a model can read, which of them the policy can draw."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DrawableTokens:
    """The ids that the policy can draw: those that are tokens and have a row.

    Example: ``DrawableTokens(300)``; ids 300 to 447 of a padded embedding are outside.
    """

    num_tokens: int
    """One more than the largest of them."""
    holes: tuple[int, ...] = ()
    """Smaller ids that no token has."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, rows: int) -> DrawableTokens:
        """Those of a tokenizer that have one of the first ``rows`` rows."""
        ids = {token for token in vocabulary(tokenizer).values() if 0 <= token < rows}
        num_tokens = max(ids, default=-1) + 1
        return cls(num_tokens, () if len(ids) == num_tokens else tuple(sorted(set(range(num_tokens)) - ids)))


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Each token of a tokenizer with its id, added and special ones included."""
    return cast("dict[str, int]", tokenizer.get_vocab())


def tokens_without_row(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[dict[str, int], dict[str, int]]:
    """(tokens that a text can have, tokens that none has unless somebody spells them) of the ids beyond the rows.

    A special token that no chat template spells, that nothing adds by itself, and that neither begins nor ends a text
    comes up in no text: the ``[PAD]`` of a model that was never resized, Gemma 3's ``<image_soft_token>``.

    Args:
        tokenizer: of the model.
        rows: of the model's embedding.
    """
    beyond = {token: id_ for token, id_ in sorted(vocabulary(tokenizer).items(), key=lambda i: i[1]) if id_ >= rows}
    if not beyond:
        return {}, {}
    added = cast("dict[int, Any]", tokenizer.added_tokens_decoder).values()
    special = {str(token) for token in added if token.special} | set(cast("list[str]", tokenizer.all_special_tokens))
    framing = cast("list[int]", tokenizer("a")["input_ids"])
    marks = {getattr(tokenizer, f"{name}_token", None) for name in ("bos", "eos", "cls", "sep", "mask")}
    templates = chat_template_texts(tokenizer)
    spelled = {
        token: id_
        for token, id_ in beyond.items()
        if token not in special or token in marks or id_ in framing or any(token in text for text in templates)
    }
    return spelled, {token: id_ for token, id_ in beyond.items() if token not in spelled}


def chat_template_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Every chat template of a tokenizer: none, one, or several by name."""
    template: Any = tokenizer.chat_template
    texts = cast("Mapping[str, Any]", template).values() if isinstance(template, Mapping) else [template]
    return [text for text in texts if isinstance(text, str)]


def byte_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str] | None:
    """Byte -> its token, where a tokenizer writes what it does not know as bytes; None where it has an unknown token.

    Source: GPT-2's ``bytes_to_unicode`` (byte-level BPE); SentencePiece's ``byte_fallback``.
    """
    known, backend = vocabulary(tokenizer), getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        description = json.loads(backend.to_str())
        parts = json.dumps([description.get("pre_tokenizer"), description.get("decoder")])
        if '"ByteLevel"' in parts:
            plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
            rest = [byte for byte in range(256) if byte not in plain]
            letters = dict(zip(plain, map(chr, plain), strict=True))
            letters |= {byte: chr(256 + place) for place, byte in enumerate(rest)}
            return {byte: letter for byte, letter in letters.items() if letter in known}
    fallback = {byte: f"<0x{byte:02X}>" for byte in range(256)}
    return fallback if all(token in known for token in fallback.values()) else None
