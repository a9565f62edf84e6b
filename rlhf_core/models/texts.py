"""Text of tokens: what a response adds to its prompt's text, and whether it holds a stop sequence.

Decoders change the beginning of a string: SentencePiece's and Metaspace take a space off, WordPiece joins words by
spaces, byte fallback joins bytes to characters. So a response is decoded behind the end of its prompt, and its text is
what it adds there. ``clean_up_tokenization_spaces`` is off everywhere: it would take characters away.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from rlhf_core.prompts.pieces import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANCHOR: Final = "a"
"""Before a token that is decoded alone."""
TAIL_LEN: Final = 32
"""Tokens of a prompt that a response is decoded behind, where they decode cleanly; else the whole prompt."""
SPLIT: Final = "�"
"""What decoders write for the bytes of an incomplete character."""


def decoded(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """Text of tokens that stand alone, spaces as the tokens have them."""
    text = tokenizer.decode(
        list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
    return cast("str", text)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that ``skip_special_tokens`` leaves out."""
    return frozenset(special_tokens(tokenizer))


@dataclass(frozen=True)
class PromptEnd:
    """The last tokens of a prompt, without special ones, and their text: responses are decoded behind them."""

    token_ids: list[int]
    text: str


def prompt_ends(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Sequence[int]]) -> list[PromptEnd]:
    """What the responses to each prompt are decoded behind.

    Args:
        tokenizer: the policy's.
        prompts: tokens of whole prompts.
    Returns: of each, its last TAIL_LEN ordinary tokens; all of them where those are blank, or hold part of a character.
    """
    special = special_ids(tokenizer)

    def end(prompt_ids: Sequence[int]) -> PromptEnd:
        plain = [token for token in prompt_ids if token not in special]
        tail = plain[-TAIL_LEN:]
        text = decoded(tokenizer, tail)
        if len(tail) < len(plain) and (not text.strip() or SPLIT in text):
            tail, text = plain, decoded(tokenizer, plain)
        return PromptEnd(tail, text)

    return [end(prompt_ids) for prompt_ids in prompts]


def response_text(
    tokenizer: PreTrainedTokenizerBase,
    end: PromptEnd,
    response_ids: Sequence[int],
    *,
    keep_special_tokens: bool = False,
) -> str:
    """What a response adds to the text of its prompt.

    Args:
        tokenizer: the policy's.
        end: of the prompt.
        response_ids: tokens of the response.
        keep_special_tokens: write special tokens by their names; else they are left out.
    Returns: the decoding of both without the prompt's. Where a prompt ends inside a character that the response
        completes, the text begins with that character. Where the response's first bytes spoil those of the prompt
        (byte fallback decodes a run of bytes as one), the prompt's text stays and its bytes are left out.
    """
    joint = decoded(tokenizer, [*end.token_ids, *response_ids], skip_special_tokens=not keep_special_tokens)
    if joint.startswith(end.text):
        return joint[len(end.text) :]
    whole = end.text.rstrip(SPLIT)
    if whole != end.text and joint.startswith(whole):
        return joint[len(whole) :]
    for length in range(len(end.token_ids) - 1, 0, -1):
        before = decoded(tokenizer, end.token_ids[:length])
        if not before.strip() or before.endswith(SPLIT):
            continue
        joint = decoded(
            tokenizer, [*end.token_ids[:length], *response_ids], skip_special_tokens=not keep_special_tokens
        )
        if joint.startswith(before):
            return joint[len(before) :]
    return decoded(tokenizer, response_ids, skip_special_tokens=not keep_special_tokens)


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """The text of each token as it stands inside a text, its leading space included; special tokens by their names."""
    anchor = tokenizer(ANCHOR, add_special_tokens=False)["input_ids"]
    before = str(tokenizer.decode(anchor, clean_up_tokenization_spaces=False))

    def text(token_id: int) -> str:
        after = str(tokenizer.decode([*anchor, token_id], clean_up_tokenization_spaces=False))
        if after.startswith(before):
            return after.removeprefix(before)
        return str(tokenizer.decode([token_id], clean_up_tokenization_spaces=False))

    return [text(token_id) for token_id in token_ids]


class StopDetector:
    """Whether a response contains a stop sequence.

    A stop sequence that names special tokens (``<|im_end|>``) is looked for in the text in which those tokens are
    written by their names, any other in the response's text.

    Args:
        tokenizer: the policy's.
        stop: the sequences.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._widths: dict[int, int] = {}
        special = special_ids(tokenizer)
        self.named = named_special_tokens(tokenizer, stop)
        with_names = [text for text in stop if any(name in text for name in self.named.values())]
        self._groups: list[tuple[list[str], Collection[int]]] = [
            (with_names, special - self.named.keys()),
            ([text for text in stop if text not in with_names], special),
        ]

    def has_stop(self, end: PromptEnd, response_ids: Sequence[int]) -> bool:
        """Whether the tokens so far contain one.

        Args:
            end: of the prompt.
            response_ids: all tokens of the response up to now; without the last one it had none.
        """
        return any(
            text in seen
            for stop, hidden in self._groups
            if stop
            for seen in [self._seen(end, response_ids, hidden, max(len(text.encode()) for text in stop))]
            for text in stop
        )

    def _seen(self, end: PromptEnd, response_ids: Sequence[int], hidden: Collection[int], num_bytes: int) -> str:
        """The end of the response's text: the rest was seen before."""
        needed = num_bytes + 4  # a token with text is at least a byte; 4 for a split character
        tail: list[int] = []
        for token_id in reversed(response_ids):
            if token_id in hidden:
                continue
            width = self._width(token_id)
            if needed <= 0 and width != _BYTE:  # bytes decode as one run, from its beginning on
                return decoded(self._tokenizer, tail[::-1], skip_special_tokens=False)
            tail.append(token_id)
            needed -= min(width, 1)
        return response_text(self._tokenizer, end, tail[::-1], keep_special_tokens=True)

    def _width(self, token_id: int) -> int:
        """0 of a token that adds no text, _BYTE of one that is a byte of a character, else 1."""
        if token_id not in self._widths:
            name = cast("str", self._tokenizer.convert_ids_to_tokens(token_id))
            is_byte = len(name) == 6 and name.startswith("<0x") and name.endswith(">")
            self._widths[token_id] = _BYTE if is_byte else min(1, len(token_texts(self._tokenizer, [token_id])[0]))
        return self._widths[token_id]


_BYTE: Final = 2


def named_special_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[int, str]:
    """Id -> name of the special tokens whose names stand in some texts."""
    names = special_tokens(tokenizer)
    return {token_id: names[token_id] for token_id in sorted(names) if any(names[token_id] in text for text in texts)}


def can_write(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether a text stands in what its own tokens decode to, alone or behind other text."""
    return any(
        text
        in decoded(
            tokenizer, tokenizer(before + text, add_special_tokens=False)["input_ids"], skip_special_tokens=False
        )
        for before in ("", ANCHOR, f"{ANCHOR} ")
    )
