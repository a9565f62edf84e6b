"""Tokenizers: loading, the tokens that end and pad, and whether two of them share a vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from rlhf_core.contracts.config_io import digest_json
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.texts import decoded
from rlhf_core.models.untrusted import check_is_data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PolicyTokenizer:
    """The policy's tokenizer, with the ids that the pipeline needs checked."""

    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    """Tokens that end a response: the tokenizer's EOS and those of the model's generation config."""
    pad_id: int
    """Fills tensors only; never an EOS, never sampled on purpose, never stored."""

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

    check_is_data(name, field)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
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
    return tokenizer


def load_policy_tokenizer(name: str, pad_token: str | None) -> PolicyTokenizer:
    """Load the policy's tokenizer and settle EOS and PAD.

    Args:
        name: folder or hub id.
        pad_token: ``policy.pad_token``, for tokenizers without a PAD of their own.
    Raises:
        UserError: no tokenizer, no EOS, no PAD, or PAD = EOS.
    """
    tokenizer = load_tokenizer(name, field="policy.model")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"policy.model {name!r} has a tokenizer without an EOS token, so no response could end; "
            "set eos_token in its tokenizer_config.json"
        )
    eos_ids = {int(cast("int", tokenizer.eos_token_id)), *_generation_eos_ids(name)}
    pad_id = _pad_id(tokenizer, name, pad_token, eos_ids)
    return PolicyTokenizer(tokenizer, frozenset(eos_ids), pad_id)


class VocabularyDigest(str):
    """Identity of a vocabulary, which knows the tokenizer that it was made of."""

    tokenizer: PreTrainedTokenizerBase


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> VocabularyDigest:
    """Identity of a vocabulary: equal digests mean that token ids mean the same to both models."""
    digest = VocabularyDigest(digest_json(cast("dict[str, int]", tokenizer.get_vocab())))
    digest.tokenizer = tokenizer
    return digest


def _pad_id(tokenizer: PreTrainedTokenizerBase, name: str, pad_token: str | None, eos_ids: set[int]) -> int:
    token = pad_token if pad_token is not None else cast("str | None", tokenizer.pad_token)
    remedy = "set policy.pad_token to a token of its vocabulary that is not EOS (it is never trained on or stored)"
    if token is None:
        raise UserError(f"policy.model {name!r} has a tokenizer without a PAD token; {remedy}")
    vocabulary = cast("dict[str, int]", tokenizer.get_vocab())
    if token not in vocabulary:
        raise UserError(f"policy.pad_token {token!r} is not in the vocabulary of policy.model {name!r}; {remedy}")
    if vocabulary[token] in eos_ids:
        raise UserError(f"policy.model {name!r} pads with {token!r}, which is also its EOS token; {remedy}")
    return vocabulary[token]


def _generation_eos_ids(name: str) -> set[int]:
    """EOS ids of generation_config.json: chat models often list several."""
    from transformers import GenerationConfig

    try:
        eos: Any = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:  # the file is optional
        return set()
    except Exception as error:
        raise UserError(f"policy.model {name!r} has a generation_config.json that does not load: {error}") from None
    ids: list[Any] = cast("list[Any]", eos) if isinstance(eos, list) else [] if eos is None else [eos]
    if wrong := [token for token in ids if type(token) is not int]:
        raise UserError(
            f"policy.model {name!r} has the eos_token_id {str(wrong[0])[:40]!r} in its generation_config.json, "
            "which is no token id; set it to the number of the token that ends a text"
        )
    return set(ids)
