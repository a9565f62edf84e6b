"""Tiny random models of the families that people train: policies, and reward models of decoders and encoders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def decoders(vocab_size: int) -> dict[str, Any]:
    """Their configs, special scalings of logits and windows shorter than a sequence among them."""
    import transformers as t

    small: dict[str, Any] = {**SMALL, "vocab_size": vocab_size}
    grouped: dict[str, Any] = {**small, "num_key_value_heads": 1, "head_dim": 16}
    dropout: dict[str, Any] = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
    return {
        "gpt2": t.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=vocab_size, **dropout),
        "llama": t.LlamaConfig(**grouped),
        "qwen3": t.Qwen3Config(**grouped, tie_word_embeddings=True),
        "mistral": t.MistralConfig(**grouped, sliding_window=8),
        "gemma": t.GemmaConfig(**grouped),
        "gemma2": t.Gemma2Config(**grouped, final_logit_softcapping=3.0, sliding_window=8),
        "gemma3": t.Gemma3TextConfig(**grouped, sliding_window=8),
        "gpt_neox": t.GPTNeoXConfig(**small, hidden_dropout=0.3, attention_dropout=0.3),
    }


def encoders(vocab_size: int) -> dict[str, Any]:
    """Configs of encoders, which see a whole text at once."""
    import transformers as t

    small: dict[str, Any] = {**SMALL, "vocab_size": vocab_size, "num_labels": 1}
    return {
        "bert": t.BertConfig(**small),
        "distilbert": t.DistilBertConfig(
            dim=32,
            n_layers=2,
            n_heads=2,
            hidden_dim=64,
            vocab_size=vocab_size,
            max_position_embeddings=64,
            num_labels=1,  # pyright: ignore[reportCallIssue]
        ),
        "modernbert": t.ModernBertConfig(**small, local_attention=8),
        "roberta": t.RobertaConfig(**small, pad_token_id=1),
    }


def save_random(
    config: Any, auto_class: str, folder: Path, tokenizer: PreTrainedTokenizerBase, *, spread: float = 0.2
) -> Path:
    """A model with opinions (weights ten times as wide as usual), its tokenizer beside it."""
    import transformers

    config.initializer_range = spread
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        getattr(transformers, auto_class).from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
