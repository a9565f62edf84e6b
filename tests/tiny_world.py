"""A world that is made in a second and never trained: for tests, and for the battery."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EOS, PAD = "<|endoftext|>", "<|pad|>"
CONTEXT = 64
SEED = 20240
SUBJECTS = ["The film", "This story", "Her first novel", "The long concert", "A quiet play"]
VERBS = ["was", "felt", "began", "seemed"]
ENDINGS = ["slow and", "bright but", "not what"]


@dataclass(frozen=True)
class Tiny:
    """A world that is made in a second and never trained: enough to run every stage.

    The models share one vocabulary. EOS has a probability of about a tenth a token, so that some responses end
    and some are cut; scores vary by about one from text to text.
    """

    root: Path
    policy: Path
    """GPT2LMHeadModel folder with its tokenizer: 2 layers of width 32, 64 positions, no dropout."""
    reward: Path
    """GPT2ForSequenceClassification folder with one label and the same tokenizer."""
    prompts: Path
    """40 different texts, JSONL {"prompt": ...}; each has fewer than 20 tokens."""


def tiny_in(root: Path) -> Tiny:
    """The tiny world of a folder."""
    return Tiny(root, root / "policy", root / "reward", root / "prompts.jsonl")


def make_tiny(root: Path) -> Tiny:
    """Write the tiny world into an empty folder."""
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    made = tiny_in(root)
    texts = [f"{subject} {verb} {ending}" for subject in SUBJECTS for verb in VERBS for ending in ENDINGS][:40]
    made.prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    tokenizer = make_tokenizer(texts)
    eos, pad = cast("int", tokenizer.eos_token_id), cast("int", tokenizer.pad_token_id)
    sizes = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.2,  # ten times the usual: an untrained model with opinions
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    sizes.num_labels = 1
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(SEED)
        policy, reward = GPT2LMHeadModel(sizes), GPT2ForSequenceClassification(sizes)
        policy.transformer.ln_f.bias.fill_(0.5)  # read by the projection: adds 0.5 x 32 x 0.25 = 4 to EOS's logit
        policy.transformer.wte.weight[eos] += 0.25
    for model, folder in ((policy, made.policy), (reward, made.reward)):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return made


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """A byte-level BPE of 300 tokens: it reads any text, and decodes to exactly that text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, bos_token=EOS, pad_token=PAD, model_max_length=CONTEXT
    )
