"""The stages that look at each response for itself, computed as a whole by this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.batches import Prompts, ReferenceLogprobs, Rollouts, Scores, StageResult
from rlhf_core.stages import generate as generation
from rlhf_core.stages import reference_logprobs as reference
from rlhf_core.stages import score_rewards as scoring

if TYPE_CHECKING:
    from tasks.session.session import Session

Refs = Sequence[ArtifactRef]


class WholeStages:
    """What generate, score_rewards and reference_logprobs compute for an iteration."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def generate(self, iteration: int, refs: Refs) -> StageResult[Rollouts]:
        """The responses to all prompts; ``refs``: prompts."""
        return self.answer(iteration, self.session.prompts(refs[0]))

    def score_rewards(self, _iteration: int, refs: Refs) -> StageResult[Scores]:
        """The scores of all responses; ``refs``: prompts, rollouts."""
        return self.score(*self.responses(refs))

    def reference_logprobs(self, _iteration: int, refs: Refs) -> StageResult[ReferenceLogprobs]:
        """The reference's log-probs of all responses; ``refs``: prompts, rollouts."""
        return self.refer(*self.responses(refs))

    def answer(self, iteration: int, prompts: Prompts) -> StageResult[Rollouts]:
        """The responses to some prompts."""
        config = self.session.run.config
        return generation.generate(
            self.session.policy.behaviour(iteration),
            self.session.tokenizer,
            prompts,
            config.generation,
            samples_per_prompt=config.prompts.samples_per_prompt,
            seed=config.seed,
            iteration=iteration,
        )

    def score(self, prompts: Prompts, rollouts: Rollouts) -> StageResult[Scores]:
        """The scores of some responses."""
        components = self.session.models.reward_components
        return scoring.score_rewards(components, prompts, rollouts, self.session.run.config.reward)

    def refer(self, prompts: Prompts, rollouts: Rollouts) -> StageResult[ReferenceLogprobs]:
        """The reference's log-probs of some responses."""
        config = self.session.run.config
        return reference.reference_logprobs(
            self.session.models.reference,
            prompts,
            rollouts,
            config.reference,
            temperature=config.generation.temperature,
        )

    def responses(self, refs: Refs) -> tuple[Prompts, Rollouts]:
        """Prompts and rollouts of two artifacts."""
        prompts = self.session.prompts(refs[0])
        return prompts, self.session.rollouts(refs[1], prompts)
