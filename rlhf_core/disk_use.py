"""What a run will take on a disk: told before it begins, from its config, prompts and models' sizes.

Artifacts are not estimated by a formula beside the schemas, but measured: tables with as many rows and tokens as an
iteration may have are encoded, loose and as the archive does it. Responses of full length are assumed, and numbers
that do not compress, so that a run takes less rather than more.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from rlhf_core.contracts.archive import archive_schema
from rlhf_core.contracts.artifacts import conform, encode_table, provenance
from rlhf_core.contracts.compaction import COMPRESSION
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.loop_state import Cursor
from rlhf_core.contracts.stage_graph import SCHEMAS, STAGES
from rlhf_core.preflight import Plan
from rlhf_core.stages.sample_prompts import sample_prompts
from rlhf_core.viewer.page import run_page_bytes

MANIFESTS_BYTES: Final = 6_500
"""The six manifests of an iteration: names, digests and some fifty numbers."""
OTHERS_BYTES: Final = 200_000
"""The run's record, the figure and the report."""
TOP_P_SUPPORT: Final = 64
"""Tokens kept by top_p alone: unknown before, so a guess."""
SAMPLED_ELEMENTS: Final = 500_000
"""Numbers in the longest column of a table that is encoded for measure; larger ones are extrapolated by rows."""
FLOAT_BYTES: Final = 4
ADAM_BYTES: Final = 8


@dataclass(frozen=True)
class DiskUse:
    """Bytes, for responses of full length."""

    iteration: int
    """The artifacts and manifests of a loose iteration."""
    archived_iteration: int
    checkpoint: int
    loose: int
    """Iterations that are loose at a time, at most."""
    archived: int
    """Iterations in the archive at the end, at most."""
    checkpoints: int
    """At a time, at most: a new one is written before an old one is removed."""
    page: int
    """The page about the run."""

    @property
    def run(self) -> int:
        """All of the run at its largest."""
        kept = self.loose * self.iteration + self.archived * self.archived_iteration
        return kept + self.checkpoints * self.checkpoint + self.page + OTHERS_BYTES


