"""Tiny tokenizers of every kind of decoder: what each does to the beginning of a string, to bytes and to marks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

SENTENCES = [
    f"{who} {verb} {how}"
    for who in ("The film", "This story", "Her first novel", "The long concert", "A quiet play")
    for verb in ("was", "felt", "began", "seemed")
    for how in ("slow and", "bright but", "not what")
][:40]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_MARKS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")


def byte_level(
    specials: Sequence[str] = ("<|endoftext|>", "<|pad|>"),
    *,
    size: int = 300,
    bos: str | None = None,
    frame: tuple[str, str] = ("", ""),
    **settings: Any,
) -> Any:
    """As GPT-2, Llama 3 and Qwen have it. ``frame``: special tokens that are written before and behind a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(SENTENCES, trainer)
    if any(frame):
        marks = [(name, made.token_to_id(name)) for name in set(frame) if name]
        made.post_processor = processors.TemplateProcessing(
            single=f"{frame[0]} $A {frame[1]}".strip(), special_tokens=marks
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        model_max_length=64,
        **({} if bos is None else {"bos_token": bos}),
        **settings,
    )


def sentencepiece(kind: str = "llama2", **settings: Any) -> Any:
    """``llama2`` (its decoder strips one space), ``metaspace`` (newer) or ``unigram`` (T5's)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    specials = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{i:02X}>" for i in range(256))]
    if kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=specials[:4], unk_token="<unk>", show_progress=False
        )
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    if kind == "llama2":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    elif kind == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    made.train_from_iterator(SENTENCES, trainer)
    tree = json.loads(made.to_str())
    tree["added_tokens"] = [t for t in tree["added_tokens"] if not t["content"].startswith("<0x")]  # bytes are no marks
    made = Tokenizer.from_str(json.dumps(tree))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **named, **settings)


def word_pieces(**settings: Any) -> Any:
    """BERT's: words joined by spaces, in small letters, within [CLS] and [SEP]."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=False)
    texts = [f"{sentence}, it wasn't good: question answer." for sentence in SENTENCES]
    made.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=200, special_tokens=specials, show_progress=False)
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    named = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, eos_token="[SEP]", **named, **settings)
