"""Stages by shards: what a worker computes, and how the parts become the batch that one process would have made.

A shard is a range of prompts with their responses. What a shard computes depends on the run, the stage's inputs and
the shard alone, not on who computes it: the artifact is the same whatever the number of workers, none included.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import pyarrow as pa

from rlhf_core.batch_metrics import failures, rollout_metrics, score_metrics
from rlhf_core.contracts.artifacts import ArtifactRef, conform, encode_table, stage_key
from rlhf_core.contracts.batches import ReferenceLogprobs, Rollouts, Scores, StageResult
from rlhf_core.contracts.durable import write_file
from rlhf_core.contracts.loop_state import Cursor
from rlhf_core.contracts.shards import Part, Shard, commit_part, foreseen_path, read_part, worker_seconds
from rlhf_core.contracts.stage_graph import STAGES
from rlhf_core.models.devices import using_threads
from rlhf_core.store.helping import helping
from tasks.session.session import open_session
from tasks.session.whole_stages import Refs, WholeStages
from tasks.shards.handed_policy import HandedPolicyState

SHARDED = ("generate", "score_rewards", "reference_logprobs")
"""Stages that look at each response for itself."""


class ShardedStages(WholeStages):
    """The same stages, joined from shards: those that workers have committed; the others are computed here."""

    def generate(self, iteration: int, refs: Refs) -> StageResult[Rollouts]:
        """The responses to all prompts; ``refs``: prompts."""
        parts = self._parts("generate", iteration, refs)
        rollouts = Rollouts.from_table(_joined(parts), self.session.prompts(refs[0]))
        return StageResult(rollouts, rollout_metrics(rollouts), worker_s=worker_seconds(parts))

    def score_rewards(self, iteration: int, refs: Refs) -> StageResult[Scores]:
        """The scores of all responses; ``refs``: prompts, rollouts."""
        if self.session.models.has_given_rewards:
            return super().score_rewards(iteration, refs)
        parts = self._parts("score_rewards", iteration, refs)
        names = self.session.run.config.reward.names
        scores = Scores.from_table(_joined(parts), names)
        metrics = score_metrics(scores, failures(names, [part.metrics for part in parts]))
        return StageResult(scores, metrics, worker_s=worker_seconds(parts))

    def reference_logprobs(self, iteration: int, refs: Refs) -> StageResult[ReferenceLogprobs]:
        """The reference's log-probs of all responses; ``refs``: prompts, rollouts."""
        parts = self._parts("reference_logprobs", iteration, refs)
        return StageResult(ReferenceLogprobs.from_table(_joined(parts)), {}, worker_s=worker_seconds(parts))

    def compute_part(self, stage: str, iteration: int, shard: Shard, refs: Refs) -> Part:
        """A shard of a stage, computed here."""
        execution, num_prompts = self.session.run.config.execution, self.session.run.config.prompts.num_prompts
        rows = shard.rows(num_prompts)
        with using_threads(execution.shard_threads(self.session.num_threads)):
            if stage == "generate":
                answered = self.answer(iteration, self.session.prompts(refs[0]).rows(rows))
                return Part(conform(answered.batch.to_table(), stage), {})
            prompts, rollouts = self.responses(refs)
            compute = self.score if stage == "score_rewards" else self.refer
            result = compute(prompts, rollouts.of_prompts(rows))
            return Part(conform(result.batch.to_table(), stage), result.metrics)

    def keys(self, stage: str, iteration: int, refs: Refs) -> Callable[[Shard], str]:
        """Shard -> the key under which its part counts; what all of them share is read once."""
        inputs = self.session.input_digests(STAGES[stage], iteration, refs)
        if stage == "generate":  # the same prompts, whether foreseen or committed, which adds where they come from
            prompts = self.session.prompts(refs[0])
            inputs["prompts"] = hashlib.sha256(encode_table(prompts.to_table(), {})).hexdigest()
        identity = self.session.run.identity_digest_at(iteration)
        return lambda shard: stage_key(stage, iteration, identity, inputs | {"shard": str(shard)})

    def _parts(self, stage: str, iteration: int, refs: Refs) -> list[Part]:
        """The parts of all shards, in order."""
        run, key_of = self.session.run, self.keys(stage, iteration, refs)
        count = run.config.execution.num_shards
        return [
            read_part(run.path, stage, iteration, shard, key=key_of(shard))
            or self.compute_part(stage, iteration, shard, refs)
            for shard in (Shard(number, count) for number in range(count))
        ]


def compute_part(stage: str, place: str, iteration: int, shard: Shard, refs: Refs) -> None:
    """Compute a shard and commit it, unless it is there. A worker's work; nothing but files comes back.

    Args:
        stage: that it is part of.
        place: where the worker finds the run, as :func:`rlhf_core.store.helping.compute_at` says.
        iteration: from 0.
        shard: which one.
        refs: the artifacts that the stage reads.
    """
    with helping(place, stage, iteration, shard) as folder:
        session = open_session(str(folder))
        work, run_dir = ShardedStages(session), session.run.path
        key = work.keys(stage, iteration, refs)(shard)
        if read_part(run_dir, stage, iteration, shard, key=key) is None:
            began = time.time()
            part = work.compute_part(stage, iteration, shard, refs)
            commit_part(run_dir, stage, iteration, shard, replace(part, span_s=(began, time.time())), key=key)


def hand_out_weights(run_dir: str, iteration: int) -> None:
    """Write the weights that answer an iteration's prompts for the workers, who begin with those of the config."""
    cast("HandedPolicyState", open_session(run_dir).policy).hand_out(iteration)


def foresee_prompts(run_dir: str, iteration: int) -> ArtifactRef:
    """Write the prompts that an iteration will have once the one before is finished, for workers to answer ahead."""
    session = open_session(run_dir)
    sampled = session.run.manifests(iteration - 1)["sample_prompts"]
    prompts = session.next_prompts(Cursor(**sampled.state["cursor"])).batch
    path = foreseen_path(session.run.path, iteration)
    sha256 = write_file(path, encode_table(conform(prompts.to_table(), "sample_prompts"), {}))
    rows = len(prompts.prompt_ids)
    return ArtifactRef("sample_prompts", iteration, str(path.relative_to(session.run.path)), sha256, rows)


def _joined(parts: Sequence[Part]) -> pa.Table:
    return pa.concat_tables([part.table.replace_schema_metadata() for part in parts])
