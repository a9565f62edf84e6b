"""Task of stage 4."""

from __future__ import annotations

from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.stage_graph import STAGES
from tasks.session.session import open_session
from tasks.stage import run_stage, stage_task


@stage_task
def reference_logprobs(run_dir: str, iteration: int, prompts: ArtifactRef, rollouts: ArtifactRef) -> ArtifactRef:
    """Write 04_ref_logprobs.arrow: what the frozen reference says of each response token."""
    session, refs = open_session(run_dir), (prompts, rollouts)
    return run_stage(session, STAGES["reference_logprobs"], iteration, refs, session.work.reference_logprobs)
