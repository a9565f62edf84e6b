"""Tokenizers: loading, the tokens that end and pad, and whether two of them share a vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from rlhf_core.contracts.config_io import digest_json
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.ending import EndIds, end_ids
from rlhf_core.models.ending import pad_token as choose_pad
from rlhf_core.models.hub import folder_of
from rlhf_core.models.model_files import config_of, first_file
from rlhf_core.models.texts import decoded
from rlhf_core.models.untrusted import check_is_data
from rlhf_core.models.vocabulary import DrawableTokens, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""One of them holds a vocabulary."""
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
MARKS = ("bos", "eos", "pad", "unk")


@dataclass(frozen=True)
class PolicyTokenizer:
    """The policy's tokenizer, with the ids that the pipeline needs checked."""

    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    """Tokens that end a response: the tokenizer's EOS and those that ``generate`` of transformers would stop at."""
    pad_id: int
    """Fills tensors only; never an EOS, never sampled on purpose, never stored."""
    notes: tuple[str, ...] = ()
    """What was chosen, for the plan."""

    def encode(self, text: str, *, is_chat: bool) -> list[int]:
        """Token ids of a prompt. A chat template writes its own special tokens, so none are added to a chat."""
        ids = self.tokenizer(text, add_special_tokens=not is_chat)["input_ids"]
        return cast("list[int]", ids)

    def decode(self, token_ids: list[int]) -> str:
        """Text of tokens that stand alone, special ones left out; of a response: :mod:`rlhf_core.models.texts`."""
        return decoded(self.tokenizer, token_ids)


