"""Task of stage 6."""

from __future__ import annotations

from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.stage_graph import STAGES
from tasks.session.session import open_session
from tasks.stage import run_stage, stage_task


@stage_task
def ppo_update(
    run_dir: str, iteration: int, prompts: ArtifactRef, rollouts: ArtifactRef, experience: ArtifactRef
) -> ArtifactRef:
    """Write 06_update.arrow, move the policy, and commit the loop state of the next iteration."""
    session, refs = open_session(run_dir), (prompts, rollouts, experience)
    return run_stage(session, STAGES["ppo_update"], iteration, refs, session.policy.update)
