"""What a run keeps: one Arrow file a stage with its commit record, and folders that commit themselves.

A stage is committed by one rename: that of its manifest, written after its artifact. A reader takes the manifest
first, checks its seal, compares the sha256 before it parses a byte, then the exact schema, then every value
(``validate(full=True)``). Writing itself is :mod:`rlhf_core.contracts.durable`.

    RUN/iterations/000007/02_rollouts.arrow   Arrow IPC *file* format, schema and provenance in its metadata
    RUN/iterations/000007/02_rollouts.json    the manifest: name, sha256, rows, inputs, key, metrics, seconds

An artifact holds no clock, path or host: equal inputs give equal bytes, and the sha256 is an identity.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from rlhf_core.contracts.archive import MANIFESTS, Segment, find_segment
from rlhf_core.contracts.cleaned import Cleaned
from rlhf_core.contracts.config_io import canonical_json, digest_json
from rlhf_core.contracts.durable import hash_file, read_file, write_file, write_folder
from rlhf_core.contracts.errors import IntegrityError, NumericalError
from rlhf_core.contracts.ipc_sizes import read_plain_table
from rlhf_core.contracts.records import read_record, seal, write_record
from rlhf_core.contracts.schemas import SCHEMA_VERSION
from rlhf_core.contracts.stage_graph import FILE_STEMS, SCHEMAS
from rlhf_core.contracts.typed import typed
from rlhf_core.contracts.values import not_finite, wrong_values

META_PREFIX = "rlhf."
_DIVERGED = (
    "the weights have diverged or the scores are too large: begin again with a lower ppo.learning_rate, with "
    "shaping.score_clip, or with smaller weights of reward.components"
)
_LIKELY_CAUSE = {"sample_prompts": "look at the prompts of prompts.source and at their tokenizer"}


@dataclass(frozen=True)
class ArtifactRef:
    """What one stage hands to the next: a name and an identity, never the data.

    Example: ``ArtifactRef("generate", 7, "iterations/000007/02_rollouts.arrow", "9f2c...", 64)``
    """

    stage: str
    iteration: int
    path: str
    """Relative to the run folder."""
    sha256: str
    rows: int


@dataclass(frozen=True)
class Manifest:
    """The commit record of one stage."""

    artifact: ArtifactRef
    schema_version: int
    key: str
    """sha256 over everything the artifact depends on: :func:`stage_key`."""
    inputs: Mapping[str, str]
    """Name of each input -> its sha256."""
    seed: int
    identity: str
    """Digest of the run's identity."""
    metrics: Mapping[str, float]
    """Deterministic numbers for the tracker."""
    state: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the stage adds to the loop state (cursor, moments, β)."""
    timing: Mapping[str, float] = field(default_factory=dict[str, float])
    """Seconds and rates: measured, so not part of any identity."""


def stage_key(stage: str, iteration: int, identity: str, inputs: Mapping[str, str]) -> str:
    """sha256 over everything a stage's artifact depends on: a committed artifact of the same key is used again.

    Args:
        stage: its name.
        iteration: from 0.
        identity: digest of the run's identity.
        inputs: name -> digest of everything that it reads and that changes from iteration to iteration.
    """
    return digest_json(
        {"stage": stage, "version": SCHEMA_VERSION, "iteration": iteration, "run": identity} | dict(inputs)
    )


def artifact_path(iteration: int, stage: str) -> str:
    """Path of a stage's artifact, relative to the run folder."""
    return f"iterations/{iteration:06d}/{FILE_STEMS[stage]}.arrow"


def commit_stage(
    run_dir: Path,
    stage: str,
    iteration: int,
    table: pa.Table,
    *,
    key: str,
    inputs: Mapping[str, str],
    seed: int,
    identity: str,
    metrics: Mapping[str, float],
    state: Mapping[str, Any],
    timing: Mapping[str, float],
) -> Manifest:
    """Write a stage's artifact, then its manifest: the commit.

    Raises:
        ValueError: the table does not fit the stage's schema (a null, a missing column, another type).
        NumericalError: a value or metric that must not be kept; nothing is written then.
    """
    fitted = conform(table, stage)
    wrong = wrong_values(fitted, stage) or ", ".join(not_finite(metrics))
    if wrong:
        raise NumericalError(
            f"{stage} of iteration {iteration} has computed {wrong}; nothing of it is committed: resume to compute it "
            f"again; if it comes back, {_LIKELY_CAUSE.get(stage, _DIVERGED)}"
        )
    origin = provenance(stage, iteration, key=key, inputs=inputs, seed=seed, identity=identity)
    data = encode_table(fitted, origin)
    relative = artifact_path(iteration, stage)
    sha256 = write_file(run_dir / relative, data)
    manifest = Manifest(
        artifact=ArtifactRef(stage, iteration, relative, sha256, table.num_rows),
        schema_version=SCHEMA_VERSION,
        key=key,
        inputs=dict(inputs),
        seed=seed,
        identity=identity,
        metrics=dict(metrics),
        state=dict(state),
        timing=dict(timing),
    )
    write_record((run_dir / relative).with_suffix(".json"), asdict(manifest))
    return manifest


