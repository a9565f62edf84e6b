"""One iteration of the six stages as plain function calls, as a notebook would write them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_core.contracts.batches import (
    Experience,
    Prompts,
    ReferenceLogprobs,
    Rollouts,
    Scores,
    StageResult,
    UpdateStatistics,
)
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.loop_state import Cursor, LoopState, ScoreMoments
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.identity import identity_digest
from rlhf_core.models.checkpoints import Trainer, new_trainer, save_checkpoint
from rlhf_core.models.devices import resolve_device
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.policy import load_reference
from rlhf_core.models.tokenizers import vocabulary_digest
from rlhf_core.preflight import Plan, preflight
from rlhf_core.rewards.loading import load_component
from rlhf_core.rewards.scoring import Component
from rlhf_core.stages.generate import generate
from rlhf_core.stages.ppo_update import ppo_update
from rlhf_core.stages.reference_logprobs import reference_logprobs
from rlhf_core.stages.sample_prompts import sample_prompts
from rlhf_core.stages.score_rewards import score_rewards
from rlhf_core.stages.shape_rewards import shape_rewards

CPU = torch.device("cpu")
START = Cursor()


def tiny_tree(tiny: Any) -> dict[str, Any]:
    """The config of a three-iteration run on the tiny world, as a tree: every test's starting point."""
    return {
        "seed": 7,
        "num_iterations": 3,
        "device": "cpu",
        "num_threads": 1,
        "prompts": {"source": str(tiny.prompts), "batch_size": 8},
        "policy": {"model": str(tiny.policy), "critic": {"init": "policy"}},
        "reward": {"components": [{"kind": "model", "model": str(tiny.reward)}]},
        "generation": {"max_new_tokens": 6},
        "shaping": {"gae_lambda": 0.95},
        "ppo": {"num_ppo_epochs": 2, "num_minibatches": 2, "learning_rate": 1e-3, "embedding_lr_factor": 1.0},
        "tracking": {"enabled": False},
    }


@dataclass
class Bench:
    """A config with its models in memory."""

    config: RunConfig
    plan: Plan
    trainer: Trainer
    reference: LanguageModel
    rewards: list[Component]

    @classmethod
    def of(cls, config: RunConfig) -> Bench:
        plan, device = preflight(config), resolve_device(config.device)
        vocabulary = vocabulary_digest(plan.tokenizer.tokenizer)
        trainer = new_trainer(config, device)
        return cls(
            config,
            plan,
            trainer,
            load_reference(config, device, trainer.actor_critic.policy),
            [
                load_component(
                    c,
                    field=f"reward.components.{i}",
                    columns=config.prompts.columns,
                    policy_vocabulary=vocabulary,
                    device=device,
                )
                for i, c in enumerate(config.reward.components)
            ],
        )

    def prompts(self, cursor: Cursor = START) -> StageResult[Prompts]:
        return sample_prompts(
            self.plan.prompt_set,
            self.plan.tokenizer,
            self.config.prompts,
            cursor=cursor,
            seed=self.config.seed,
            max_prompt_len=self.plan.max_prompt_len,
        )

    def rollouts(self, prompts: Prompts, iteration: int = 0) -> StageResult[Rollouts]:
        return generate(
            self.trainer.actor_critic,
            self.plan.tokenizer,
            prompts,
            self.config.generation,
            samples_per_prompt=self.config.prompts.samples_per_prompt,
            seed=self.config.seed,
            iteration=iteration,
        )

    def scores(self, prompts: Prompts, rollouts: Rollouts) -> StageResult[Scores]:
        return score_rewards(self.rewards, prompts, rollouts, self.config.reward)

    def ref_logprobs(self, prompts: Prompts, rollouts: Rollouts) -> StageResult[ReferenceLogprobs]:
        return reference_logprobs(
            self.reference,
            prompts,
            rollouts,
            self.config.reference,
            temperature=self.config.generation.temperature,
        )

    def experience(self, rollouts: Rollouts, scores: Scores, reference: ReferenceLogprobs, **changes: Any) -> Any:
        settings = {"kl_coef": self.config.kl.coef, "moments": ScoreMoments(), "zero_kl_in": None}
        return shape_rewards(
            rollouts, scores, reference, self.config.shaping, self.config.kl, **{**settings, **changes}
        )

    def update(
        self, prompts: Prompts, rollouts: Rollouts, experience: Experience, iteration: int = 0
    ) -> StageResult[UpdateStatistics]:
        return ppo_update(
            self.trainer,
            prompts,
            rollouts,
            experience,
            self.config.ppo,
            temperature=self.config.generation.temperature,
            max_response_len=self.config.generation.max_new_tokens,
            seed=self.config.seed,
            iteration=iteration,
            num_iterations=self.config.num_iterations,
        )

    def until_experience(self) -> tuple[Prompts, Rollouts, Experience]:
        prompts = self.prompts().batch
        rollouts = self.rollouts(prompts).batch
        shaped = self.experience(
            rollouts, self.scores(prompts, rollouts).batch, self.ref_logprobs(prompts, rollouts).batch
        )
        return prompts, rollouts, shaped.batch


def run_with_checkpoints(path: Path, config: RunConfig, *iterations: int) -> tuple[RunFolder, Trainer]:
    """A run folder with checkpoints of a policy that has moved, further each time; and the last trainer."""
    run = RunFolder.create(path, config, {"num_threads": 1})
    trainer = new_trainer(config, CPU)
    tokenizer = preflight(config).tokenizer.tokenizer
    generator = torch.Generator().manual_seed(0)
    for iteration in iterations:
        with torch.no_grad():
            for _, parameter in trainer.actor_critic.policy_parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        trainer.iteration = iteration
        state, identity = LoopState(iteration, 0.1), identity_digest(run.identity)
        save_checkpoint(run.checkpoint_path(iteration), trainer, tokenizer, state, identity=identity)
    return run, trainer
