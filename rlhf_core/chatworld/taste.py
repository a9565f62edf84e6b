"""A reward model on the spot: a linear head on the frozen trunk of a chat model, fitted to preference pairs.

    P(chosen > rejected) = σ(w · (h(chosen) - h(rejected)))        Bradley & Terry 1952

h is the trunk's output at the last token of the conversation. A pair is a sentence that a critic wrote in praise and
one written in blame, both taken for answers to the same request. Only w is fitted, so that a minute is enough.
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
ROWS_AT_ONCE: Final = 32
PENALTIES: Final = (1e-4, 1e-3, 1e-2, 1e-1)
"""Of |w|², of which the best on held-out pairs is taken."""
MOST_WORDS: Final = 30
_BEFORE_MARK: Final = re.compile(r"\s+([.,;:!?%)\]]|'(?:s|re|ve|ll|d|m|t)\b|n't\b)")
_AFTER_MARK: Final = re.compile(r"([(\[])\s+")


@dataclass(frozen=True)
class Taste:
    """How good the reward model is."""

    pair_accuracy: float
    """Share of held-out pairs whose chosen sentence scores higher."""
    num_pairs: int
    """Fitted to."""


def sentences(reviews: Path, count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Return (liked, disliked): so many sentences each, written as people write.

    Args:
        reviews: folder with a file of each kind, such as rt-polarity.pos and rt-polarity.neg.
        count: of each.
        seed: of their choice.
    Raises: UserError if there are no such files, or fewer sentences.
    """
    found: list[list[str]] = []
    for pattern in (LIKED, DISLIKED):
        files = sorted(reviews.glob(pattern)) if reviews.is_dir() else []
        if not files:
            raise UserError(
                f"--reviews {reviews} has no file {pattern}; it wants a folder with two: sentences of praise in one "
                "that ends in .pos, of blame in one that ends in .neg, a sentence a line (for instance Cornell's "
                "sentence polarity data set, rt-polaritydata)"
            )
        lines = files[0].read_text(encoding="utf-8", errors="replace").splitlines()
        fit = sorted({_as_written(line) for line in lines if 4 <= len(line.split()) <= MOST_WORDS})
        if len(fit) < count:
            raise UserError(
                f"--reviews {files[0]} has {len(fit)} sentences of 4 to {MOST_WORDS} words; {count} are needed"
            )
        found.append(Random(seed).sample(fit, count))
    return found[0], found[1]


def write_taste(
    policy: Path,
    out: Path,
    reviews: Path,
    on_step: Callable[[int, int], None],
    *,
    pairs: int = 600,
    held_out: int = 150,
) -> Taste:
    """Write a reward model with the policy's trunk and tokenizer.

    Args:
        policy: folder of the chat model.
        out: a folder that is there, and empty.
        reviews: see :func:`sentences`.
        on_step: called with (sentences read, of all).
        pairs: to fit to.
        held_out: to choose the penalty by, and to tell the accuracy on.
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
    states = _states(model, tokenizer, [*liked, *disliked], on_step)
    differences = (states[: len(liked)] - states[len(liked) :]).double()
    scale = differences[:pairs].std(dim=0).clamp(min=1e-6)
    trained, tested = differences[:pairs] / scale, differences[pairs:] / scale
    fitted = [_fit(trained, penalty) for penalty in PENALTIES]
    best = max(fitted, key=lambda w: float(logsigmoid(tested @ w).mean()))
    weight = best / scale
    weight /= (states[: len(liked)].double() @ weight).std().clamp(min=1e-6)  # scores of about unit variance
    model.score.weight.copy_(weight.float()[None])
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return Taste(float((tested @ best > 0).double().mean()), pairs)


@torch.no_grad()
def _states(model: Any, tokenizer: Any, answers: list[str], on_step: Callable[[int, int], None]) -> Tensor:
    """[N, D]: the trunk's output at the last token of each answered request."""
    # as the reward stage reads a response of the policy: its request, its tokens, and the EOS that ends it
    trunk = Trunk(trunk_of(model), dtype=torch.float32)
    asked = tokenizer.apply_chat_template(chat(ABOUT_FILMS), add_generation_prompt=True, return_dict=True)["input_ids"]
    rows = [
        [*asked, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in answers
    ]
    states = torch.zeros(len(rows), int(model.config.hidden_size))
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    for start in range(0, len(order), ROWS_AT_ONCE):
        index = order[start : start + ROWS_AT_ONCE]
        packed = PackedRows.of([rows[row] for row in index])
        states[index] = trunk(packed, packed.ends_B)
        on_step(start + len(index), len(rows))
    return states


def _fit(differences: Tensor, penalty: float) -> Tensor:
    """[D] float64: the weights that explain the pairs best."""
    with torch.enable_grad():
        w = torch.zeros(differences.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = -logsigmoid(differences @ w).mean() + penalty * w.square().sum() / 2
            value.backward()
            return value

        optimizer.step(loss)
    return w.detach()


def _as_written(line: str) -> str:
    """A sentence of a corpus, whose marks stand apart, as a person writes it."""
    text = _AFTER_MARK.sub(r"\1", _BEFORE_MARK.sub(r"\1", " ".join(line.split())))
    return text[:1].upper() + text[1:]
