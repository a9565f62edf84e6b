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
from rlhf_core.prompts.assembly import AssembledPrompt, PromptAssembler
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
    assembler = PromptAssembler(tokenizer.tokenizer, config, tokenizer.eos_ids)
    chosen: list[tuple[int, AssembledPrompt]] = []
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
        fitted = _fit(assembler, assembler.assemble(prompt_set.entries[row]), max_prompt_len, row)
        if fitted is None:
            dropped += 1
        else:
            chosen.append((row, fitted))
    if len(chosen) < wanted:
        raise UserError(
            f"prompts.source {config.source!r} has too few usable prompts: an iteration needs {wanted} different "
            f"ones, it has {size}" + (f" of which {dropped} are over-long and dropped" if dropped else "")
        )
    return StageResult(
        _as_batch(chosen, prompt_set),
        metrics={
            "prompts/epoch": float(epoch),
            "prompts/mean_len": float(np.mean([len(prompt.tokens) for _, prompt in chosen])),
            "prompts/truncated": float(sum(prompt.num_truncated > 0 for _, prompt in chosen)),
            "prompts/dropped": float(dropped),
        },
        state={"cursor": asdict(Cursor(epoch, position))},
    )


def _epoch_order(size: int, epoch: int, seed: int, *, shuffle: bool) -> np.ndarray:
    return seeded_generator(seed, "sample_prompts", epoch).permutation(size) if shuffle else np.arange(size)


def _fit(assembler: PromptAssembler, whole: AssembledPrompt, longest: int, row: int) -> AssembledPrompt | None:
    over_long = assembler.config.over_long
    if len(whole.tokens) <= longest:
        return whole
    if over_long == "drop":
        return None
    if over_long == "truncate_left":
        if (cut := assembler.truncated(whole, longest)) is not None:
            return cut
        remedy = "set prompts.over_long to drop"
    else:
        remedy = "set prompts.over_long to truncate_left or drop"
    raise UserError(
        f"prompt {row} (from 0) of prompts.source has {len(whole.tokens)} tokens, more than the {longest} that fit; "
        f"{remedy}, or raise prompts.max_len if the context allows"
    )


def _as_batch(chosen: list[tuple[int, AssembledPrompt]], prompt_set: PromptSet) -> Prompts:
    rows, prompts = [row for row, _ in chosen], [prompt for _, prompt in chosen]
    lens = [len(prompt.tokens) for prompt in prompts]
    width = max(lens)
    return Prompts(
        prompt_ids=rows,
        texts=[prompt.text for prompt in prompts],
        messages=[list(prompt.messages) for prompt in prompts],
        tokens_QP=torch.tensor([prompt.tokens + [0] * (width - len(prompt.tokens)) for prompt in prompts]),
        mask_QP=torch.tensor([[True] * length + [False] * (width - length) for length in lens]),
        num_truncated=[prompt.num_truncated for prompt in prompts],
        columns=[prompt_set.columns[row] for row in rows],
    )
