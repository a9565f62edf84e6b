"""Task of stage 6."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.batches import StageResult, UpdateStatistics
from rlhf_core.contracts.config_io import digest_json
from rlhf_core.contracts.loop_state import Cursor, ScoreMoments
from rlhf_core.ops.controller import next_state
from rlhf_core.stages import ppo_update as core
from tasks.resources import Resources, resources
from tasks.stage import run_stage, stage_task


@stage_task
def ppo_update(
    run_dir: str, iteration: int, prompts: ArtifactRef, rollouts: ArtifactRef, experience: ArtifactRef
) -> ArtifactRef:
    """Write 06_update.arrow, move the policy, and commit the loop state of the next iteration."""
    kept = resources(run_dir)
    config, state = kept.run.config, kept.run.state_before(iteration)

    def compute() -> StageResult[UpdateStatistics]:
        prompt_batch = kept.prompts(prompts)
        trainer = kept.trainer(iteration)
        try:
            return core.ppo_update(
                trainer,
                prompt_batch,
                kept.rollouts(rollouts, prompt_batch),
                kept.experience(experience),
                config.ppo,
                temperature=config.generation.temperature,
                max_response_len=config.generation.max_new_tokens,
                seed=config.seed,
                iteration=iteration,
                num_iterations=config.num_iterations,
            )
        except BaseException:
            kept.forget_trainer()
            raise

    return run_stage(
        kept,
        "ppo_update",
        iteration,
        {
            "prompts": prompts.sha256,
            "rollouts": rollouts.sha256,
            "experience": experience.sha256,
            "policy": kept.policy_digest(iteration),
            "state": digest_json(state.to_json()),
        },
        compute,
        UpdateStatistics.to_table,
        state=lambda _: _next_loop_state(kept, iteration),
        outputs=lambda: {"policy_after": kept.trainer(iteration + 1).digest()},
    )


def _next_loop_state(kept: Resources, iteration: int) -> Mapping[str, Any]:
    manifests = kept.run.manifests(iteration)
    sampled, shaped = manifests["sample_prompts"], manifests["shape_rewards"]
    return next_state(
        kept.run.state_before(iteration),
        kept.run.config.kl,
        kl=shaped.metrics["objective/kl"],
        num_samples=shaped.artifact.rows,
        cursor=Cursor(**sampled.state["cursor"]),
        moments=ScoreMoments(**shaped.state["moments"]),
    ).to_json()
