"""Checks of token ids against embedding rows: of the policy, the reference and the reward models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.model_files import generation_config_of
from rlhf_core.models.tokenizers import PolicyTokenizer, has_tokenizer, load_tokenizer, tokenizer_differences
from rlhf_core.models.vocabulary import DrawableTokens, tokens_without_row, vocabulary
from rlhf_core.prompts.sources import PromptSet

MAX_NAMED = 3
SAMPLING = (
    *("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "num_beams"),
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "penalty_alpha", "length_penalty"),
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "forced_bos_token_id"),
    *("forced_eos_token_id", "stop_strings", "max_length", "max_new_tokens", "min_length", "min_new_tokens"),
)
"""Settings of a generation_config.json that decide what is sampled."""


def rows_of(model_config: Any) -> int:
    """Rows of a model's embedding, as its config says."""
    return int(model_config.get_text_config().vocab_size)


def check_policy_rows(config: RunConfig, policy: Any, tokenizer: PolicyTokenizer, notes: list[str]) -> DrawableTokens:
    """Refuse a policy without rows for its tokens.

    Returns: the ids that it can draw.
    Raises: UserError naming the tokens, and the rows that there are.
    """
    rows, own = rows_of(policy), tokenizer.tokenizer
    _check_tokens(own, rows, f"policy.model {config.policy.model!r}", notes)
    tokens = DrawableTokens.of(own, rows)
    outside = rows - tokens.num_tokens + len(tokens.holes)
    if outside:
        notes.append(
            f"policy.model has {rows} rows and its tokenizer {rows - outside} tokens with a row: {outside} ids that no "
            "token has are never drawn, and have no part in log-probs, entropies and KL"
        )
    if tokens.holes and config.generation.engine != "own":
        raise UserError(
            f"generation.engine is {config.generation.engine}, which could draw the {len(tokens.holes)} ids below "
            f"{tokens.num_tokens} that no token of policy.model has (the first is {tokens.holes[0]}); use "
            "generation.engine own"
        )
    return tokens


def check_reference_rows(
    config: RunConfig, reference: Any, tokenizer: PolicyTokenizer, tokens: DrawableTokens, notes: list[str]
) -> None:
    """Refuse a reference without a row for each id that the policy can draw, or to which an id is another token.

    The reference reads the policy's tokens: whatever else its own tokenizer has is not used, and noted.

    Raises: UserError.
    """
    named = f"reference.model {config.reference.model!r}"
    if config.reference.model is not None and rows_of(reference) < tokens.num_tokens:
        raise UserError(
            f"{named} has a vocabulary of {rows_of(reference)}, policy.model of {tokens.num_tokens}; "
            "KL needs one vocabulary: take the model that the policy started from"
        )
    folders = {"reference.model": config.reference.model, "reference.adapter": config.reference.adapter}
    for field, name in folders.items():
        if name is None or name in (config.policy.model, config.policy.adapter) or not has_tokenizer(name):
            continue
        own = load_tokenizer(name, field=field)
        _check_same_ids(own, tokenizer, f"{field} {name!r}")
        if other := tokenizer_differences(own, tokenizer.tokenizer):
            notes.append(
                f"{field} has another {', '.join(other)} than the policy: it reads the policy's tokens, and its own "
                "tokenizer is not used"
            )


def _check_same_ids(own: Any, tokenizer: PolicyTokenizer, named: str) -> None:
    ours, theirs = vocabulary(tokenizer.tokenizer), vocabulary(own)
    names = {id_: token for token, id_ in theirs.items()}
    for token, id_ in ours.items():
        if theirs.get(token, id_) != id_ or (token not in theirs and id_ in names):
            means = repr(names[id_]) if id_ in names else "no token"
            raise UserError(
                f"{named} has a tokenizer to which {id_} is {means}, and to the policy's it is {token!r}; KL needs one "
                "vocabulary: take the model that the policy started from"
            )


def check_reward_rows(
    config: RunConfig, index: int, model: Any, own: Any, *, reads: DrawableTokens | None, notes: list[str]
) -> None:
    """Refuse a reward model without rows for its tokenizer's tokens.

    Args:
        config: of the run.
        index: of the component.
        model: its transformers config.
        own: its tokenizer.
        reads: the ids that the policy can draw, where the reward model reads them as they are.
        notes: of the plan.
    Raises: UserError naming the tokens, and the rows that there are.
    """
    component: Any = config.reward.components[index]
    field = f"reward.components.{index}"
    rows = rows_of(model)
    where = "model" if component.tokenizer is None else "tokenizer"
    _check_tokens(own, rows, f"{field}.{where} {getattr(component, where)!r}", notes)
    if reads is not None and reads.num_tokens > rows:
        last = own.convert_ids_to_tokens(reads.num_tokens - 1)
        raise UserError(
            f"{field}.model {component.model!r} has an embedding of {rows} rows, and the policy can draw {last!r}, "
            f"token {reads.num_tokens - 1}, which it reads as it is; resize its embedding with "
            f"model.resize_token_embeddings({reads.num_tokens})"
        )


def _check_tokens(own: Any, rows: int, named: str, notes: list[str]) -> None:
    spelled, silent = tokens_without_row(own, rows)
    if spelled:
        raise UserError(
            f"{named} has a tokenizer with {len(vocabulary(own))} tokens, and the model {rows} rows in its embedding: "
            f"{_listed(spelled)} can be in a text and have none; take the tokenizer that the model was trained with, "
            "or resize the embedding with model.resize_token_embeddings and train the new rows"
        )
    if silent:
        notes.append(f"{_listed(silent)} of {named} have no row in its embedding of {rows}: no text may spell them")


def _listed(tokens: Mapping[str, int]) -> str:
    shown = ", ".join(f"{token!r} ({id_})" for token, id_ in list(tokens.items())[:MAX_NAMED])
    return shown + (f" and {len(tokens) - MAX_NAMED} more" if len(tokens) > MAX_NAMED else "")


def check_spelled(prompts: PromptSet, tokenizer: PolicyTokenizer, rows: int) -> None:
    """Refuse prompts that spell a special token without a row. Raises UserError naming the first."""
    _, silent = tokens_without_row(tokenizer.tokenizer, rows)
    for row, entry in enumerate(prompts.entries) if silent else ():
        text = entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False)
        if found := [token for token in silent if token in text]:
            raise UserError(
                f"prompt {row} (from 0) has {found[0]!r} in its text, token {silent[found[0]]} of the policy's "
                f"tokenizer, and policy.model has {rows} rows in its embedding; take that text out, or resize the "
                "embedding and train the new row"
            )


def sampling_note(name: str) -> str | None:
    """A sentence on the sampling that a policy's generation_config.json asks for; None where it asks for none."""
    try:
        found = generation_config_of(name)
    except Exception:  # told where EOS is read
        return None
    asked = {} if found is None else cast("dict[str, Any]", found.to_diff_dict())
    settings = {key: asked[key] for key in SAMPLING if asked.get(key) is not None}
    if not settings:
        return None
    listed = ", ".join(f"{key} {json.dumps(value, default=str)[:40]}" for key, value in settings.items())
    return f"generation_config.json of policy.model is not used in sampling ({listed}); the generation section is"
