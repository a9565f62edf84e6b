"""A reward model on the spot: a linear head on the frozen trunk of a chat model, fitted to preference pairs.

    P(chosen > rejected) = σ(w · (h(chosen) - h(rejected)))        Bradley & Terry 1952

h is the trunk's output at the last token of the conversation. The pairs are of two kinds: a sentence that a critic
wrote in praise and one written in blame, both taken for answers to the same request; and a whole sentence and the same
one cut short, without which a policy is rewarded for never ending one. Only w is fitted, so that a minute is enough.
The penalty of |w|² is chosen by cross-validation within the fitted pairs; accuracies are measured on pairs apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_core.chatworld.requests import ABOUT_FILMS, chat
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.hub import folder_of
from rlhf_core.models.packing import PackedRows
from rlhf_core.models.quiet import quiet_transformers
from rlhf_core.models.trunk import Trunk, trunk_of

LIKED, DISLIKED = "*.pos", "*.neg"
"""Files of a folder of reviews, a sentence a line."""
NUM_PAIRS: Final = 600
"""Pairs that the head is fitted to."""
NUM_HELD_OUT: Final = 150
"""Pairs that its accuracy is measured on."""
ROWS_AT_ONCE: Final = 32
PENALTIES: Final = (1e-4, 1e-3, 1e-2, 1e-1)
"""Candidates for the weight of |w|²."""
NUM_FOLDS: Final = 5
"""Parts of the fitted pairs, each left out once to compare the penalties."""
MOST_WORDS: Final = 30
UNREADABLE: Final = "\N{REPLACEMENT CHARACTER}"
"""A line that holds it is left out."""
_BEFORE_MARK: Final = re.compile(r"\s+([.,;:!?%)\]]|'(?:s|re|ve|ll|d|m|t)\b|n't\b)")
_AFTER_MARK: Final = re.compile(r"([(\[])\s+")


@dataclass(frozen=True)
class Taste:
    """How good the reward model is."""

    pair_accuracy: float
    """Share of held-out pairs whose chosen sentence scores higher."""
    whole_accuracy: float
    """Share of held-out sentences that score higher whole than cut short."""
    num_pairs: int
    """Pairs that the head was fitted to, of praise and blame."""
    num_held_out: int
    """Pairs that the accuracy was measured on; they chose neither the weights nor the penalty."""


def review_file(reviews: Path, pattern: str) -> Path:
    """Return the one file of a kind in a folder of reviews.

    Raises: UserError if the folder has no such file, or several.
    """
    files = sorted(reviews.glob(pattern)) if reviews.is_dir() else []
    if not files:
        raise UserError(
            f"--reviews {reviews} has no file {pattern}; it wants a folder with two: sentences of praise in one "
            "that ends in .pos, of blame in one that ends in .neg, a sentence a line (for instance Cornell's "
            "sentence polarity data set, rt-polaritydata)"
        )
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"--reviews {reviews} has {len(files)} files {pattern} ({names}); leave one of each kind there")
    return files[0]


def sentences(reviews: Path, count: int = NUM_PAIRS + NUM_HELD_OUT, seed: int = 0) -> tuple[list[str], list[str]]:
    """Return (liked, disliked): so many sentences each, written as people write.

    Args:
        reviews: folder with a file of each kind, such as rt-polarity.pos and rt-polarity.neg, in UTF-8 or, as that data
            set is, in Windows-1252.
        count: of each.
        seed: of their choice.
    Raises: UserError if there are no such files, or fewer sentences.
    """
    found: list[list[str]] = []
    for file in [review_file(reviews, pattern) for pattern in (LIKED, DISLIKED)]:
        lines = _decoded(file.read_bytes()).split("\n")
        fit = sorted({_as_written(line) for line in lines if 4 <= len(line.split()) <= MOST_WORDS})
        fit = [line for line in fit if UNREADABLE not in line]
        if len(fit) < count:
            raise UserError(f"--reviews {file} has {len(fit)} sentences of 4 to {MOST_WORDS} words; {count} are needed")
        found.append(Random(seed).sample(fit, count))
    return found[0], found[1]


def write_taste(
    policy: Path,
    out: Path,
    reviews: Path,
    on_step: Callable[[int, int], None],
    *,
    pairs: int = NUM_PAIRS,
    held_out: int = NUM_HELD_OUT,
) -> Taste:
    """Write a reward model with the policy's trunk and tokenizer.

    Args:
        policy: folder of the chat model.
        out: a folder that is there, and empty.
        reviews: see :func:`sentences`.
        on_step: called with (sentences read, of all).
        pairs: to fit to.
        held_out: to measure the accuracy on.
    """
    import transformers

    quiet_transformers()
    liked, disliked = sentences(reviews, pairs + held_out)
    folder = folder_of(str(policy), "policy.model", with_weights=True)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    with torch.random.fork_rng(devices=[]):
        model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=torch.float32, trust_remote_code=False
        )
    model.config.pad_token_id = tokenizer.unk_token_id if tokenizer.unk_token_id is not None else tokenizer.pad_token_id
    model.requires_grad_(False).eval()
    ends, cuts = _states(model, tokenizer, [*liked, *disliked], on_step)
    # [N, 3, D]: of the n-th sentences, praise against blame, and each whole against cut short
    count = len(liked)
    differences = torch.stack([ends[:count] - ends[count:], *(ends - cuts).split(count)], dim=1).double()
    scale = differences[:pairs, 0].std(dim=0).clamp(min=1e-6)
    trained, tested = differences[:pairs] / scale, differences[pairs:] / scale
    best = _fit(trained, _best_penalty(trained))
    weight = best / scale
    weight /= (ends[:pairs].double() @ weight).std().clamp(min=1e-6)  # scores of about unit variance
    model.score.weight.copy_(weight.float()[None])
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    is_right = (tested @ best > 0).double()
    return Taste(float(is_right[:, 0].mean()), float(is_right[:, 1:].mean()), pairs, held_out)


@torch.no_grad()
def _states(
    model: Any, tokenizer: Any, answers: list[str], on_step: Callable[[int, int], None], seed: int = 0
) -> tuple[Tensor, Tensor]:
    """[N, D] twice: the trunk's output at the last token of each answered request, and where the answer is cut short.

    An answer is cut at a random place before its EOS. The trunk looks back alone, so one pass gives both.
    """
    # as the reward stage reads a response of the policy: its request, its tokens, and the EOS that ends it
    trunk = Trunk(trunk_of(model), dtype=torch.float32)
    asked = tokenizer.apply_chat_template(chat(ABOUT_FILMS), add_generation_prompt=True, return_dict=True)["input_ids"]
    said = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers]
    rows = [[*asked, *tokens, tokenizer.eos_token_id] for tokens in said]
    draw = Random(seed)
    kept = torch.tensor([draw.randrange(max(len(tokens) - 1, 1)) for tokens in said])  # the last token that is left
    ends, cuts = (torch.zeros(len(rows), int(model.config.hidden_size)) for _ in range(2))
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    for start in range(0, len(order), ROWS_AT_ONCE):
        index = order[start : start + ROWS_AT_ONCE]
        packed = PackedRows.of([rows[row] for row in index])
        states = trunk(packed, torch.cat([packed.ends_B, packed.starts_B + len(asked) + kept[index]]))
        ends[index], cuts[index] = states.split(len(index))
        on_step(start + len(index), len(rows))
    return ends, cuts


def _best_penalty(differences: Tensor) -> float:
    """Penalty under which pairs [N, K, D] that were left out are likeliest, all K of a row together."""
    fold = torch.arange(len(differences)) % NUM_FOLDS

    def likelihood(penalty: float) -> float:
        fitted = [_fit(differences[fold != left_out], penalty) for left_out in range(NUM_FOLDS)]
        return sum(float(logsigmoid(differences[fold == k] @ w).sum()) for k, w in enumerate(fitted))

    return max(sorted(PENALTIES, reverse=True), key=likelihood)


def _fit(differences: Tensor, penalty: float) -> Tensor:
    """[D] float64: the weights that explain the pairs [N, K, D] best."""
    with torch.enable_grad():
        w = torch.zeros(differences.shape[-1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = -logsigmoid(differences @ w).mean() + penalty * w.square().sum() / 2
            value.backward()
            return value

        optimizer.step(loss)
    return w.detach()


def _decoded(content: bytes) -> str:
    """A text in UTF-8, or else in Windows-1252; a byte that has no meaning there becomes U+FFFD."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def _as_written(line: str) -> str:
    """A sentence of a corpus, whose marks stand apart, as a person writes it."""
    text = _AFTER_MARK.sub(r"\1", _BEFORE_MARK.sub(r"\1", " ".join(line.split())))
    return text[:1].upper() + text[1:]
