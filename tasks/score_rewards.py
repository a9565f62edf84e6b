"""Task of stage 3."""

from __future__ import annotations

from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.batches import Scores
from rlhf_core.stages import score_rewards as core
from tasks.resources import resources
from tasks.stage import run_stage, stage_task


@stage_task
def score_rewards(run_dir: str, iteration: int, prompts: ArtifactRef, rollouts: ArtifactRef) -> ArtifactRef:
    """Write 03_scores.arrow: what the reward components say of each response."""
    kept = resources(run_dir)
    prompt_batch = kept.prompts(prompts)
    return run_stage(
        kept,
        "score_rewards",
        iteration,
        {"prompts": prompts.sha256, "rollouts": rollouts.sha256},
        lambda: core.score_rewards(
            kept.reward_components, prompt_batch, kept.rollouts(rollouts, prompt_batch), kept.run.config.reward
        ),
        Scores.to_table,
        num_threads=kept.side_by_side_threads,
    )
