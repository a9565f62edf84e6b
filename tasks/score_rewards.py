"""Task of stage 3."""

from __future__ import annotations

from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.stage_graph import STAGES
from tasks.session.session import open_session
from tasks.stage import run_stage, stage_task


@stage_task
def score_rewards(run_dir: str, iteration: int, prompts: ArtifactRef, rollouts: ArtifactRef) -> ArtifactRef:
    """Write 03_scores.arrow: what the reward components say of each response."""
    session = open_session(run_dir)
    return run_stage(session, STAGES["score_rewards"], iteration, (prompts, rollouts), session.work.score_rewards)
