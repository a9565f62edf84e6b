"""What a worker keeps in memory for a run: caches of files and checkpoints, never a hidden input.

Everything here can be dropped at any time and is found again from the run folder. The trainer of iteration i
is the newest checkpoint at or before i, with the updates since then computed again from their stored
experience; each is compared with the digest that its update committed.
"""

from __future__ import annotations

import functools
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from rlhf_core.contracts.artifacts import ArtifactRef, read_artifact
from rlhf_core.contracts.batches import (
    Experience,
    Prompts,
    ReferenceLogprobs,
    Rollouts,
    Scores,
    StageResult,
    check_vocabulary,
)
from rlhf_core.contracts.durable import adopt
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.loop_state import Cursor
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.shards import handed_weights
from rlhf_core.identity import check_files
from rlhf_core.memory import settle_memory
from rlhf_core.models.actor_critic import ActorCritic
from rlhf_core.models.checkpoints import Trainer, load_checkpoint, new_trainer, save_checkpoint
from rlhf_core.models.devices import resolve_device, using_threads
from rlhf_core.models.frozen import FrozenModels, move_models
from rlhf_core.models.handed_weights import hand_out, is_handed_out, take_up
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.policy import load_reference
from rlhf_core.models.ranks import GroupRanks
from rlhf_core.models.sharding import shard_trainer
from rlhf_core.models.tokenizers import PolicyTokenizer, vocabulary_digest
from rlhf_core.preflight import Plan, load_plan
from rlhf_core.preflight.probe import Loaded
from rlhf_core.rewards.loading import load_component
from rlhf_core.rewards.scoring import Component
from rlhf_core.stages.ppo_update import ppo_update
from rlhf_core.stages.sample_prompts import sample_prompts
from tasks.rank_group import rank_group
from tasks.replayed_updates import check_replayed

Value = TypeVar("Value")


