"""Task of stage 3."""

from __future__ import annotations

from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.batches import Scores, StageResult
from rlhf_core.stages import score_rewards as core
from tasks.resources import resources
from tasks.shards import scored, stage_inputs
from tasks.stage import run_stage, stage_task


@stage_task
def score_rewards(run_dir: str, iteration: int, prompts: ArtifactRef, rollouts: ArtifactRef) -> ArtifactRef:
    """Write 03_scores.arrow: what the reward components say of each response."""
    kept = resources(run_dir)
    refs = (prompts, rollouts)

    def compute() -> StageResult[Scores]:
        prompt_batch = kept.prompts(prompts)
        return core.score_rewards(
            kept.reward_components, prompt_batch, kept.rollouts(rollouts, prompt_batch), kept.run.config.reward
        )

    return run_stage(
        kept,
        "score_rewards",
        iteration,
        stage_inputs(kept, "score_rewards", iteration, refs),
        (lambda: scored(kept, iteration, refs)) if kept.is_sharded else compute,
        Scores.to_table,
        num_threads=kept.side_by_side_threads,
    )
