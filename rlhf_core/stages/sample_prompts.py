"""Stage 1: which prompts this iteration answers."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import torch

from rlhf_core.contracts.batches import Prompts, StageResult
from rlhf_core.contracts.config import PromptsConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.loop_state import Cursor
from rlhf_core.models.tokenizers import PolicyTokenizer
from rlhf_core.ops.randomness import seeded_generator
from rlhf_core.prompts.entries import PromptEntry
from rlhf_core.prompts.rendering import render_prompt
from rlhf_core.prompts.sources import PromptSet


def sample_prompts(
    prompt_set: PromptSet,
    tokenizer: PolicyTokenizer,
    config: PromptsConfig,
    *,
    cursor: Cursor,
    seed: int,
    max_prompt_len: int,
) -> StageResult[Prompts]:
    """Take the next prompts in the epoch's order.

    Each epoch has its own order, drawn from (seed, epoch); its last, incomplete batch is left out, so that
    no prompt stands twice in an iteration.

    Args:
        prompt_set: all prompts.
        tokenizer: the policy's.
        config: batch size, order, and what happens to over-long prompts.
        cursor: where the previous iteration ended.
        seed: the run's seed.
        max_prompt_len: tokens.
    Returns: the prompts, their counts, and the cursor after them.
    Raises: UserError if a prompt is too long and refused, or an epoch has too few usable prompts.
    Source: reshuffled epochs (sampling without replacement).
    """
    wanted, size = config.num_prompts, len(prompt_set.entries)
    epoch, position, dropped = cursor.epoch, cursor.position, 0
    order = _epoch_order(size, epoch, seed, shuffle=config.shuffle)
    chosen: list[tuple[int, str, list[int], int]] = []
    for _ in range(2 * size):  # at most one whole epoch after the rest of this one
        if len(chosen) == wanted:
            break
        if size - position < wanted - len(chosen):
            epoch, position, dropped, chosen = epoch + 1, 0, 0, []
            order = _epoch_order(size, epoch, seed, shuffle=config.shuffle)
            if size < wanted:
                break
        row = int(order[position])
        position += 1
        text = render_prompt(prompt_set.entries[row], tokenizer.tokenizer, date=config.template_date)
        tokens = tokenizer.encode(text, is_chat=not isinstance(prompt_set.entries[row], str))
        fitted = _fit(tokens, max_prompt_len, config.over_long, row)
        if fitted is None:
            dropped += 1
        else:
            chosen.append((row, text, fitted, len(tokens) - len(fitted)))
    if len(chosen) < wanted:
        raise UserError(
            f"prompts.source {config.source!r} has too few usable prompts: an iteration needs {wanted} different "
            f"ones, it has {size}" + (f" of which {dropped} are over-long and dropped" if dropped else "")
        )
    return StageResult(
        _as_batch(chosen, prompt_set),
        metrics={
            "prompts/epoch": float(epoch),
            "prompts/mean_len": float(np.mean([len(tokens) for _, _, tokens, _ in chosen])),
            "prompts/truncated": float(sum(cut > 0 for *_, cut in chosen)),
            "prompts/dropped": float(dropped),
        },
        state={"cursor": asdict(Cursor(epoch, position))},
    )


def _epoch_order(size: int, epoch: int, seed: int, *, shuffle: bool) -> np.ndarray:
    return seeded_generator(seed, "sample_prompts", epoch).permutation(size) if shuffle else np.arange(size)


def _fit(tokens: list[int], longest: int, over_long: str, row: int) -> list[int] | None:
    if len(tokens) <= longest:
        return tokens
    if over_long == "truncate_left":
        return tokens[-longest:]
    if over_long == "drop":
        return None
    raise UserError(
        f"prompt {row} (from 0) of prompts.source has {len(tokens)} tokens, more than the {longest} that fit; "
        "set prompts.over_long to truncate_left or drop, or raise prompts.max_len if the context allows"
    )


def _as_batch(chosen: list[tuple[int, str, list[int], int]], prompt_set: PromptSet) -> Prompts:
    width = max(len(tokens) for _, _, tokens, _ in chosen)
    return Prompts(
        prompt_ids=[row for row, *_ in chosen],
        texts=[text for _, text, _, _ in chosen],
        messages=[_messages(prompt_set.entries[row]) for row, *_ in chosen],
        tokens_QP=torch.tensor([tokens + [0] * (width - len(tokens)) for _, _, tokens, _ in chosen]),
        mask_QP=torch.tensor([[True] * len(tokens) + [False] * (width - len(tokens)) for _, _, tokens, _ in chosen]),
        num_truncated=[cut for *_, cut in chosen],
        columns=[prompt_set.columns[row] for row, *_ in chosen],
    )


def _messages(entry: PromptEntry) -> list[dict[str, str]]:
    return [] if isinstance(entry, str) else list(entry)