def load_tokenizer(name: str, *, field: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder or hub id. Raises UserError naming ``field``."""
    from transformers import AutoTokenizer

    folder = folder_of(name, field)
    check_is_data(name, field, folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{field} {name!r} has no tokenizer that loads: {reason}") from None
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # transformers makes up one without a vocabulary
        raise UserError(
            f"{field} {name!r} has no tokenizer that reads text; save one beside the model (tokenizer.json)"
        )
    for how in (
        "local_files_only",
        "is_local",
    ):  # it was found: no part of it, or HF_HUB_OFFLINE would be in checkpoints
        tokenizer.init_kwargs.pop(how, None)
    tokenizer.name_or_path = name
    return tokenizer


def load_policy_tokenizer(name: str, pad_token: str | None, *, adapter: str | None = None) -> PolicyTokenizer:
    """Load the policy's tokenizer and settle EOS and PAD.

    A folder of an adapter often has the tokenizer that its SFT used, chat template included: then that is the policy's.

    Args:
        name: folder or hub id of ``policy.model``.
        pad_token: ``policy.pad_token``; null: the tokenizer's PAD, or a token that no text has.
        adapter: ``policy.adapter``.
    Raises:
        UserError: no tokenizer, no EOS, an EOS or PAD that cannot be, or no token to pad with.
    """
    tokenizer, named = load_tokenizer_of(name, adapter)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{named} has a tokenizer without an EOS token, so no response could end; "
            "set eos_token in its tokenizer_config.json"
        )
    rows = embedding_rows(name)
    ends = end_ids(name, rows)
    own_eos = int(cast("int", tokenizer.eos_token_id))
    if rows is not None and own_eos >= rows:
        raise UserError(
            f"{named} has the EOS token {tokenizer.eos_token!r}, which is token {own_eos}, and the embedding of "
            f"policy.model has {rows} rows; take the tokenizer that the model was trained with"
        )
    eos_ids = ends.ids | {own_eos}
    pad, why = choose_pad(tokenizer, name, pad_token, eos_ids, rows)
    pad_id = vocabulary(tokenizer)[pad]
    notes = [_ends_note(tokenizer, eos_ids, ends, own_eos)] if eos_ids != {own_eos} else []
    if why:
        notes.append(f"masked cells are filled with {pad!r} ({pad_id}), which no text has: {why}")
    if adapter is not None and named.startswith("policy.adapter"):
        notes += _adapter_notes(tokenizer, name)
    return PolicyTokenizer(tokenizer, eos_ids, pad_id, tuple(notes))


def load_tokenizer_of(name: str, adapter: str | None = None) -> tuple[PreTrainedTokenizerBase, str]:
    """(the policy's tokenizer, field and value that it comes from): the adapter's where its folder has one.

    Raises: UserError if it does not load.
    """
    if adapter is not None and has_tokenizer(adapter):
        return load_tokenizer(adapter, field="policy.adapter"), f"policy.adapter {adapter!r}"
    if adapter is not None and (file := first_file(adapter, TEMPLATE_FILES)) is not None:
        raise UserError(
            f"policy.adapter {adapter!r} has a {file}, but no tokenizer that it belongs to; save the tokenizer of its "
            "training there, or remove that file: the tokenizer of policy.model is used then"
        )
    return load_tokenizer(name, field="policy.model"), f"policy.model {name!r}"


def has_tokenizer(name: str) -> bool:
    """Whether a folder or hub id has a tokenizer of its own."""
    return first_file(name, TOKENIZER_FILES) is not None


def embedding_rows(name: str) -> int | None:
    """Rows of a model's embedding as its config.json says; None where there is none that loads."""
    config = config_of(name)
    rows = None if config is None else getattr(config.get_text_config(), "vocab_size", None)
    return int(rows) if isinstance(rows, int) else None


def drawable_tokens(name: str, adapter: str | None = None) -> DrawableTokens:
    """The ids that a policy can draw: the tokens of its tokenizer that have a row.

    Args:
        name: folder or hub id of ``policy.model``.
        adapter: ``policy.adapter``.
    Raises: UserError if there is no tokenizer or no embedding.
    """
    tokenizer, named = load_tokenizer_of(name, adapter)
    if (rows := embedding_rows(name)) is None:
        raise UserError(f"{named} does not tell the size of its vocabulary; set vocab_size in its config.json")
    return DrawableTokens.of(tokenizer, rows)


class VocabularyDigest(str):
    """Identity of a vocabulary, which knows the tokenizer that it was made of."""

    tokenizer: PreTrainedTokenizerBase


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> VocabularyDigest:
    """Identity of a vocabulary: equal digests mean that token ids mean the same to both models."""
    digest = VocabularyDigest(digest_json(cast("dict[str, int]", tokenizer.get_vocab())))
    digest.tokenizer = tokenizer
    return digest


def _ends_note(tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int], ends: EndIds, own: int) -> str:
    listed = token_names(tokenizer, eos_ids)
    sources = [source for source, ids in ((ends.source, ends.ids), ("the tokenizer", {own})) if ids]
    return f"a response ends at {listed}, as {' and '.join(sources)} of the policy say{'s' * (len(sources) == 1)}"


def token_names(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    """Tokens for a person, as ``'<|im_end|>' (2) or '<|endoftext|>' (0)``."""
    names = {token: cast("str | None", tokenizer.convert_ids_to_tokens(token)) for token in sorted(ids)}
    return " or ".join(f"{id_}, which no token has" if t is None else f"{t!r} ({id_})" for id_, t in names.items())


def _adapter_notes(tokenizer: PreTrainedTokenizerBase, base: str) -> list[str]:
    """How an adapter's tokenizer differs from its base's; empty where it does not, or the base has none."""
    if not has_tokenizer(base):
        return []
    theirs = load_tokenizer(base, field="policy.model")
    parts = tokenizer_differences(tokenizer, theirs)
    return [f"the tokenizer is that of policy.adapter, not of policy.model: other {', '.join(parts)}"] if parts else []


def tokenizer_differences(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> list[str]:
    """What two tokenizers do not have in common: vocabulary, chat template, special tokens."""
    pairs = {
        "vocabulary": (vocabulary(one), vocabulary(other)),
        "chat template": (one.chat_template, other.chat_template),
        **{f"{name} token": (getattr(one, f"{name}_token"), getattr(other, f"{name}_token")) for name in MARKS},
    }
    return [name for name, (ours, theirs) in pairs.items() if ours != theirs]
