"""Task of stage 5."""

from __future__ import annotations

from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.batches import Experience, StageResult
from rlhf_core.contracts.stage_graph import STAGES
from rlhf_core.stages import shape_rewards as core
from tasks.session.session import open_session
from tasks.stage import Refs, run_stage, stage_task


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
    session = open_session(run_dir)

    def compute(iteration: int, _refs: Refs) -> StageResult[Experience]:
        config, state = session.run.config, session.run.state_before(iteration)
        return core.shape_rewards(
            session.rollouts(rollouts, session.prompts(prompts)),
            session.scores(scores),
            session.reference_logprobs(ref_logprobs),
            config.shaping,
            config.kl,
            kl_coef=state.kl_coef,
            moments=state.moments,
            zero_kl_in=config.coarsest_dtype if iteration == 0 and config.starts_at_reference else None,
        )

    refs = (prompts, rollouts, scores, ref_logprobs)
    return run_stage(session, STAGES["shape_rewards"], iteration, refs, compute)
