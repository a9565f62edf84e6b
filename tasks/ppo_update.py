"""Task of stage 6."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.batches import StageResult, UpdateStatistics
from rlhf_core.contracts.config_io import digest_json
from rlhf_core.contracts.loop_state import Cursor, ScoreMoments
from rlhf_core.ops.controller import next_state
from tasks.resources import Resources, resources
from tasks.stage import run_stage, stage_task
from tasks.updates import make_update


@stage_task
def ppo_update(
    run_dir: str, iteration: int, prompts: ArtifactRef, rollouts: ArtifactRef, experience: ArtifactRef
) -> ArtifactRef:
    """Write 06_update.arrow, move the policy, and commit the loop state of the next iteration."""
    kept = resources(run_dir)
    state = kept.run.state_before(iteration)

    refs = [prompts, rollouts, experience]
    by_ranks: dict[str, str] = {}

    def compute() -> StageResult[UpdateStatistics]:
        if not kept.asks_ranks:
            return make_update(kept, iteration, refs)
        answer = kept.ask_ranks("update", iteration, refs=[asdict(ref) for ref in refs])
        by_ranks["policy_after"] = answer["digest"]
        return StageResult(UpdateStatistics(answer["steps"]), answer["metrics"])

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
        outputs=lambda: by_ranks or {"policy_after": kept.trainer(iteration + 1).digest()},
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
