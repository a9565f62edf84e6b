"""Task of stage 3."""

from __future__ import annotations

from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.batches import Scores
from tasks.resources import resources
from tasks.shards import scored, stage_inputs
from tasks.stage import run_stage, stage_task


@stage_task
def score_rewards(run_dir: str, iteration: int, prompts: ArtifactRef, rollouts: ArtifactRef) -> ArtifactRef:
    """Write 03_scores.arrow: what the reward components say of each response."""
    kept, refs = resources(run_dir), (prompts, rollouts)
    return run_stage(
        kept,
        "score_rewards",
        iteration,
        stage_inputs(kept, "score_rewards", iteration, refs),
        lambda: scored(kept, iteration, refs),
        Scores.to_table,
        num_threads=kept.side_by_side_threads,
    )
