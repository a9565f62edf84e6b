"""Weights that are handed out as files: to workers, and to whoever answers the next prompts during an update."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_core.contracts.shards import handed_weights
from rlhf_core.models.actor_critic import ActorCritic
from rlhf_core.models.checkpoints import Trainer
from rlhf_core.models.devices import using_threads
from rlhf_core.models.handed_weights import hand_out, is_handed_out, take_up
from rlhf_core.models.language_model import LanguageModel
from tasks.session.policy_state import PolicyState

if TYPE_CHECKING:
    from tasks.session.session import Session


class HandedPolicyState(PolicyState):
    """The weights of a run whose prompts are answered by workers, or while its policy moves.

    A worker has no trainer: it answers with the weights that the process of the run has handed out.
    """

    keeps_probed_models = False

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._behaviour: tuple[str, ActorCritic] | None = None
        """Digest and weights of a policy and critic that have been handed out."""

    def trainer(self, iteration: int) -> Trainer:
        """As in a process that is alone; without overlap there is room for one policy."""
        with self.session.lock:
            if not self.session.run.config.execution.overlap:
                self._behaviour = None
            return super().trainer(iteration)

    def behaviour(self, iteration: int) -> ActorCritic:
        """Policy and critic that answer an iteration's prompts: as handed out, where they were.

        Raises: IntegrityError if that is not what the iteration is answered with.
        """
        run = self.session.run
        with self.session.lock:
            digest, handed = self.session.behaviour_digest(iteration), handed_weights(run.path, iteration)
            updates = iteration - run.updates_behind(iteration)
            if self._trainer is not None and self._trainer.iteration == updates:
                return self._trainer.actor_critic
            if not handed.is_dir():
                return self.trainer(updates).actor_critic
            return self._taken_up(iteration, digest)

    def trunk(self) -> LanguageModel:
        """Of the handed-out policy, if there is one."""
        return super().trunk() if self._behaviour is None else self._behaviour[1].policy

    def hand_out(self, iteration: int) -> None:
        """Write the weights that answer an iteration's prompts for other processes, which begin with the config's."""
        run = self.session.run
        digest, handed = self.session.behaviour_digest(iteration), handed_weights(run.path, iteration)
        if digest == "initial" or is_handed_out(handed, digest):
            return
        with using_threads(self.session.num_threads):
            trainer = self.trainer(iteration - run.updates_behind(iteration))
            hand_out(handed, trainer.actor_critic, digest, trainer.ranks)

    def _taken_up(self, iteration: int, digest: str) -> ActorCritic:
        """The policy and critic beside the trainer, or in its place, with the weights that were handed out."""
        run = self.session.run
        if self._behaviour is None:
            trainer = self._trainer
            if trainer is None or run.config.execution.overlap:  # whose trainer goes on from the newest
                self._behaviour = ("", self._initial())
            else:
                self._trainer, self._behaviour = None, ("", trainer.actor_critic)
        if self._behaviour[0] != digest:
            take_up(handed_weights(run.path, iteration), self._behaviour[1], digest)
            self._behaviour = (digest, self._behaviour[1])
        return self._behaviour[1]

    def _initial(self) -> ActorCritic:
        """Policy and critic as the config begins with them."""
        return self.session.same_files(ActorCritic.initial(self.session.run.config, self.session.device))
