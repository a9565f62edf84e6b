"""What workers hand back: parts of a stage's artifact, which its stage merges, commits and drops.

    RUN/shards/000007/02_rollouts.1-of-4.arrow    an Arrow file with the stage's schema
    RUN/shards/000007/02_rollouts.1-of-4.json     its record, written last: key, sha256, metrics
    RUN/shards/000007/weights/                    of policy and critic as they answer, for workers
    RUN/shards/000007/01_prompts.foreseen.arrow   the prompts, where they are answered before the iteration begins

Nothing here is a result: whatever is missing, damaged or of another key is computed again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from rlhf_core.contracts.artifacts import encode_table
from rlhf_core.contracts.durable import read_file, remove_folder, write_file
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.ipc_sizes import read_plain_table
from rlhf_core.contracts.records import read_record, write_record
from rlhf_core.contracts.stage_graph import FILE_STEMS, SCHEMAS

SHARDS = "shards"
"""The room of a run folder."""


@dataclass(frozen=True)
class Shard:
    """One of so many parts of a batch, counted from 0.

    Example: ``str(Shard(1, 4))`` is ``1-of-4``
    """

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}-of-{self.of}"

    def rows(self, count: int) -> range:
        """Its share of ``count`` rows; shares differ by one row at most, and stand in the order of the shards."""
        return range(self.number * count // self.of, (self.number + 1) * count // self.of)


@dataclass(frozen=True)
class Part:
    """What a shard of a stage came to."""

    table: pa.Table
    metrics: Mapping[str, float]
    span_s: tuple[float, float] = (0.0, 0.0)
    """When a worker began and ended, in seconds since 1970."""


def part_path(run_dir: Path, stage: str, iteration: int, shard: Shard) -> Path:
    """Of the Arrow file; its record stands beside it."""
    return run_dir / SHARDS / f"{iteration:06d}" / f"{FILE_STEMS[stage]}.{shard}.arrow"


def commit_part(run_dir: Path, stage: str, iteration: int, shard: Shard, part: Part, *, key: str) -> None:
    """Write a part, then its record."""
    path = part_path(run_dir, stage, iteration, shard)
    sha256 = write_file(path, encode_table(part.table, {"key": key}))
    record = {"key": key, "sha256": sha256, "metrics": dict(part.metrics), "span_s": list(part.span_s)}
    write_record(path.with_suffix(".json"), record)


def read_part(run_dir: Path, stage: str, iteration: int, shard: Shard, *, key: str) -> Part | None:
    """A part that was committed under this key; None if there is none, or none that is whole."""
    path = part_path(run_dir, stage, iteration, shard)
    try:
        record: dict[str, Any] = read_record(path.with_suffix(".json"))
        if record.get("key") != key:
            return None
        data = read_file(path)
        if hashlib.sha256(data).hexdigest() != record["sha256"]:
            return None
        table = read_plain_table(data)
        metrics, (began, ended) = cast("dict[str, float]", record["metrics"]), record["span_s"]
    except (FileNotFoundError, IntegrityError, KeyError, TypeError, ValueError, pa.ArrowException):
        return None
    return Part(table, metrics, (float(began), float(ended))) if _fits(table, stage) else None


def handed_weights(run_dir: Path, iteration: int) -> Path:
    """Folder of the weights that answer an iteration's prompts."""
    return run_dir / SHARDS / f"{iteration:06d}" / "weights"


def foreseen_path(run_dir: Path, iteration: int) -> Path:
    """Of the prompts that an iteration will have."""
    return run_dir / SHARDS / f"{iteration:06d}" / f"{FILE_STEMS['sample_prompts']}.foreseen.arrow"


def worker_seconds(parts: Iterable[Part]) -> float:
    """For how long at least one worker was at one of these parts."""
    total = until = 0.0
    for began, ended in sorted(part.span_s for part in parts):
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total


def drop_shards(run_dir: Path, iteration: int) -> None:
    """Remove what an iteration's workers needed and made, once all of it is committed."""
    if (folder := run_dir / SHARDS / f"{iteration:06d}").is_dir():
        remove_folder(folder)


def _fits(table: pa.Table, stage: str) -> bool:
    return table.schema.remove_metadata().equals(SCHEMAS[stage])
