"""Task of stage 2."""

from __future__ import annotations

from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.stage_graph import STAGES
from tasks.session.session import open_session
from tasks.stage import run_stage, stage_task


@stage_task
def generate(run_dir: str, iteration: int, prompts: ArtifactRef) -> ArtifactRef:
    """Write 02_rollouts.arrow: the policy's responses with behaviour log-probs and values."""
    session = open_session(run_dir)
    return run_stage(session, STAGES["generate"], iteration, (prompts,), session.work.generate)
