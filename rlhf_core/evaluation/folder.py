"""The folder of an evaluation, inside its run or apart. Every file is written atomically; equal settings, equal name.

    evaluation.json                 what is evaluated: config, identity, run; written first
    prompts.arrow                   the prompts, schema SAMPLE_PROMPTS
    parts/reference-000.arrow       responses of one policy, 32 a prompt (schema PART), with its commit record .json
    parts/000060-000.arrow          likewise, of the checkpoint before iteration 60; ``model`` for a bare model
    parts/000060@0.7-000.arrow      likewise, of what lies 0.7 of the way from the reference to it
    samples.arrow                   policy and reference side by side: same prompt, same dice
    frontier.arrow                  what is attainable: one row a β
    summary.json, evaluation.png    the numbers, and the picture

A part is committed by its record, after its file: it is used again while its key and its sha256 hold. The results
below it are written anew, from the parts alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import pyarrow as pa

from rlhf_core.contracts.artifacts import conform, encode_table
from rlhf_core.contracts.batches import Prompts
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config, digest_json
from rlhf_core.contracts.durable import write_file
from rlhf_core.contracts.errors import IntegrityError, UserError
from rlhf_core.contracts.ipc_sizes import read_plain_table
from rlhf_core.contracts.records import read_json, read_record, write_record
from rlhf_core.contracts.trust import recorded
from rlhf_core.evaluation.samples import PART, Samples, part_sizes
from rlhf_core.identity import identity_digest
from rlhf_core.inspection import last_of_user, with_asked

VERSION: Final = 1
EVALUATIONS: Final = "evaluations"
"""The room of a run folder that holds those of its checkpoints."""
RECORD: Final = "evaluation.json"
REFERENCE: Final = "reference"
MODEL: Final = "model"
BLENDED: Final = "@"
"""Between a policy's name and the share of the way from the reference to it, where that is less than 1."""

