"""The update of an iteration as this process makes it: alone, or as one of several ranks."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.batches import StageResult, UpdateStatistics
from rlhf_core.stages import ppo_update as core
from tasks.resources import Resources


def make_update(kept: Resources, iteration: int, refs: Sequence[ArtifactRef]) -> StageResult[UpdateStatistics]:
    """Move the trainer of an iteration.

    Args:
        kept: resources of the run in this process.
        iteration: from 0.
        refs: prompts, rollouts, experience.
    """
    config, prompts = kept.run.config, kept.prompts(refs[0])
    trainer = kept.trainer(iteration)
    try:
        return core.ppo_update(
            trainer,
            prompts,
            kept.rollouts(refs[1], prompts),
            kept.experience(refs[2]),
            config.ppo,
            temperature=config.generation.temperature,
            max_response_len=config.generation.max_new_tokens,
            seed=config.seed,
            iteration=iteration,
            num_iterations=kept.run.num_iterations_at(iteration),
            importance_cap=config.importance_cap,
        )
    except BaseException:
        kept.forget_trainer()
        raise
