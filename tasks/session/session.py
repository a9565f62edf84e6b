"""A run as a process works on it: the folder, the plan, and the models that the stages need.

Whatever is kept in memory is a cache of files and checkpoints, never a hidden input: it can be dropped at any time
and is found again from the run folder.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
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
from rlhf_core.contracts.config_io import digest_json
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.loop_state import Cursor, ScoreMoments
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.stage_graph import StageSpec
from rlhf_core.identity import check_files
from rlhf_core.memory import settle_memory
from rlhf_core.models.devices import resolve_device
from rlhf_core.models.tokenizers import PolicyTokenizer
from rlhf_core.ops.controller import next_state
from rlhf_core.preflight import Plan, load_plan
from rlhf_core.preflight.probe import Loaded
from rlhf_core.stages.sample_prompts import sample_prompts
from tasks.session.choices import policy_state, stage_work
from tasks.session.scoring_models import ScoringModels

Value = TypeVar("Value")


class Session:
    """One run in this process.

    Args:
        run: the run folder.
        device: that computes; None: the one that the config asks for.
    """

    def __init__(self, run: RunFolder, device: torch.device | None = None) -> None:
        self.run = run
        self.device = device or resolve_device(run.config.device)
        self.lock = threading.RLock()
        """Held while something in memory is loaded or replaced: two stages may run side by side."""
        self.needs_same_files = True
        """Whether models and rewards must be those of the run's identity; a replay may use others."""
        self.models = ScoringModels(self)
        self.policy = policy_state(self)
        self.work = stage_work(self)
        self._plan: Plan | None = None
        self._num_threads: int | None = None

    @property
    def num_threads(self) -> int:
        """CPU threads of the run: part of its identity."""
        return self._num_threads or int(cast("int", self.run.identity["num_threads"]))

    def use_threads(self, num_threads: int) -> None:
        """Compute with another number of threads than the run: the results may be other numbers, too."""
        self._num_threads = num_threads

    def threads_of(self, stage: str) -> int:
        """CPU threads of a stage: score_rewards and reference_logprobs share them where a model scores."""
        has_model = any(component.kind == "model" for component in self.run.config.reward.components)
        if stage == "score_rewards" or (stage == "reference_logprobs" and has_model):
            return max(1, self.num_threads // 2)
        return self.num_threads

    @property
    def plan(self) -> Plan:
        """The run's plan, with its prompts and tokenizer."""
        with self.lock:
            if self._plan is None:
                self._plan = self.same_files(load_plan(self.run.config))
            return self._plan

    def keep_plan(self, plan: Plan) -> None:
        """Use the plan of a check that was just made, instead of making it again."""
        self._plan = plan

    def keep_loaded(self, loaded: Loaded) -> None:
        """Use the models that a probe has loaded, where this process is the one that computes with them."""
        if self.policy.keeps_probed_models:
            self.policy.keep_trainer(loaded.trainer)
            self.models.keep_loaded(loaded)

    @property
    def tokenizer(self) -> PolicyTokenizer:
        """The policy's tokenizer."""
        return self.plan.tokenizer

    def policy_digest(self, iteration: int) -> str:
        """Digest of the weights before an iteration: as its predecessor committed them, or a drift gave them."""
        if (drift := self.run.drift_at(iteration)) is not None:
            return drift.weights
        if iteration == 0:
            return "initial"
        manifest = self.run.manifest("ppo_update", iteration - 1)
        if manifest is None:
            raise IntegrityError(f"iteration {iteration - 1} of {self.run.path} is not committed")
        return manifest.inputs["policy_after"]

    def behaviour_digest(self, iteration: int) -> str:
        """Digest of the weights that answer an iteration's prompts."""
        return self.policy_digest(iteration - self.run.updates_behind(iteration))

    def input_digests(self, spec: StageSpec, iteration: int, refs: Sequence[ArtifactRef]) -> dict[str, str]:
        """Name -> digest of everything that a stage reads and that changes from iteration to iteration.

        Args:
            spec: the stage.
            iteration: from 0.
            refs: the artifacts that it reads, in the order of ``spec.reads``.
        """
        digests = {name: ref.sha256 for name, ref in zip(spec.reads, refs, strict=True)}
        if "policy" in spec.inputs:
            samples = spec.name == "generate"
            digests["policy"] = self.behaviour_digest(iteration) if samples else self.policy_digest(iteration)
        if "state" in spec.inputs:
            digests["state"] = digest_json(self.run.state_before(iteration).to_json())
        return {name: digests[name] for name in spec.inputs}

    def next_loop_state(self, iteration: int) -> Mapping[str, Any]:
        """The loop state after an iteration, from what its stages have committed: cursor, moments, KL."""
        manifests = self.run.manifests(iteration)
        sampled, shaped = manifests["sample_prompts"], manifests["shape_rewards"]
        return next_state(
            self.run.state_before(iteration),
            self.run.config.kl,
            kl=shaped.metrics["objective/kl"],
            num_samples=shaped.artifact.rows,
            cursor=Cursor(**sampled.state["cursor"]),
            moments=ScoreMoments(**shaped.state["moments"]),
        ).to_json()

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

    def same_files(self, loaded: Value) -> Value:
        """What was just loaded. Raises IntegrityError if its files are no longer those of the run's identity."""
        if self.needs_same_files:
            check_files(self.run.config, self.run.identity)
        return loaded


@functools.lru_cache(maxsize=2)
def open_session(run_dir: str) -> Session:
    """The session of a run folder in this process: opened at first use and kept for the process's life."""
    torch.set_grad_enabled(True)
    settle_memory()
    return Session(RunFolder.open(Path(run_dir)))