SIDE_BY_SIDE: Final[pa.Schema] = pa.schema(
    [
        pa.field("policy", pa.string(), nullable=False),  # 000060, 000060@0.7 or model: see above
        pa.field("prompt_id", pa.int64(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        pa.field("ref_response", pa.string(), nullable=False),  # of the reference, from the same random numbers
        pa.field("score", pa.float32(), nullable=False),
        pa.field("ref_score", pa.float32(), nullable=False),
        pa.field("kl", pa.float32(), nullable=False),  # k1 summed over the response; nats
        pa.field("k3", pa.float32(), nullable=False),
        pa.field("response_len", pa.int32(), nullable=False),  # tokens
        pa.field("ref_response_len", pa.int32(), nullable=False),
    ]
)
"""One row a response of a policy."""

FRONTIER: Final[pa.Schema] = pa.schema(
    [
        pa.field("beta", pa.float64(), nullable=False),  # infinity: the reference
        pa.field("kl", pa.float64(), nullable=False),  # mean over prompts; nats
        pa.field("score", pa.float64(), nullable=False),
        pa.field("score_by_half", pa.float64(), nullable=False),  # at the same KL, by half of the samples
        pa.field("ess", pa.float64(), nullable=False),  # effective samples a prompt, 1 / Σ w²
        pa.field("trusted", pa.bool_(), nullable=False),  # KL is low enough for the number of samples
    ]
)
"""One row a tilt of the reference, of increasing KL."""


@dataclass(frozen=True)
class EvaluationFolder:
    """An evaluation on disk: a reference that every task is given."""

    path: Path
    config: RunConfig
    identity: Mapping[str, Any]
    run_dir: Path | None
    """The run whose checkpoints are evaluated."""
    num_trained_on: int | None
    """Prompts that stand in the training source too."""

    @classmethod
    def create(cls, path: Path, record: Mapping[str, Any], prompts: Prompts) -> EvaluationFolder:
        """Begin, or find again, an evaluation of these settings. Raises UserError if the folder holds anything else."""
        check_free(path, record)
        write_file(path / "prompts.arrow", encode_table(conform(prompts.to_table(), "sample_prompts"), {}))
        write_record(path / RECORD, record)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> EvaluationFolder:
        """An evaluation that was begun. Raises UserError if the folder holds none."""
        if not (path / RECORD).is_file():
            raise UserError(f"{path} is not an evaluation: it has no {RECORD}")
        record = read_record(path / RECORD)
        if not isinstance(record.get("run"), str | None):
            raise IntegrityError(f"{path / RECORD} is not the record of an evaluation: its run is no path")
        try:
            config = build_config(record["config"])
            recorded(config, path)
            return cls(
                path,
                config,
                record["identity"],
                path / record["run"] if record["run"] is not None else None,
                record["num_trained_on"],
            )
        except KeyError as error:
            raise IntegrityError(f"{path / RECORD} is not the record of an evaluation: {error} is missing") from None

    def prompts(self) -> Prompts:
        """The prompts of the evaluation."""
        return Prompts.from_table(_parse((self.path / "prompts.arrow").read_bytes(), self.path / "prompts.arrow"))

    def key(self, digest: str, part: int, num_samples: int) -> str:
        """Everything a part depends on: settings and software, the policy's digest, and which samples."""
        settings = {"version": VERSION, "identity": identity_digest(self.identity), "policy": digest}
        return digest_json(settings | {"part": part, "num_samples": num_samples})

    def commit(self, policy: str, part: int, samples: Samples, key: str) -> None:
        """Write a part, then its record."""
        path = self._part(policy, part)
        sha256 = write_file(path, encode_table(samples.to_table(), {"policy": policy, "part": str(part), "key": key}))
        record = {"sha256": sha256, "key": key, "rows": len(samples.texts)}
        write_record(path.with_suffix(".json"), record)

    def has(self, policy: str, part: int, key: str) -> bool:
        """Whether a part is committed under this key, and intact."""
        try:
            return self._read(policy, part, key) is not None
        except IntegrityError:
            return False

    def samples(self, policy: str, digest: str, num_samples: int) -> Samples:
        """Committed samples of a policy. Raises IntegrityError if a part is missing or damaged."""
        tables: list[pa.Table] = []
        for part, size in enumerate(part_sizes(num_samples)):
            table = self._read(policy, part, self.key(digest, part, size))
            if table is None:
                raise IntegrityError(f"{self._part(policy, part)} is not committed")
            tables.append(table)
        return Samples.from_tables(tables, self.prompts().prompt_ids)

    def write_results(
        self, side_by_side: pa.Table, frontier: pa.Table, summary: Mapping[str, Any], picture: bytes
    ) -> None:
        """Write what a person reads; the summary last."""
        write_file(self.path / "samples.arrow", encode_table(side_by_side, {}))
        write_file(self.path / "frontier.arrow", encode_table(frontier, {}))
        write_file(self.path / "evaluation.png", picture)
        text = json.dumps(summary, indent=2, allow_nan=False, ensure_ascii=False)
        write_file(self.path / "summary.json", text.encode() + b"\n")

    def summary(self) -> dict[str, Any]:
        """The numbers. Raises UserError while they are not written."""
        path = self.path / "summary.json"
        if not path.is_file():
            raise UserError(f"{self.path} is not finished: it has no summary.json")
        return read_json(path.read_bytes(), origin=str(path))

    def frontier(self) -> list[dict[str, Any]]:
        """What is attainable, as rows of FRONTIER. Raises IntegrityError if the file is gone or damaged."""
        path = self.path / "frontier.arrow"
        if not path.is_file():
            raise IntegrityError(f"{path} is missing, though the evaluation is finished; evaluate again to write it")
        table = _parse(path.read_bytes(), path)
        if not table.schema.equals(FRONTIER):
            raise IntegrityError(f"{path} has another schema than the frontier of an evaluation")
        return table.to_pylist()

    def side_by_side(self, limit: int) -> list[dict[str, Any]]:
        """The first rows of samples.arrow, as :func:`rlhf_core.inspection.with_asked` shows prompts."""
        path, prompts = self.path / "samples.arrow", self.prompts()
        asked = dict(zip(prompts.prompt_ids, map(last_of_user, prompts.messages), strict=True))
        rows = _parse(path.read_bytes(), path).slice(0, limit).to_pylist()
        return with_asked(rows, [asked.get(row["prompt_id"], "") for row in rows])

    def _part(self, policy: str, part: int) -> Path:
        return self.path / "parts" / f"{policy}-{part:03d}.arrow"

    def _read(self, policy: str, part: int, key: str) -> pa.Table | None:
        path = self._part(policy, part)
        if not path.with_suffix(".json").is_file() or not path.is_file():
            return None
        record = read_record(path.with_suffix(".json"))
        if record.get("key") != key:
            return None
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != record.get("sha256"):
            raise IntegrityError(f"{path} is damaged: its sha256 is not the committed one")
        table = _parse(data, path)
        if not table.schema.equals(PART):
            raise IntegrityError(f"{path} has another schema than an evaluation's samples")
        return table


def split_name(policy: str) -> tuple[str, float]:
    """The name of what was trained, and the share of the way from the reference to it: 000060@0.7 -> 000060, 0.7."""
    name, _, share = policy.partition(BLENDED)
    return name, float(share) if share else 1.0


def new_record(
    path: Path, config: RunConfig, identity: Mapping[str, Any], run_dir: Path | None, num_trained_on: int | None
) -> dict[str, Any]:
    """What evaluation.json says."""
    return {
        "config": config.model_dump(),
        "identity": dict(identity),
        "run": None if run_dir is None else os.path.relpath(run_dir.resolve(), path.resolve()),
        "num_trained_on": num_trained_on,
    }


def check_free(path: Path, record: Mapping[str, Any]) -> None:
    """Raise UserError unless an evaluation of this record may begin, or go on, in the folder."""
    if not path.exists():
        return
    if path.is_dir() and (path / RECORD).is_file():
        there = read_record(path / RECORD)
        if there.get("identity") == record["identity"] and there.get("run") == record["run"]:
            return
        raise UserError(f"--out {path} holds an evaluation with other settings; choose a new folder")
    if not path.is_dir() or any(p.suffix != ".tmp" and p.name != "prompts.arrow" for p in path.iterdir()):
        raise UserError(f"--out {path} is not an empty folder; choose a new one")


def _parse(data: bytes, path: Path) -> pa.Table:
    try:
        table = read_plain_table(data)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise IntegrityError(f"{path} is not a valid Arrow file: {error}") from None
    return cast("pa.Table", table.replace_schema_metadata(None))