def provenance(
    stage: str, iteration: int, *, key: str, inputs: Mapping[str, str], seed: int, identity: str
) -> dict[str, str]:
    """What an artifact says of itself in its schema's metadata: the deciding part of its manifest."""
    return {
        "schema": f"{stage}/{SCHEMA_VERSION}",
        "iteration": str(iteration),
        "seed": str(seed),
        "inputs": canonical_json(dict(inputs)).decode(),
        "key": key,
        "identity": identity,
    }


def read_manifest(run_dir: Path, stage: str, iteration: int) -> Manifest | None:
    """The commit record of a stage, loose or archived; None while it is not committed.

    Raises:
        IntegrityError: the file is not a manifest of this stage and iteration.
    """
    path = (run_dir / artifact_path(iteration, stage)).with_suffix(".json")
    try:
        values = read_record(path)
    except FileNotFoundError:  # a loose iteration is removed after its archive is there, so this order misses none
        segment = find_segment(run_dir, iteration)
        if segment is None:
            return None
        path, values = segment.path / MANIFESTS, segment.record(stage, iteration)
    return parse_manifest(values, stage, iteration, origin=str(path))


def parse_manifest(values: Mapping[str, Any], stage: str, iteration: int, *, origin: str) -> Manifest:
    """The manifest of a stage from its record. Raises IntegrityError if it is another one's, or none."""
    try:
        manifest = typed(Manifest, dict(values))
    except ValueError as error:
        raise IntegrityError(f"{origin} is not a stage manifest: {error}") from None
    expected = (stage, iteration, artifact_path(iteration, stage))
    if (manifest.artifact.stage, manifest.artifact.iteration, manifest.artifact.path) != expected:
        raise IntegrityError(
            f"{origin} belongs to {manifest.artifact.stage} of iteration {manifest.artifact.iteration}"
        )
    if manifest.schema_version != SCHEMA_VERSION:
        raise IntegrityError(
            f"{origin} has schema version {manifest.schema_version}, this release reads {SCHEMA_VERSION}"
        )
    return manifest


def read_artifact(run_dir: Path, ref: ArtifactRef) -> pa.Table:
    """Read an artifact, loose or archived, after checking its digest, then its schema, then all its values.

    Raises:
        IntegrityError: missing, damaged (digest), foreign (schema) or invalid (values).
        StorageError: the disk does not give it.
    """
    path, data, segment = locate_artifact(run_dir, ref)
    is_vouched_for = segment is not None and segment.pyarrow != pa.__version__  # by the digest of the segment's file
    digest = hashlib.sha256(data).hexdigest()
    if digest != ref.sha256 and not is_vouched_for:
        raise IntegrityError(f"{path} is damaged: sha256 {digest[:12]}…, committed as {ref.sha256[:12]}…")
    try:
        schema, expected = pa.ipc.open_file(pa.BufferReader(data)).schema, SCHEMAS[ref.stage]
        if not schema.equals(expected):
            raise IntegrityError(
                f"{path} has another schema than {ref.stage} writes.\nexpected:\n{expected}\n"
                f"found:\n{schema.remove_metadata()}"
            )
        table = read_plain_table(data, expected)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise IntegrityError(f"{path} is not a valid Arrow file: {error}") from None
    wrong = wrong_values(table, ref.stage)
    if table.num_rows != ref.rows:
        wrong = f"{table.num_rows} rows where {ref.rows} were committed"
    if wrong:
        raise IntegrityError(
            f"{path} holds {wrong}: this release never writes such a file, though its digest is the committed one; "
            f"`rlhf resume {run_dir}` computes it again (with --repair where its iteration is finished)"
        )
    return table


def locate_artifact(run_dir: Path, ref: ArtifactRef) -> tuple[Path, bytes, Segment | None]:
    """An artifact's file, its bytes as its stage wrote them, not checked yet, and the segment if it is archived.

    Raises: IntegrityError if it is gone, or its segment is damaged.
    """
    path = run_dir / ref.path
    try:
        return path, read_file(path), None
    except FileNotFoundError:
        segment = find_segment(run_dir, ref.iteration)
        is_there, cleaned = segment is not None and segment.file(ref.stage).exists(), Cleaned.of(run_dir)
        if cleaned.lacks(ref.iteration) and not is_there:
            raise IntegrityError(
                f"{path} was removed by `rlhf clean` on {cleaned.date}, with all artifacts of iterations "
                f"{cleaned.artifacts_from} to {cleaned.artifacts_before - 1}; choose another iteration"
            ) from None
        if segment is None:
            raise IntegrityError(f"{path} is missing, though its stage is committed") from None
        return segment.file(ref.stage), encode_archived(segment, ref), segment