class Resources:
    """One run's models and data in this process.

    Args:
        run: the run folder.
        ranks: that this process is one of; None: it is the run's own, which asks them where its config has any.
    """

    def __init__(self, run: RunFolder, ranks: GroupRanks | None = None) -> None:
        self.run, self.ranks = run, ranks
        self.device = resolve_device(run.config.device) if ranks is None else torch.device("cpu")
        self._kept: dict[str, Any] = {}
        self._models = FrozenModels()
        self._lock = threading.RLock()
        self._trainer: Trainer | None = None
        self._behaviour: tuple[str, ActorCritic] | None = None
        self._num_threads: int | None = None
        self.needs_same_files = True
        """Whether models and rewards are those of the run's identity; a replay may use others."""
        self.has_given_rewards = False
        """Whether other components score than those of the config: workers have none of them."""

    @property
    def num_threads(self) -> int:
        """CPU threads of the run: part of its identity."""
        return self._num_threads or int(cast("int", self.run.identity["num_threads"]))

    @property
    def side_by_side_threads(self) -> int:
        """Threads of each of two stages that run at the same time."""
        return max(1, self.num_threads // 2)

    @property
    def reference_threads(self) -> int:
        """Threads of the reference: all of them where no model scores beside it."""
        has_model = any(component.kind == "model" for component in self.run.config.reward.components)
        return self.side_by_side_threads if has_model else self.num_threads

    @property
    def shard_threads(self) -> int:
        """CPU threads of a shard."""
        return self.run.config.execution.shard_threads(self.num_threads)

    @property
    def asks_ranks(self) -> bool:
        """Whether other processes make the updates, and have policy, critic and optimizer."""
        return self.ranks is None and self.run.config.execution.update.is_launched

    @property
    def is_sharded(self) -> bool:
        """Whether stages are computed by shards."""
        return self.run.config.execution.is_sharded

    def policy_digest(self, iteration: int) -> str:
        """Identity of the weights before an iteration: as its predecessor committed them, or a drift gave them."""
        if (drift := self.run.drift_at(iteration)) is not None:
            return drift.weights
        if iteration == 0:
            return "initial"
        manifest = self.run.manifest("ppo_update", iteration - 1)
        if manifest is None:
            raise IntegrityError(f"iteration {iteration - 1} of {self.run.path} is not committed")
        return manifest.inputs["policy_after"]

    def behaviour_digest(self, iteration: int) -> str:
        """Identity of the weights that answer an iteration's prompts."""
        return self.policy_digest(iteration - self.run.updates_behind(iteration))

    @property
    def plan(self) -> Plan:
        """The run's plan, with its prompts and tokenizer."""
        return self._once("plan", lambda: load_plan(self.run.config))

    def keep_plan(self, plan: Plan) -> None:
        """Take over the plan of whoever has just checked this run, instead of making it again."""
        self._kept["plan"] = plan

    def keep_loaded(self, loaded: Loaded) -> None:
        """Take over the models that a probe has loaded, where this process is the one that computes with them."""
        if self.is_sharded or self.asks_ranks:
            return
        self._models, self._trainer = loaded.frozen, loaded.trainer
        if loaded.reference is not None and not self.run.config.reference_shares_trunk:
            self._kept["reference"] = loaded.reference
        if len(loaded.rewards) == len(self.run.config.reward.components):
            self._kept["reward_components"] = loaded.rewards

    def use_threads(self, num_threads: int) -> None:
        """Compute with another number of threads than the run: what comes out may be another number, too."""
        self._num_threads = num_threads

    def keep_rewards(self, components: Sequence[Component]) -> None:
        """Let these score, instead of those that the config names."""
        self._kept["reward_components"] = list(components)
        self.has_given_rewards = True

    def keep_trainer(self, trainer: Trainer) -> None:
        """Take over a trainer, instead of finding it again from checkpoint and updates."""
        self._trainer = trainer

    @property
    def tokenizer(self) -> PolicyTokenizer:
        """The policy's tokenizer."""
        return self.plan.tokenizer

    @property
    def reference(self) -> LanguageModel:
        """π_ref, frozen; with LoRA on the trunk of whichever trainer is in memory, since that is the same for all."""
        config = self.run.config
        if not config.reference_shares_trunk:
            return self._frozen("reference", lambda: load_reference(config, self.device, None, self._models))
        with self._lock:
            if self._behaviour is not None:
                return load_reference(config, self.device, self._behaviour[1].policy)
            if self.asks_ranks:
                return load_reference(config, self.device, self._first_behaviour().policy)
            if self._trainer is None:
                self._trainer = self._nearest_checkpoint(self.run.num_finished())
            return load_reference(config, self.device, self._trainer.actor_critic.policy)

    @property
    def reward_components(self) -> list[Component]:
        """What scores: frozen models r_θ, functions and services."""

        def load() -> list[Component]:
            vocabulary = vocabulary_digest(self.tokenizer.tokenizer)
            return [
                load_component(
                    component,
                    field=f"reward.components.{i}",
                    columns=self.run.config.prompts.columns,
                    policy_vocabulary=vocabulary,
                    device=self.device,
                    frozen=self._models,
                    template_date=self.run.config.prompts.template_date,
                )
                for i, component in enumerate(self.run.config.reward.components)
            ]

        return self._frozen("reward_components", load)

    def stage_done(self, stage: str) -> None:
        """Send a stage's frozen models away until they are needed again, as ``frozen_models`` says."""
        name = {"score_rewards": "reward_components", "reference_logprobs": "reference"}.get(stage)
        if name is None or self.run.config.frozen_models == "keep":
            return
        with self._lock:
            if self.run.config.frozen_models == "disk":
                self._kept.pop(name, None)
            elif name in self._kept:
                move_models(self._kept[name], torch.device("cpu"))

    def trainer(self, iteration: int) -> Trainer:
        """Policy, critic and optimizer after ``iteration`` updates. Raises IntegrityError if they differ from then."""
        with self._lock:
            if not self.run.config.execution.overlap:
                self._behaviour = None
            there = None if self._trainer is None else self._trainer.iteration
            if there is not None and (there > iteration or (self.asks_ranks and there < iteration)):
                self._trainer = None  # before the next one is loaded: there is room for one
            trainer = self._trainer or self._nearest_checkpoint(iteration)
            while trainer.iteration < iteration:
                self._replay_update(trainer)
            self._trainer = trainer
            return trainer

    def behaviour(self, iteration: int) -> ActorCritic:
        """Policy and critic that answer an iteration's prompts, to be read alone: as handed out, where they were.

        Raises: IntegrityError if that is not what the iteration is answered with.
        """
        with self._lock:
            digest, handed = self.behaviour_digest(iteration), handed_weights(self.run.path, iteration)
            updates = iteration - self.run.updates_behind(iteration)
            if self.asks_ranks:
                self.hand_out(iteration)
                if digest == "initial":
                    return self._first_behaviour()
            elif self._trainer is not None and self._trainer.iteration == updates:
                return self._trainer.actor_critic
            elif not handed.is_dir():
                return self.trainer(updates).actor_critic
            if self._behaviour is None:
                trainer = self._trainer
                if trainer is None or self.run.config.execution.overlap:  # whose trainer goes on from the newest
                    self._behaviour = ("", self._same_files(ActorCritic.initial(self.run.config, self.device)))
                else:
                    self._trainer, self._behaviour = None, ("", trainer.actor_critic)
            if self._behaviour[0] != digest:
                take_up(handed, self._behaviour[1], digest)
                self._behaviour = (digest, self._behaviour[1])
            return self._behaviour[1]

    def hand_out(self, iteration: int) -> None:
        """Write the weights that answer an iteration's prompts for other processes, which begin with the config's."""
        digest, handed = self.behaviour_digest(iteration), handed_weights(self.run.path, iteration)
        if digest == "initial":
            return
        if self.asks_ranks:
            if not is_handed_out(handed, digest):
                self.ask_ranks("hand_out", iteration)
            adopt(handed)
        elif not is_handed_out(handed, digest):
            with using_threads(self.num_threads):
                trainer = self.trainer(iteration - self.run.updates_behind(iteration))
                hand_out(handed, trainer.actor_critic, digest, trainer.ranks)

    def ask_ranks(self, what: str, iteration: int, **more: Any) -> dict[str, Any]:
        """Let all ranks do something with the trainer of an iteration. Returns: what the first of them answers."""
        update = self.run.config.execution.update
        run = {"path": str(self.run.path.resolve()), "record": self.run.record()}
        group = rank_group(update, self.device.type, update.rank_threads(self.num_threads))
        return group.call({"do": what, "iteration": iteration, "run": run, **more})

    def save(self, iteration: int, path: Path) -> None:
        """Commit the state before an iteration as a checkpoint folder."""
        if self.asks_ranks:
            self.ask_ranks("save", iteration, path=str(path))
            adopt(path)
            return
        with using_threads(self.num_threads):
            save_checkpoint(
                path,
                self.trainer(iteration),
                self.tokenizer.tokenizer,
                self.run.state_before(iteration),
                identity=self.run.identity_digest_at(iteration),
                merge_adapter=self.run.config.policy.lora.save == "merged",
            )

    def forget_trainer(self) -> None:
        """Drop the trainer in memory, after a failed update may have left it half-way."""
        self._trainer = None

    def next_prompts(self, cursor: Cursor) -> StageResult[Prompts]:
        """The prompts of the iteration that begins where the cursor stands."""
        return sample_prompts(
            self.plan.prompt_set,
            self.tokenizer,
            self.run.config.prompts,
            cursor=cursor,
            seed=self.run.config.seed,
            max_prompt_len=self.plan.max_prompt_len,
        )

    def prompts(self, ref: ArtifactRef) -> Prompts:
        """The prompts of an artifact."""
        prompts = Prompts.from_table(read_artifact(self.run.path, ref))
        check_vocabulary(prompts.prompt_ids, prompts.tokens_QP, self.plan.vocab_size)
        return prompts

    def rollouts(self, ref: ArtifactRef, prompts: Prompts) -> Rollouts:
        """The rollouts of an artifact."""
        rollouts = Rollouts.from_table(read_artifact(self.run.path, ref), prompts)
        check_vocabulary(rollouts.sample_ids, rollouts.tokens_BR, self.plan.vocab_size)
        return rollouts

    def scores(self, ref: ArtifactRef) -> Scores:
        """The scores of an artifact."""
        return Scores.from_table(read_artifact(self.run.path, ref))

    def reference_logprobs(self, ref: ArtifactRef) -> ReferenceLogprobs:
        """The reference log-probs of an artifact."""
        return ReferenceLogprobs.from_table(read_artifact(self.run.path, ref))

    def experience(self, ref: ArtifactRef) -> Experience:
        """The experience of an artifact."""
        return Experience.from_table(read_artifact(self.run.path, ref))

    def _nearest_checkpoint(self, iteration: int) -> Trainer:
        earlier = [i for i in self.run.checkpoints() if i <= iteration]
        if self.asks_ranks and (earlier[-1] if earlier else 0) < iteration:
            return self._trainer_of_ranks(iteration)
        if earlier:
            path = self.run.checkpoint_path(earlier[-1])
            trainer = load_checkpoint(path, self.run.config, self.device, identities=self.run.identities)[0]
        else:
            trainer = new_trainer(self.run.config, self.device)
        self._same_files(trainer)
        return trainer if self.ranks is None else shard_trainer(trainer, self.run.config, self.ranks)

    def _trainer_of_ranks(self, iteration: int) -> Trainer:
        """Exactly theirs: computed again by them, through a checkpoint that is not kept."""
        with tempfile.TemporaryDirectory(prefix="rlhf-state-") as folder:
            path = Path(folder) / self.run.checkpoint_path(iteration).name
            self.save(iteration, path)
            return load_checkpoint(path, self.run.config, self.device)[0]

    def _first_behaviour(self) -> ActorCritic:
        """Policy and critic in memory, whatever their weights; as they are before the first iteration if need be."""
        if self._behaviour is None:
            self._behaviour = ("initial", self._same_files(ActorCritic.initial(self.run.config, self.device)))
        return self._behaviour[1]

    def _replay_update(self, trainer: Trainer) -> None:
        """Compute a committed update again from its artifacts."""
        iteration, config = trainer.iteration, self.run.config
        manifests = self.run.manifests(iteration)
        if "ppo_update" not in manifests:
            raise IntegrityError(f"iteration {iteration} of {self.run.path} has no committed update to start from")
        prompts = self.prompts(manifests["sample_prompts"].artifact)
        ppo_update(
            trainer,
            prompts,
            self.rollouts(manifests["generate"].artifact, prompts),
            self.experience(manifests["shape_rewards"].artifact),
            config.ppo,
            temperature=config.generation.temperature,
            max_response_len=config.generation.max_new_tokens,
            seed=config.seed,
            iteration=iteration,
            num_iterations=self.run.num_iterations_at(iteration),
            importance_cap=config.importance_cap,
        )
        check_replayed(self.run, trainer, iteration, manifests["ppo_update"].inputs["policy_after"])

    def _frozen(self, name: str, make: Callable[[], Value]) -> Value:
        """Frozen models, back on the device wherever they were."""
        with self._lock:
            models = self._once(name, make)
            if self.run.config.frozen_models == "cpu":
                move_models(models, self.device)
            return models

    def _same_files(self, loaded: Value) -> Value:
        if self.needs_same_files:
            check_files(self.run.config, self.run.identity)
        return loaded

    def _once(self, name: str, make: Callable[[], Value]) -> Value:
        with self._lock:
            if name not in self._kept:
                self._kept[name] = self._same_files(make())
            return cast("Value", self._kept[name])


@functools.lru_cache(maxsize=2)
def resources(run_dir: str) -> Resources:
    """The resources of a run folder, loaded at first use and kept for the process's life."""
    torch.set_grad_enabled(True)
    settle_memory()
    return Resources(RunFolder.open(Path(run_dir)))
