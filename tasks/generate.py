"""Task of stage 2."""

from __future__ import annotations

from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.batches import Rollouts, StageResult
from rlhf_core.stages import generate as core
from tasks.resources import resources
from tasks.shards import generated, stage_inputs
from tasks.stage import run_stage, stage_task


@stage_task
def generate(run_dir: str, iteration: int, prompts: ArtifactRef) -> ArtifactRef:
    """Write 02_rollouts.arrow: the policy's responses with behaviour log-probs and values."""
    kept = resources(run_dir)
    config = kept.run.config
    prompt_batch = kept.prompts(prompts)

    def compute() -> StageResult[Rollouts]:
        return core.generate(
            kept.trainer(iteration).actor_critic,
            kept.tokenizer,
            prompt_batch,
            config.generation,
            samples_per_prompt=config.prompts.samples_per_prompt,
            seed=config.seed,
            iteration=iteration,
        )

    return run_stage(
        kept,
        "generate",
        iteration,
        stage_inputs(kept, "generate", iteration, (prompts,)),
        (lambda: generated(kept, iteration, prompts)) if kept.is_sharded else compute,
        lambda rollouts: rollouts.to_table(prompt_batch),
    )
