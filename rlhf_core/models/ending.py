"""The tokens that end a response, and the one that fills masked cells: chosen from what a model folder says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rlhf_core.contracts.errors import UserError
from rlhf_core.models.model_files import config_of, generation_config_of, place_of
from rlhf_core.models.untrusted import read_small_json
from rlhf_core.models.vocabulary import byte_tokens, chat_template_texts, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADDING = re.compile(r"[<\[].*pad.*[>\]]", re.IGNORECASE)
RESERVED = re.compile(r"[<\[].*(reserved|unused|extra|dummy|placeholder).*[>\]]", re.IGNORECASE)
"""Names of tokens that no training text has: Qwen's ``<|fim_pad|>``, Llama 3's ``<|reserved_special_token_0|>``."""
NEVER_IN_UTF_8 = (0xFF, 0xFE, 0xFD, 0xFC, 0xFB, 0xFA, 0xF9, 0xF8, 0xF7, 0xF6, 0xF5, 0xC1, 0xC0)
"""Bytes that no text has."""
PAD_REMEDY = "set policy.pad_token to a token of its vocabulary that is not EOS (it is never trained on or stored)"
MAX_NAMED = 3


@dataclass(frozen=True)
class EndIds:
    """Ids that end a response, and the file that says so.

    Example: ``EndIds(frozenset({0, 2}), "generation_config.json")``
    """

    ids: frozenset[int]
    source: str


def end_ids(name: str, rows: int | None) -> EndIds:
    """EOS ids of generation_config.json; where it names none, those of config.json: what ``generate`` stops at.

    Args:
        name: folder or hub id of the model.
        rows: of its embedding, where they are known.
    Raises: UserError for what is no token id, or has no row.
    """
    from transformers import GenerationConfig

    source = "generation_config.json"
    try:
        eos: Any = getattr(generation_config_of(name), "eos_token_id", None)
    except Exception as error:
        raise UserError(f"policy.model {name!r} has a {source} that does not load: {error}") from None
    if eos is None or eos == []:
        source, config = "config.json", config_of(name)
        eos = None if config is None else GenerationConfig.from_model_config(config).eos_token_id
        if eos is not None and not _is_said(name):
            eos = [i for i in _as_list(eos) if type(i) is int and 0 <= i < (rows or 0)]  # a default of the class
    ids = _as_list(eos)
    for token in ids:
        is_id = type(token) is int and token >= 0
        if not is_id or (rows is not None and token >= rows):
            why = f"has no row in an embedding of {rows} rows" if is_id else "is no token id"
            raise UserError(
                f"policy.model {name!r} has the eos_token_id {str(token)[:40]!r} in its {source}, which {why}; set it "
                "to the number of the token that ends a text"
            )
    return EndIds(frozenset(ids), source)


def _as_list(eos: Any) -> list[Any]:
    return cast("list[Any]", eos) if isinstance(eos, list) else [] if eos is None else [eos]


def _is_said(name: str) -> bool:
    """Whether a config.json names an EOS itself."""
    path = Path(place_of(name)) / "config.json"
    if not path.is_file():
        return True
    values = read_small_json(path, repr(name))
    return "eos_token_id" in values or any("eos_token_id" in v for v in values.values() if isinstance(v, dict))


def pad_token(
    tokenizer: PreTrainedTokenizerBase, name: str, wanted: str | None, eos_ids: frozenset[int], rows: int | None
) -> tuple[str, str]:
    """(token that fills masked cells, why it is not the tokenizer's PAD: empty if it is).

    It is never read: any id that has a row would do. One that no text has leaves nothing to think about.

    Args:
        tokenizer: of the policy.
        name: its folder, for errors.
        wanted: ``policy.pad_token``.
        eos_ids: tokens that end a response.
        rows: of the policy's embedding; None where they are not known.
    Raises: UserError if the wanted token is not in the vocabulary, ends a response or has no row; or, without one, no
        token is known that no text has.
    """
    known = vocabulary(tokenizer)
    own = cast("str | None", tokenizer.pad_token)
    limit = len(known) + max(known.values()) + 1 if rows is None else rows
    if wanted is not None:
        problem = (
            f"policy.pad_token {wanted!r} is not in the vocabulary of policy.model {name!r}"
            if wanted not in known
            else f"policy.model {name!r} pads with {wanted!r}, which is also its EOS token"
            if known[wanted] in eos_ids
            else f"policy.pad_token {wanted!r} is token {known[wanted]} of policy.model {name!r}, whose embedding has "
            f"{rows} rows"
            if known[wanted] >= limit
            else ""
        )
        if problem:
            raise UserError(f"{problem}; {PAD_REMEDY}")
        return wanted, ""
    if own is None or own not in known:
        why = "its tokenizer has no PAD"
    elif known[own] in eos_ids:
        why = f"its tokenizer's PAD {own!r} also ends a response"
    elif known[own] >= limit:
        why = f"its tokenizer's PAD {own!r} is token {known[own]}, and its embedding has {rows} rows"
    else:
        return own, ""
    usable = {token: id_ for token, id_ in known.items() if id_ < limit and id_ not in eos_ids}
    if (chosen := _never_in_a_text(tokenizer, usable)) is None:
        some = ", ".join(repr(t) for t in sorted(usable, key=lambda t: -usable[t])[:MAX_NAMED])
        raise UserError(
            f"policy.model {name!r} has no token to pad with: {why}, and none of its tokens is known never to be in a "
            f"text; {PAD_REMEDY}, such as {some or 'one that is added and trained'}"
        )
    return chosen, why


def _never_in_a_text(tokenizer: PreTrainedTokenizerBase, usable: dict[str, int]) -> str | None:
    """The first usable token that no training text has: named so, unknown to a tokenizer of bytes, or no UTF-8."""
    templates = chat_template_texts(tokenizer)
    framing = cast("list[int]", tokenizer("a")["input_ids"])
    marks = {getattr(tokenizer, f"{which}_token", None) for which in ("bos", "cls", "sep", "mask")}
    free = [
        token
        for token in sorted(usable, key=lambda t: usable[t])
        if token not in marks and usable[token] not in framing and not any(token in text for text in templates)
    ]
    pads = [token for token in free if PADDING.fullmatch(token)]
    seen = re.compile("vision|image|video|audio", re.IGNORECASE)
    named = [token for token in pads if not seen.search(token)]
    named += [token for token in free if RESERVED.fullmatch(token)]
    letters = byte_tokens(tokenizer)
    if letters is not None and tokenizer.unk_token in free:
        named.append(cast("str", tokenizer.unk_token))
    named += [letters[byte] for byte in NEVER_IN_UTF_8 if letters and letters.get(byte) in free]
    named += [token for token in pads if seen.search(token)]
    return named[0] if named else None