def conform(table: pa.Table, stage: str) -> pa.Table:
    """The table with exactly the stage's schema. Raises ValueError with both schemas if it does not fit."""
    expected = SCHEMAS[stage]
    try:
        fitted = table.select(expected.names).cast(expected).combine_chunks()
        for name, column in zip(fitted.column_names, fitted.columns, strict=True):
            _refuse_nulls(column.combine_chunks(), name)
        return fitted
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise ValueError(
            f"{stage} wrote a table that is not its schema: {error}\nexpected:\n{expected}\nfound:\n{table.schema}"
        ) from None


def _refuse_nulls(array: pa.Array, name: str) -> None:
    """Raise ValueError for a null at any depth: ``cast`` sees only those of whole columns."""
    if array.null_count:
        raise ValueError(f"{name} holds {array.null_count} nulls")
    if isinstance(array, pa.ListArray):
        _refuse_nulls(array.flatten(), f"an item of {name}")
    elif isinstance(array, pa.StructArray):
        for field, child in zip(array.type, array.flatten(), strict=True):
            _refuse_nulls(child, f"{name}.{field.name}")


def encode_archived(segment: Segment, ref: ArtifactRef) -> bytes:
    """The bytes of an artifact that was archived, as its stage committed them.

    Another pyarrow may encode the same values as other bytes: then the digest of the segment's file stands for them.

    Raises: IntegrityError if the segment is damaged, or holds another artifact of this stage and iteration.
    """
    stage, iteration = ref.stage, ref.iteration
    origin = str(segment.path / MANIFESTS)
    manifest = parse_manifest(segment.record(stage, iteration), stage, iteration, origin=origin)
    if manifest.artifact != ref:
        raise IntegrityError(f"{origin} has archived another {stage} of iteration {iteration} than was asked for")
    return encode_again(segment.table(stage, iteration).combine_chunks(), manifest)


def encode_again(table: pa.Table, manifest: Manifest) -> bytes:
    """The bytes of an artifact, from its table and its manifest."""
    ref = manifest.artifact
    origin = provenance(
        ref.stage,
        ref.iteration,
        key=manifest.key,
        inputs=manifest.inputs,
        seed=manifest.seed,
        identity=manifest.identity,
    )
    return encode_table(table, origin)


def encode_table(table: pa.Table, provenance: Mapping[str, str]) -> bytes:
    """The bytes of an Arrow IPC file with the provenance as schema metadata."""
    metadata = {META_PREFIX + name: value for name, value in provenance.items()}
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema.with_metadata(metadata)) as writer:
        writer.write_table(table)
    return sink.getvalue()


def commit_folder(path: Path, fill: Callable[[Path], None], record: Mapping[str, Any]) -> dict[str, str]:
    """Write a folder that commits itself: all of it appears at once, with the digest of every file.

    Args:
        path: must not exist yet.
        fill: writes the files into the folder it is given.
        record: what else its ``manifest.json`` says, beside ``files``.
    Returns: relative path of each file -> sha256.
    Raises: StorageError if the disk does not take it; nothing is then at ``path``.
    """
    return write_folder(path, fill, lambda digests: seal({**record, "files": digests}))


def check_folder(path: Path) -> dict[str, Any]:
    """The record of a folder written by :func:`commit_folder`, every file of it compared with its digest.

    Returns: the content of ``manifest.json``: ``files`` (relative path -> sha256) and the rest.
    Raises: IntegrityError if a file is missing, damaged, or was never committed.
    """
    manifest = path / "manifest.json"
    if not manifest.is_file():
        raise IntegrityError(f"{path} has no manifest.json: it was not committed")
    record = read_record(manifest)
    files: Any = record.get("files")
    if not isinstance(files, dict):
        raise IntegrityError(f"{manifest} is not the manifest of a folder")
    digests = cast("dict[str, str]", files)
    there = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_symlink() or not p.is_dir()}
    for name, expected in digests.items():
        file = path / name
        if name not in there or file.is_symlink():  # also a name that leads out of the folder
            raise IntegrityError(f"{file} is missing, though it was committed")
        if hash_file(file) != expected:
            raise IntegrityError(f"{file} is damaged: its sha256 is not the committed one")
    surplus = sorted(there - digests.keys() - {"manifest.json"})
    if surplus:
        raise IntegrityError(f"{path} holds what was never committed there: {', '.join(surplus[:5])}; move it away")
    return record
