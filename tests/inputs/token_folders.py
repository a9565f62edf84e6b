"""Folders as people bring them: tiny byte-level tokenizers with special tokens of choice, random models of any rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from architectures import SMALL

TEXTS = [f"{who} {did}" for who in ("The film", "This story", "Her first novel") for did in ("was slow", "felt bright")]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA: dict[str, Any] = {**SMALL, "num_key_value_heads": 1, "head_dim": 16}
END, PAD = "<|endoftext|>", "<|pad|>"


def byte_tokenizer(
    specials: tuple[str, ...] = (END, PAD), *, eos: str = END, pad: str | None = PAD, size: int = 280, **settings: Any
) -> Any:
    """Byte-level BPE; ``specials`` have the first ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    named = {"eos_token": eos} | ({} if pad is None else {"pad_token": pad})
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **named, **settings)


def word_tokenizer(words: tuple[str, ...], *, eos: str = "</s>", pad: str | None = None) -> Any:
    """A tokenizer of whole words with an unknown token: no bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = list(dict.fromkeys(("<unk>", eos, *words, "a")))
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"eos_token": eos, "unk_token": "<unk>"} | ({} if pad is None else {"pad_token": pad})
    return PreTrainedTokenizerFast(tokenizer_object=made, **named)


def save_model(
    folder: Path,
    rows: int,
    tokenizer: Any = None,
    *,
    auto: str = "AutoModelForCausalLM",
    config: Any = None,
    **more: Any,
) -> Path:
    """A random model of so many rows (Llama where no config is given), with a tokenizer beside it."""
    import transformers

    made = transformers.LlamaConfig(**{**LLAMA, "vocab_size": rows, **more}) if config is None else config
    made.initializer_range = 0.3
    if tokenizer is not None:
        ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
        for name, id_ in ids.items():
            if name not in more:
                setattr(made, name, id_)
        tokenizer.save_pretrained(folder)
    if auto == "AutoModelForSequenceClassification":
        made.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(3)
        getattr(transformers, auto).from_config(made).save_pretrained(folder)
    return folder


def change_json(path: Path, **changes: Any) -> None:
    """Set or, with ..., remove entries of a JSON file; a new one begins empty."""
    values = json.loads(path.read_text()) if path.is_file() else {}
    values |= changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def run_tree(
    folder: Path, policy: Path, *components: dict[str, Any], prompts: list[Any] | None = None
) -> dict[str, Any]:
    """A config tree of one short run."""
    source = folder / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts or TEXTS))
    return {
        "seed": 7,
        "num_iterations": 1,
        "device": "cpu",
        "num_threads": 1,
        "prompts": {"source": str(source), "batch_size": 4},
        "policy": {"model": str(policy)},
        "reward": {"components": list(components) or [{"kind": "function", "function": "length"}]},
        "generation": {"max_new_tokens": 5},
        "ppo": {"num_ppo_epochs": 1, "num_minibatches": 1, "learning_rate": 1e-3, "embedding_lr_factor": 1.0},
        "tracking": {"enabled": False},
    }
