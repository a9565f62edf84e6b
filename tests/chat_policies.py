"""Tiny policies whose tokenizers add BOS or EOS, lose characters or have a chat template of some kind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config

EOS, PAD, BOS = "<|endoftext|>", "<|pad|>", "<|bos|>"
TEXTS = [
    f"{who} {what} {how}" for who in ("The film", "This story") for what in ("was", "felt") for how in ("slow", "not")
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CLOSED = CHATML.replace("{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "")
"""Never opens the assistant's turn."""
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""Writes the same with and without add_generation_prompt, rightly: an answer has no mark of its own."""
DIALOGPT = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
"""EOS is the mark between turns."""
ENDED = CHATML.replace("assistant\n{% endif %}", "assistant\n{{ eos_token }}{% endif %}")
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
SWITCH = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}",
)
DATED = "Today is {{ strftime_now('%d %b %Y') }}. " + CHATML


def chat_policy(
    where: Path, template: str | None = None, *, post: str = "", lossy: bool = False, unknown: str | None = None
) -> Path:
    """Write a LLaMA of 32 columns with its tokenizer.

    Args:
        where: new folder.
        template: Jinja.
        post: what the tokenizer adds to a text: "bos", "eos", "both" or nothing.
        lossy: no bytes, so that characters it has never seen become nothing.
        unknown: the token of words that a lossy tokenizer has never seen.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token=unknown) if lossy else models.BPE())
    made.pre_tokenizer = pre_tokenizers.Whitespace() if lossy else pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.BPEDecoder() if lossy else decoders.ByteLevel()
    special = [EOS, PAD, BOS, "<|im_start|>", "<|im_end|>", *([unknown] if unknown else [])]
    alphabet = [] if lossy else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([*TEXTS, "user assistant system"], trainer)
    if post:
        before, behind = (f"{BOS} " if post in ("bos", "both") else ""), (f" {EOS}" if post in ("eos", "both") else "")
        ids = [(token, made.token_to_id(token)) for token in (BOS, EOS)]
        made.post_processor = processors.TemplateProcessing(single=f"{before}$A{behind}", special_tokens=ids)
    names = {"unk_token": unknown} if unknown else {}
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=EOS, pad_token=PAD, bos_token=BOS, **names
    )
    tokenizer.chat_template = template
    sizes = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(sizes).save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


def chats(*contents: str, system: str | None = None) -> list[Any]:
    """One chat of a user's message each."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return [[*head, {"role": "user", "content": content}] for content in contents]


def config_for(model: Path, rows: Sequence[Any], overrides: Sequence[str] = (), /, **sections: Any) -> RunConfig:
    """The config of a run of one iteration over all of these prompts, in their order."""
    source = model.parent / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in rows))
    tree: dict[str, Any] = {
        "num_iterations": 1,
        "device": "cpu",
        "prompts": {"source": str(source), "batch_size": len(rows), "shuffle": False},
        "policy": {"model": str(model)},
        "reward": {"components": [{"kind": "function", "function": "length"}]},
        "generation": {"max_new_tokens": 6},
        "ppo": {"num_minibatches": 1},
        "tracking": {"enabled": False},
    }
    for name, knobs in sections.items():
        tree[name] = {**tree[name], **knobs}
    return build_config(tree, list(overrides))
