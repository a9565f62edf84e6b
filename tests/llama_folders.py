"""Folders with nothing but a config.json: models of 1, 7 and 70 billion parameters that nobody has downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, int]] = {
    "1B": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 8192, "vocab_size": 128_256},
    "7B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
           "intermediate_size": 11_008, "vocab_size": 32_000},
    "70B": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
            "intermediate_size": 28_672, "vocab_size": 128_256},
}  # fmt: skip
"""Llama 3.2 1B, Llama 2 7B, Llama 3 70B, but that the head is not tied."""
PARAMETERS = {"1B": 1_498_482_688, "7B": 6_738_415_616, "70B": 70_553_706_496}
"""2 V D + L (D (2 A + 2 K) + 3 D I + 2 D) + D, by hand; K the width of keys."""


def llama_folder(folder: Path, size: str, **changes: Any) -> Path:
    """A model folder without weights and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 8192}
    (folder / "config.json").write_text(
        json.dumps({**tree, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 1, **SIZES[size], **changes})
    )
    return folder


def llama_tree(folder: Path, size: str) -> dict[str, Any]:
    """A config whose models are such folders: 256 responses of 512 tokens in bfloat16."""
    model = str(llama_folder(folder / size, size))
    return {
        "prompts": {"source": "none.jsonl", "max_len": 512, "batch_size": 256},
        "policy": {"model": model, "dtype": "bfloat16"},
        "reward": {"components": [{"kind": "model", "model": model, "dtype": "bfloat16"}]},
        "generation": {"max_new_tokens": 512},
        "ppo": {"micro_batch_size": 4},
    }
