"""Task of stage 1."""

from __future__ import annotations

from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.batches import Prompts, StageResult
from rlhf_core.contracts.stage_graph import STAGES
from tasks.session.session import open_session
from tasks.stage import Refs, run_stage, stage_task


@stage_task
def sample_prompts(run_dir: str, iteration: int) -> ArtifactRef:
    """Write 01_prompts.arrow: the prompts that this iteration answers."""
    session = open_session(run_dir)

    def compute(iteration: int, _refs: Refs) -> StageResult[Prompts]:
        return session.next_prompts(session.run.state_before(iteration).cursor)

    return run_stage(session, STAGES["sample_prompts"], iteration, (), compute)
