"""Stages by shards: what a worker computes, and how the parts become the batch that one process would have made.

A shard is a range of prompts with their responses. What a shard computes depends on the run, the stage's inputs and
the shard alone, not on who computes it: the artifact is the same whatever the number of workers, none included.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from rlhf_core.batch_metrics import failures, rollout_metrics, score_metrics
from rlhf_core.contracts.artifacts import ArtifactRef, conform, encode_table, stage_key
from rlhf_core.contracts.batches import Prompts, ReferenceLogprobs, Rollouts, Scores, StageResult
from rlhf_core.contracts.durable import write_file
from rlhf_core.contracts.loop_state import Cursor
from rlhf_core.contracts.shards import Part, Shard, commit_part, foreseen_path, read_part, worker_seconds
from rlhf_core.models.devices import using_threads
from rlhf_core.stages.generate import generate
from rlhf_core.stages.reference_logprobs import reference_logprobs
from rlhf_core.stages.score_rewards import score_rewards
from rlhf_core.store.helping import helping
from tasks.resources import Resources, resources

Refs = Sequence[ArtifactRef]
SHARDED = ("generate", "score_rewards", "reference_logprobs")
"""Stages that look at each response for itself."""


def stage_inputs(kept: Resources, stage: str, iteration: int, refs: Refs) -> dict[str, str]:
    """Name -> digest of everything that a stage reads and that changes from iteration to iteration."""
    if stage == "generate":
        return {"prompts": refs[0].sha256, "policy": kept.behaviour_digest(iteration)}
    return {"prompts": refs[0].sha256, "rollouts": refs[1].sha256}


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
        kept = resources(str(folder))
        key = _part_key(kept, stage, iteration, shard, refs)
        if read_part(kept.run.path, stage, iteration, shard, key=key) is None:
            began = time.time()
            part = _compute(kept, stage, iteration, shard, refs)
            commit_part(kept.run.path, stage, iteration, shard, replace(part, span_s=(began, time.time())), key=key)


def generated(kept: Resources, iteration: int, prompts: ArtifactRef, batch: Prompts) -> StageResult[Rollouts]:
    """The responses to all prompts of an iteration; ``batch`` is what the artifact holds."""
    if not kept.is_sharded:
        return _answer(kept, iteration, batch)
    parts = _parts(kept, "generate", iteration, (prompts,))
    rollouts = Rollouts.from_table(_joined(parts), batch)
    return StageResult(rollouts, rollout_metrics(rollouts), worker_s=worker_seconds(parts))


def scored(kept: Resources, iteration: int, refs: Refs) -> StageResult[Scores]:
    """The scores of all responses; ``refs``: prompts and rollouts."""
    if not kept.is_sharded or kept.has_given_rewards:
        return _score(kept, refs, None)
    parts = _parts(kept, "score_rewards", iteration, refs)
    names = kept.run.config.reward.names
    scores = Scores.from_table(_joined(parts), names)
    metrics = score_metrics(scores, failures(names, [part.metrics for part in parts]))
    return StageResult(scores, metrics, worker_s=worker_seconds(parts))


def referred(kept: Resources, iteration: int, refs: Refs) -> StageResult[ReferenceLogprobs]:
    """The reference's log-probs of all responses; ``refs``: prompts and rollouts."""
    if not kept.is_sharded:
        return _refer(kept, refs, None)
    parts = _parts(kept, "reference_logprobs", iteration, refs)
    return StageResult(ReferenceLogprobs.from_table(_joined(parts)), {}, worker_s=worker_seconds(parts))


def hand_out_weights(run_dir: str, iteration: int) -> None:
    """Write the weights that answer an iteration's prompts for the workers, who begin with those of the config."""
    resources(run_dir).hand_out(iteration)


def foresee_prompts(run_dir: str, iteration: int) -> ArtifactRef:
    """Write the prompts that an iteration will have once the one before is finished, for workers to answer ahead."""
    kept = resources(run_dir)
    sampled = kept.run.manifests(iteration - 1)["sample_prompts"]
    prompts = kept.next_prompts(Cursor(**sampled.state["cursor"])).batch
    path = foreseen_path(kept.run.path, iteration)
    sha256 = write_file(path, encode_table(conform(prompts.to_table(), "sample_prompts"), {}))
    rows = len(prompts.prompt_ids)
    return ArtifactRef("sample_prompts", iteration, str(path.relative_to(kept.run.path)), sha256, rows)


def _answer(kept: Resources, iteration: int, prompts: Prompts) -> StageResult[Rollouts]:
    config = kept.run.config
    return generate(
        kept.behaviour(iteration),
        kept.tokenizer,
        prompts,
        config.generation,
        samples_per_prompt=config.prompts.samples_per_prompt,
        seed=config.seed,
        iteration=iteration,
    )


def _score(kept: Resources, refs: Refs, rows: range | None) -> StageResult[Scores]:
    prompts, rollouts = _responses(kept, refs, rows)
    return score_rewards(kept.reward_components, prompts, rollouts, kept.run.config.reward)


def _refer(kept: Resources, refs: Refs, rows: range | None) -> StageResult[ReferenceLogprobs]:
    config, (prompts, rollouts) = kept.run.config, _responses(kept, refs, rows)
    temperature = config.generation.temperature
    return reference_logprobs(kept.reference, prompts, rollouts, config.reference, temperature=temperature)


def _responses(kept: Resources, refs: Refs, rows: range | None) -> tuple[Prompts, Rollouts]:
    """All prompts, and the responses to some of them, or to all."""
    prompts = kept.prompts(refs[0])
    rollouts = kept.rollouts(refs[1], prompts)
    return prompts, rollouts if rows is None else rollouts.of_prompts(rows)


def _compute(kept: Resources, stage: str, iteration: int, shard: Shard, refs: Refs) -> Part:
    rows, metrics = shard.rows(kept.run.config.prompts.num_prompts), {}
    with using_threads(kept.shard_threads):
        if stage == "generate":
            prompts = kept.prompts(refs[0]).rows(rows)
            table = _answer(kept, iteration, prompts).batch.to_table(prompts)
        else:
            result = (_score if stage == "score_rewards" else _refer)(kept, refs, rows)
            table, metrics = result.batch.to_table(), result.metrics
    return Part(conform(table, stage), metrics)


def _parts(kept: Resources, stage: str, iteration: int, refs: Refs) -> list[Part]:
    """Of every shard, in order: those that workers have committed; the others are computed here."""
    found: list[Part] = []
    for number in range(kept.run.config.execution.num_shards):
        shard = Shard(number, kept.run.config.execution.num_shards)
        key = _part_key(kept, stage, iteration, shard, refs)
        part = read_part(kept.run.path, stage, iteration, shard, key=key)
        found.append(part or _compute(kept, stage, iteration, shard, refs))
    return found


def _part_key(kept: Resources, stage: str, iteration: int, shard: Shard, refs: Refs) -> str:
    inputs = stage_inputs(kept, stage, iteration, refs)
    if stage == "generate":  # the same prompts, whether foreseen or committed, which adds where they come from
        inputs["prompts"] = hashlib.sha256(encode_table(kept.prompts(refs[0]).to_table(), {})).hexdigest()
    return stage_key(stage, iteration, kept.run.identity_digest_at(iteration), inputs | {"shard": str(shard)})


def _joined(parts: Sequence[Part]) -> pa.Table:
    return pa.concat_tables([part.table.replace_schema_metadata() for part in parts])
