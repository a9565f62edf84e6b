"""Task of stage 1."""

from __future__ import annotations

from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.batches import Prompts
from rlhf_core.contracts.config_io import digest_json
from tasks.resources import resources
from tasks.stage import run_stage, stage_task


@stage_task
def sample_prompts(run_dir: str, iteration: int) -> ArtifactRef:
    """Write 01_prompts.arrow: the prompts that this iteration answers."""
    kept = resources(run_dir)
    state = kept.run.state_before(iteration)
    return run_stage(
        kept,
        "sample_prompts",
        iteration,
        {"state": digest_json(state.to_json())},
        lambda: kept.next_prompts(state.cursor),
        Prompts.to_table,
    )