def predict_disk_use(config: RunConfig, plan: Plan, *, response_len: int | None = None) -> DiskUse:
    """The disk use of a run.

    Args:
        config: of the run.
        plan: of the run.
        response_len: tokens of each response; default: ``generation.max_new_tokens``.
    """
    length = response_len or config.generation.max_new_tokens
    tables, scale = _tables(config, plan, length)
    keep, every = config.artifacts.keep_iterations, config.checkpoint.every
    iteration = archived = MANIFESTS_BYTES
    for stage, (one, some) in tables.items():
        rows = scale[stage]
        counts = one.num_rows, some.num_rows
        iteration += _extrapolated([_loose_bytes(stage, t) for t in (one, some)], *counts, rows)
        archived += _extrapolated([_archived_bytes(stage, t, keep or 1) for t in (one, some)], *counts, rows)
    loose = config.num_iterations if keep is None else min(config.num_iterations, 2 * keep)
    may_stop = config.guards.may_stop
    kept = max(config.checkpoint.keep_last, 1 + may_stop) + config.checkpoint.keep_best + may_stop
    return DiskUse(
        iteration=iteration,
        archived_iteration=archived,
        checkpoint=_checkpoint_bytes(config, plan),
        loose=loose,
        archived=config.num_iterations - loose,
        checkpoints=min(kept + 1, -(-config.num_iterations // every)),
        page=run_page_bytes(config.num_iterations, config.prompts.batch_size, length),
    )


def free_bytes(run_dir: Path) -> int:
    """Free space of the disk where a run folder is or will be."""
    there = run_dir.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def _tables(config: RunConfig, plan: Plan, length: int) -> tuple[dict[str, tuple[pa.Table, pa.Table]], dict[str, int]]:
    """A small and a larger table of each stage; and how many rows an iteration has."""
    prompts = sample_prompts(
        plan.prompt_set,
        plan.tokenizer,
        config.prompts,
        cursor=Cursor(),
        seed=config.seed,
        max_prompt_len=plan.max_prompt_len,
    ).batch
    prompt_table = conform(prompts.to_table(), "sample_prompts")
    bytes_a_token = sum(len(text.encode()) for text in prompts.texts) / max(1, int(prompts.mask_QP.sum()))
    generation, size = config.generation, len(plan.tokenizer.tokenizer)
    is_truncated = generation.top_k is not None or generation.top_p < 1
    kept = min(size, generation.top_k or TOP_P_SUPPORT) if is_truncated else 0
    lengths = {
        "response_text": round(length * bytes_a_token),
        "components": len(config.reward.components),
        "values": length if config.uses_critic else 0,
        "returns": length if config.uses_critic else 0,
        "support_tokens": length * kept,
        "support_lens": length if is_truncated else 0,
    }
    scale = dict.fromkeys(STAGES, config.prompts.batch_size)
    scale["sample_prompts"] = config.prompts.num_prompts
    scale["ppo_update"] = config.ppo.num_ppo_epochs * config.ppo.num_minibatches
    rng = np.random.default_rng(0)
    tables = {"sample_prompts": (prompt_table.slice(0, 1), prompt_table)}
    for stage in [stage for stage in STAGES if stage != "sample_prompts"]:
        longest = max(length, *lengths.values())
        some = max(2, min(64, SAMPLED_ELEMENTS // longest, scale[stage]))
        one, more = (_table(stage, rows, lengths, length, size, rng) for rows in (1, some))
        tables[stage] = one, more
    return tables, scale


def _table(
    stage: str, rows: int, lengths: Mapping[str, int], length: int, vocabulary: int, rng: np.random.Generator
) -> pa.Table:
    """A table of a stage's schema with incompressible content."""

    def numbers(kind: pa.DataType, count: int) -> pa.Array:
        if pa.types.is_floating(kind):
            return pa.array(rng.standard_normal(count).astype(np.float32), kind)
        if pa.types.is_integer(kind):
            return pa.array(rng.integers(0, vocabulary, count), kind)
        if pa.types.is_boolean(kind):
            return pa.array(rng.random(count) < 0.5)
        assert pa.types.is_struct(kind), kind
        return pa.StructArray.from_arrays([_texts("component", count), numbers(pa.float32(), count)], fields=list(kind))

    def column(field: pa.Field) -> pa.Array:
        if field.name == "response_text":
            letters = rng.choice(np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", np.uint8), (rows, lengths[field.name]))
            return pa.array([row.tobytes().decode() for row in letters])
        if pa.types.is_string(field.type):
            return _texts("length" if field.name == "finish_reason" else "i000000-p{:06d}-s0", rows)
        if pa.types.is_list(field.type):
            each = lengths.get(field.name, length)
            offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * each)
            return pa.ListArray.from_arrays(offsets, numbers(field.type.value_type, rows * each))
        return numbers(field.type, rows)

    return conform(pa.table({field.name: column(field) for field in SCHEMAS[stage]}), stage)


def _texts(form: str, count: int) -> pa.Array:
    return pa.array([form.format(i) for i in range(count)], pa.string())


def _loose_bytes(stage: str, table: pa.Table) -> int:
    digest = "0" * 64
    inputs: dict[str, str] = dict.fromkeys(("rollouts", "scores", "ref_logprobs", "state"), digest)
    return len(encode_table(table, provenance(stage, 0, key=digest, inputs=inputs, seed=0, identity=digest)))


def _archived_bytes(stage: str, table: pa.Table, segment: int) -> int:
    """What an iteration adds to the archive, with its share of a segment of so many."""
    numbers = pa.array(np.zeros(table.num_rows, np.int32))
    whole = pa.Table.from_arrays([numbers, *table.columns], schema=archive_schema(stage)).combine_chunks()
    sizes: list[int] = []
    for count in (1, 2):
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, whole.schema, options=COMPRESSION) as writer:
            for _ in range(count):
                writer.write_table(whole)
        sizes.append(len(sink.getvalue()))
    added = sizes[1] - sizes[0]
    return added + (sizes[0] - added) // segment


def _extrapolated(sizes: list[int], few: int, more: int, rows: int) -> int:
    """The size of ``rows`` rows from those of fewer."""
    slope = (sizes[1] - sizes[0]) / (more - few) if more > few else 0.0
    return round(sizes[0] + slope * (rows - few))


def _checkpoint_bytes(config: RunConfig, plan: Plan) -> int:
    """Policy, critic and optimizer as float32; the tokenizer as it is saved."""
    counts, uses_lora = plan.parameters, config.policy.uses_lora
    trained = counts["adapter"] if uses_lora else counts["policy"]
    critic = counts.get("critic", 0)
    saved = trained + critic
    if uses_lora and config.policy.lora.save == "merged":
        saved += counts["policy"]
    fast: Any = getattr(plan.tokenizer.tokenizer, "backend_tokenizer", None)
    tokenizer = 0 if fast is None else len(fast.to_str(True).encode())
    return FLOAT_BYTES * saved + ADAM_BYTES * (trained + critic) + tokenizer
