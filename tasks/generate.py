"""Task of stage 2."""

from __future__ import annotations

from rlhf_core.contracts.artifacts import ArtifactRef
from tasks.resources import resources
from tasks.shards import generated, stage_inputs
from tasks.stage import run_stage, stage_task


@stage_task
def generate(run_dir: str, iteration: int, prompts: ArtifactRef) -> ArtifactRef:
    """Write 02_rollouts.arrow: the policy's responses with behaviour log-probs and values."""
    kept = resources(run_dir)
    batch = kept.prompts(prompts)
    return run_stage(
        kept,
        "generate",
        iteration,
        stage_inputs(kept, "generate", iteration, (prompts,)),
        lambda: generated(kept, iteration, prompts, batch),
        lambda rollouts: rollouts.to_table(batch),
    )
