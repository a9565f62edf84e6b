"""Task of stage 5."""

from __future__ import annotations

from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.batches import Experience
from rlhf_core.contracts.config_io import digest_json
from rlhf_core.stages import shape_rewards as core
from tasks.resources import resources
from tasks.stage import run_stage, stage_task


@stage_task
def shape_rewards(
    run_dir: str,
    iteration: int,
    prompts: ArtifactRef,
    rollouts: ArtifactRef,
    scores: ArtifactRef,
    ref_logprobs: ArtifactRef,
) -> ArtifactRef:
    """Write 05_experience.arrow: KL, rewards, advantages and returns."""
    kept = resources(run_dir)
    config, state = kept.run.config, kept.run.state_before(iteration)
    return run_stage(
        kept,
        "shape_rewards",
        iteration,
        {
            "rollouts": rollouts.sha256,
            "scores": scores.sha256,
            "ref_logprobs": ref_logprobs.sha256,
            "state": digest_json(state.to_json()),
        },
        lambda: core.shape_rewards(
            kept.rollouts(rollouts, kept.prompts(prompts)),
            kept.scores(scores),
            kept.reference_logprobs(ref_logprobs),
            config.shaping,
            config.kl,
            kl_coef=state.kl_coef,
            moments=state.moments,
            zero_kl_in=config.coarsest_dtype if iteration == 0 and config.starts_at_reference else None,
        ),
        Experience.to_table,
    )
