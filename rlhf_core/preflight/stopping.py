"""Checks of ``generation.stop`` against the policy's tokenizer."""

from __future__ import annotations

from rlhf_core.contracts.generation_config import GenerationConfig
from rlhf_core.models.texts import can_write, named_special_tokens
from rlhf_core.models.tokenizers import PolicyTokenizer


def check_stop(config: GenerationConfig, tokenizer: PolicyTokenizer, notes: list[str]) -> None:
    """Say so where a stop sequence is an EOS, or stands in no text of this tokenizer; ``notes`` may grow."""
    for text in config.stop:
        named = named_special_tokens(tokenizer.tokenizer, [text])
        if any(token_id in tokenizer.eos_ids for token_id, name in named.items() if name == text):
            notes.append(
                f"generation.stop has {text!r}, an EOS of policy.model, which ends a response without it, too (finish "
                "reason eos)"
            )
        elif any(token_id in tokenizer.eos_ids for token_id in named):
            notes.append(f"generation.stop has {text!r}, which holds an EOS of policy.model: a response ends before it")
        elif not can_write(tokenizer.tokenizer, text):
            notes.append(
                f"generation.stop has {text!r}, which the tokenizer of policy.model does not write as it is: no "
                "response is expected to contain it"
            )
