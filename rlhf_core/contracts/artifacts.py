"""The only module that reads and writes the files of a run.

A write is: temporary file in the same folder -> write -> flush -> fsync -> sha256 -> rename -> fsync of the
folder. A stage is committed by one rename: that of its manifest, written after its artifact. A reader takes
the manifest first, compares the sha256 before it parses a byte, then the exact schema, then every value
(``validate(full=True)``).

    RUN/iterations/000007/02_rollouts.arrow   Arrow IPC *file* format, schema and provenance in its metadata
    RUN/iterations/000007/02_rollouts.json    the manifest: name, sha256, rows, inputs, key, metrics, seconds

An artifact holds no clock, path or host: equal inputs give equal bytes, and the sha256 is an identity.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from rlhf_core.contracts.config_io import canonical_json
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.schemas import FILE_STEMS, SCHEMA_VERSION, STAGES

META_PREFIX = "rlhf."


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
    """sha256 over everything the artifact depends on: see ``tasks.stage``."""
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
    """
    provenance = {
        "schema": f"{stage}/{SCHEMA_VERSION}",
        "iteration": str(iteration),
        "seed": str(seed),
        "inputs": canonical_json(dict(inputs)).decode(),
        "key": key,
        "identity": identity,
    }
    data = encode_table(conform(table, stage), provenance)
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
    write_file((run_dir / relative).with_suffix(".json"), canonical_json(asdict(manifest)) + b"\n")
    return manifest


def read_manifest(run_dir: Path, stage: str, iteration: int) -> Manifest | None:
    """The commit record of a stage, or None while it is not committed.

    Raises:
        IntegrityError: the file is not a manifest of this stage and iteration.
    """
    path = (run_dir / artifact_path(iteration, stage)).with_suffix(".json")
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    values = read_json(text, origin=str(path))
    try:
        fields: dict[str, Any] = {**values, "artifact": ArtifactRef(**values["artifact"])}
        manifest = Manifest(**fields)
    except (TypeError, KeyError) as error:
        raise IntegrityError(f"{path} is not a stage manifest: {error}") from None
    expected = (stage, iteration, artifact_path(iteration, stage))
    if (manifest.artifact.stage, manifest.artifact.iteration, manifest.artifact.path) != expected:
        raise IntegrityError(f"{path} belongs to {manifest.artifact.stage} of iteration {manifest.artifact.iteration}")
    if manifest.schema_version != SCHEMA_VERSION:
        raise IntegrityError(
            f"{path} has schema version {manifest.schema_version}, this release reads {SCHEMA_VERSION}"
        )
    return manifest


def read_artifact(run_dir: Path, ref: ArtifactRef) -> pa.Table:
    """Read an artifact after checking its digest, then its schema, then all its values.

    Raises:
        IntegrityError: missing, damaged (digest), foreign (schema) or invalid (values).
    """
    path = run_dir / ref.path
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing, though its stage is committed") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != ref.sha256:
        raise IntegrityError(f"{path} is damaged: sha256 {digest[:12]}…, committed as {ref.sha256[:12]}…")
    try:
        table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise IntegrityError(f"{path} is not a valid Arrow file: {error}") from None
    expected = STAGES[ref.stage]
    if not table.schema.equals(expected):
        raise IntegrityError(
            f"{path} has another schema than {ref.stage} writes.\nexpected:\n{expected}\n"
            f"found:\n{table.schema.remove_metadata()}"
        )
    return table


def conform(table: pa.Table, stage: str) -> pa.Table:
    """The table with exactly the stage's schema. Raises ValueError with both schemas if it does not fit."""
    expected = STAGES[stage]
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


def encode_table(table: pa.Table, provenance: Mapping[str, str]) -> bytes:
    """The bytes of an Arrow IPC file with the provenance as schema metadata."""
    metadata = {META_PREFIX + name: value for name, value in provenance.items()}
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema.with_metadata(metadata)) as writer:
        writer.write_table(table)
    return sink.getvalue()


def read_json(data: bytes, *, origin: str) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no NaN, no duplicate keys. Raises IntegrityError."""

    def refuse(token: str) -> None:
        raise ValueError(f"{token} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key stands twice")
        return table

    try:
        value = json.loads(data.decode("utf-8"), parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{origin} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise IntegrityError(f"{origin} does not hold a JSON object")
    return cast("dict[str, Any]", value)


def write_file(path: Path, data: bytes) -> str:
    """Write a file durably and atomically; returns its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync(path.parent)
    return hashlib.sha256(data).hexdigest()


def write_folder(path: Path, fill: Callable[[Path], None]) -> dict[str, str]:
    """Write a folder durably and atomically: ``fill`` a temporary one, sync every file, rename.

    Args:
        path: the folder to appear, which must not exist yet.
        fill: writes the files into the folder it is given.
    Returns: relative path of each file -> sha256; also committed inside as ``manifest.json``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        fill(temporary)
        digests: dict[str, str] = {}
        for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
            digests[str(file.relative_to(temporary))] = hash_file(file)
            sync(file)
        write_file(temporary / "manifest.json", canonical_json({"files": digests}) + b"\n")
        for folder in [p for p in temporary.rglob("*") if p.is_dir()]:
            sync(folder)
        temporary.chmod(0o755)
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)
    return digests


def check_folder(path: Path) -> dict[str, str]:
    """Compare every file of a folder written by :func:`write_folder` with its digest. Raises IntegrityError."""
    manifest = path / "manifest.json"
    if not manifest.is_file():
        raise IntegrityError(f"{path} has no manifest.json: it is not a committed checkpoint")
    files: Any = read_json(manifest.read_bytes(), origin=str(manifest)).get("files")
    if not isinstance(files, dict):
        raise IntegrityError(f"{manifest} is not the manifest of a checkpoint")
    digests = cast("dict[str, str]", files)
    for name, expected in digests.items():
        file = path / name
        if not file.is_file():
            raise IntegrityError(f"{file} is missing from its checkpoint")
        if hash_file(file) != expected:
            raise IntegrityError(f"{file} is damaged: its sha256 is not the committed one")
    return digests


def write_link(path: Path, target: str) -> None:
    """Point a symbolic link at a target beside it, durably and atomically: readers find the old or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(path)
    sync(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a committed folder: renamed first, so that no reader meets half of it."""
    doomed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    path.replace(doomed)
    sync(path.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make a file, or the names inside a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
