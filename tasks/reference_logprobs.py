"""Task of stage 4."""

from __future__ import annotations

from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.batches import ReferenceLogprobs
from tasks.resources import resources
from tasks.shards import referred, stage_inputs
from tasks.stage import run_stage, stage_task


@stage_task
def reference_logprobs(run_dir: str, iteration: int, prompts: ArtifactRef, rollouts: ArtifactRef) -> ArtifactRef:
    """Write 04_ref_logprobs.arrow: what the frozen reference says of each response token."""
    kept, refs = resources(run_dir), (prompts, rollouts)
    return run_stage(
        kept,
        "reference_logprobs",
        iteration,
        stage_inputs(kept, "reference_logprobs", iteration, refs),
        lambda: referred(kept, iteration, refs),
        ReferenceLogprobs.to_table,
        num_threads=kept.reference_threads,
    )
