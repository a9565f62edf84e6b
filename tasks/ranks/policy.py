"""Weights that the ranks of an update hold: the process of the run asks them, and answers with what they hand out."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.batches import StageResult, UpdateStatistics
from rlhf_core.contracts.durable import adopt
from rlhf_core.contracts.shards import handed_weights
from rlhf_core.models.actor_critic import ActorCritic
from rlhf_core.models.checkpoints import Trainer, load_checkpoint
from rlhf_core.models.handed_weights import is_handed_out
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.ranks import GroupRanks
from rlhf_core.models.sharding import shard_trainer
from tasks.ranks.group import rank_group
from tasks.session.policy_state import PolicyState
from tasks.shards.handed_policy import HandedPolicyState

if TYPE_CHECKING:
    from tasks.session.session import Session


class RankedPolicyState(HandedPolicyState):
    """The weights of a run whose updates are made by ranks, in the process of the run, which has none of them."""

    def trainer(self, iteration: int) -> Trainer:
        """The trainer of the ranks, through a checkpoint: it cannot be moved here."""
        with self.session.lock:
            if self._trainer is not None and self._trainer.iteration != iteration:
                self._trainer = None  # before the next one is loaded: there is room for one
            return super().trainer(iteration)

    def behaviour(self, iteration: int) -> ActorCritic:
        """Policy and critic as the ranks have handed them out."""
        with self.session.lock:
            self.hand_out(iteration)
            digest = self.session.behaviour_digest(iteration)
            return self._first() if digest == "initial" else self._taken_up(iteration, digest)

    def trunk(self) -> LanguageModel:
        """Of policy and critic in memory, whatever their weights; as they are before the first iteration if need be."""
        return self._first().policy

    def hand_out(self, iteration: int) -> None:
        """Let the ranks write the weights that answer an iteration's prompts."""
        digest, handed = self.session.behaviour_digest(iteration), handed_weights(self.session.run.path, iteration)
        if digest == "initial":
            return
        if not is_handed_out(handed, digest):
            self.ask("hand_out", iteration)
        adopt(handed)

    def update(self, iteration: int, refs: Sequence[ArtifactRef]) -> StageResult[UpdateStatistics]:
        """Let the ranks move their trainer."""
        answer = self.ask("update", iteration, refs=[asdict(ref) for ref in refs])
        return StageResult(
            UpdateStatistics(answer["steps"]),
            answer["metrics"],
            outputs={"policy_after": answer["digest"]},
            state=self.session.next_loop_state(iteration),
        )

    def save(self, iteration: int, path: Path) -> None:
        """Let the ranks commit the state before an iteration as a checkpoint folder."""
        self.ask("save", iteration, path=str(path))
        adopt(path)

    def ask(self, request: str, iteration: int, **more: Any) -> dict[str, Any]:
        """Let all ranks do something with the trainer of an iteration. Returns: what the first of them answers."""
        run, update = self.session.run, self.session.run.config.execution.update
        asked = {"path": str(run.path.resolve()), "record": run.record()}
        group = rank_group(update, self.session.device.type, update.rank_threads(self.session.num_threads))
        return group.call({"do": request, "iteration": iteration, "run": asked, **more})

    def _first(self) -> ActorCritic:
        if self._behaviour is None:
            self._behaviour = ("initial", self._initial())
        return self._behaviour[1]

    def _nearest_checkpoint(self, iteration: int) -> Trainer:
        run = self.session.run
        earlier = [i for i in run.checkpoints() if i <= iteration]
        if (earlier[-1] if earlier else 0) == iteration:
            return super()._nearest_checkpoint(iteration)
        with tempfile.TemporaryDirectory(prefix="rlhf-state-") as folder:  # exactly theirs, and not kept
            path = Path(folder) / run.checkpoint_path(iteration).name
            self.save(iteration, path)
            return load_checkpoint(path, run.config, self.session.device)[0]


class RankPolicyState(PolicyState):
    """The part of the weights that one rank holds, in the process of that rank."""

    def __init__(self, session: Session, ranks: GroupRanks) -> None:
        super().__init__(session)
        self._ranks = ranks

    def _nearest_checkpoint(self, iteration: int) -> Trainer:
        return shard_trainer(super()._nearest_checkpoint(iteration), self.session.run.config, self._ranks)
