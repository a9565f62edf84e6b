"""Policy, critic and optimizer of a run in this process, at the iteration that is asked for.

The trainer of iteration i is the newest checkpoint at or before i, with the updates since then computed again from
their stored experience; each is compared with the digest that its update committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.batches import StageResult, UpdateStatistics
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.stage_graph import READS
from rlhf_core.models.actor_critic import ActorCritic
from rlhf_core.models.checkpoints import Trainer, load_checkpoint, new_trainer, save_checkpoint
from rlhf_core.models.devices import using_threads
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.stages.ppo_update import ppo_update
from tasks.session.replayed_updates import check_replayed

if TYPE_CHECKING:
    from tasks.session.session import Session


class PolicyState:
    """The weights of a run, held by the process of the run."""

    keeps_probed_models = True
    """Whether the models that a probe has loaded are those that compute."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._trainer: Trainer | None = None

    def trainer(self, iteration: int) -> Trainer:
        """Policy, critic and optimizer after ``iteration`` updates. Raises IntegrityError if they differ from then."""
        with self.session.lock:
            if self._trainer is not None and self._trainer.iteration > iteration:
                self._trainer = None  # before the next one is loaded: there is room for one
            trainer = self._trainer or self._nearest_checkpoint(iteration)
            while trainer.iteration < iteration:
                self._replay_update(trainer)
            self._trainer = trainer
            return trainer

    def behaviour(self, iteration: int) -> ActorCritic:
        """Policy and critic that answer an iteration's prompts, to be read alone."""
        return self.trainer(iteration).actor_critic

    def trunk(self) -> LanguageModel:
        """The policy in memory, whatever its adapter: the frozen trunk below it is the same at every iteration."""
        if self._trainer is None:
            self._trainer = self._nearest_checkpoint(self.session.run.num_finished())
        return self._trainer.actor_critic.policy

    def update(self, iteration: int, refs: Sequence[ArtifactRef]) -> StageResult[UpdateStatistics]:
        """Move the trainer of an iteration.

        Args:
            iteration: from 0.
            refs: prompts, rollouts, experience.
        Returns: one record an optimiser step, the digest of the weights after it, and the next loop state.
        """
        trainer = self.trainer(iteration)
        try:
            result = ppo_update(trainer, **self._update_inputs(iteration, refs))
        except BaseException:
            self._trainer = None  # it may be half-way
            raise
        outputs = {"policy_after": trainer.digest()}
        return replace(result, outputs=outputs, state=self.session.next_loop_state(iteration))

    def save(self, iteration: int, path: Path) -> None:
        """Commit the state before an iteration as a checkpoint folder."""
        run = self.session.run
        with using_threads(self.session.num_threads):
            save_checkpoint(
                path,
                self.trainer(iteration),
                self.session.tokenizer.tokenizer,
                run.state_before(iteration),
                identity=run.identity_digest_at(iteration),
                merge_adapter=run.config.policy.lora.save == "merged",
            )

    def keep_trainer(self, trainer: Trainer | None) -> None:
        """Use a trainer, instead of finding it again from checkpoint and updates."""
        self._trainer = trainer

    def _nearest_checkpoint(self, iteration: int) -> Trainer:
        """The newest state on disk at or before an iteration: a checkpoint, or the config's models."""
        run, device = self.session.run, self.session.device
        earlier = [i for i in run.checkpoints() if i <= iteration]
        if earlier:
            path = run.checkpoint_path(earlier[-1])
            trainer = load_checkpoint(path, run.config, device, identities=run.identities)[0]
        else:
            trainer = new_trainer(run.config, device)
        return self.session.same_files(trainer)

    def _replay_update(self, trainer: Trainer) -> None:
        """Compute a committed update again from its artifacts."""
        iteration, run = trainer.iteration, self.session.run
        manifests = run.manifests(iteration)
        if "ppo_update" not in manifests:
            raise IntegrityError(f"iteration {iteration} of {run.path} has no committed update to start from")
        refs = [manifests[stage].artifact for stage in READS["ppo_update"]]
        ppo_update(trainer, **self._update_inputs(iteration, refs))
        check_replayed(run, trainer, iteration, manifests["ppo_update"].inputs["policy_after"])

    def _update_inputs(self, iteration: int, refs: Sequence[ArtifactRef]) -> dict[str, Any]:
        """Everything that an update reads beside the trainer."""
        session, config = self.session, self.session.run.config
        prompts = session.prompts(refs[0])
        return {
            "prompts": prompts,
            "rollouts": session.rollouts(refs[1], prompts),
            "experience": session.experience(refs[2]),
            "config": config.ppo,
            "temperature": config.generation.temperature,
            "max_response_len": config.generation.max_new_tokens,
            "seed": config.seed,
            "iteration": iteration,
            "num_iterations": session.run.num_iterations_at(iteration),
            "importance_cap": config.importance_cap,
        }
