"""Task of stage 4."""

from __future__ import annotations

from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.batches import ReferenceLogprobs, StageResult
from rlhf_core.stages import reference_logprobs as core
from tasks.resources import resources
from tasks.shards import referred, stage_inputs
from tasks.stage import run_stage, stage_task


@stage_task
def reference_logprobs(run_dir: str, iteration: int, prompts: ArtifactRef, rollouts: ArtifactRef) -> ArtifactRef:
    """Write 04_ref_logprobs.arrow: what the frozen reference says of each response token."""
    kept = resources(run_dir)
    config, refs = kept.run.config, (prompts, rollouts)

    def compute() -> StageResult[ReferenceLogprobs]:
        prompt_batch = kept.prompts(prompts)
        return core.reference_logprobs(
            kept.reference,
            prompt_batch,
            kept.rollouts(rollouts, prompt_batch),
            config.reference,
            temperature=config.generation.temperature,
        )

    return run_stage(
        kept,
        "reference_logprobs",
        iteration,
        stage_inputs(kept, "reference_logprobs", iteration, refs),
        (lambda: referred(kept, iteration, refs)) if kept.is_sharded else compute,
        ReferenceLogprobs.to_table,
        num_threads=kept.side_by_side_threads,
    )
