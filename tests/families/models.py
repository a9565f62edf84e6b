"""Tiny random models of every family that transformers opens as a language model or as a sequence classifier."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 64
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 1),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "d_inner", "n_inner", "hidden_dim"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "dim_ff"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), CONTEXT),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "kv_channels"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k"), 2),
    **dict.fromkeys(("sliding_window", "attention_window"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    "type_vocab_size": 2,
}
"""Names that configs of transformers have for the same few sizes, and what they are here."""

LATENT: dict[str, Any] = {"head_dim": 8, "qk_head_dim": 16, "num_key_value_heads": 2}
"""Of attention through a compressed key, whose rotary half has 8 dimensions."""
ALTERNATING: dict[str, Any] = {"num_hidden_layers": 4}
"""Of families whose every fourth layer is one of attention."""

SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "youtu"), LATENT),
    **dict.fromkeys(("minicpm3", "deepseek_v2"), LATENT),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"), ALTERNATING),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text", "kimi_linear", "lfm3", "lfm2_moe"), ALTERNATING),
    "diffllama": {"num_key_value_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 1, "head_dim": 16},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "codegen": {"num_attention_heads": 4, "rotary_dim": 4},
    "gemma4": {"vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8},
    "gemma4_text": {"vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16},
}
"""What a family needs beside them."""


def tiny_config(kind: str, tokenizer: PreTrainedTokenizerBase, *, num_labels: int | None = None) -> Any:
    """The config of a family, made small.

    Args:
        kind: its ``model_type``; of a model with images, its text half is taken.
        tokenizer: gives the size of the vocabulary and the special ids.
        num_labels: of a classifier.
    Raises: whatever the family's own config raises.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[kind]
    default = config_class()
    text = default.get_text_config()
    if text is not default:
        config_class, default = type(text), text
    known = default.to_dict()
    values = {name: size for name, size in SIZES.items() if known.get(name) is not None}
    if "sliding_window" in known:
        values["sliding_window"] = SIZES["sliding_window"]
    values |= {"vocab_size": len(tokenizer)} | SPECIAL.get(kind, {})
    values |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if num_labels is not None:
        values["num_labels"] = num_labels
    return config_class(**values)


def save_tiny(config: Any, auto_class: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Random weights of the usual spread, ten times as wide, so that an untrained model has opinions."""
    import transformers

    if getattr(config, "initializer_range", None) is not None:
        config.initializer_range = 0.2
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = getattr(transformers, auto_class).from_config(config)
    if sum(p.numel() for p in model.parameters()) > 30e6:
        raise ValueError("it could not be made small")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def families(auto_class: str) -> list[str]:
    """Every ``model_type`` that transformers opens with an auto class."""
    from transformers.models.auto import modeling_auto as auto

    names = {
        "AutoModelForCausalLM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForSequenceClassification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
    return sorted(names[auto_class])
