"""Old iterations go into the archive: written, checked bit for bit, and only then removed where they were loose.

A kill in between leaves both; readers take the loose one, and the next pass removes it. What would not come back
with exactly the bytes that were committed stays loose. What is in the archive: :mod:`rlhf_core.contracts.archive`.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from rlhf_core.contracts.archive import (
    MANIFESTS,
    MAX_TABLE_BYTES,
    Segment,
    archive_schema,
    find_segment,
    read_segment,
    segment_path,
)
from rlhf_core.contracts.artifacts import (
    artifact_path,
    commit_folder,
    encode_again,
    encode_archived,
    parse_manifest,
    read_artifact,
)
from rlhf_core.contracts.durable import hash_file, is_leftover, read_file, remove_folder
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.records import unseal
from rlhf_core.contracts.stage_graph import FILE_STEMS, STAGES

COMPRESSION = pa.ipc.IpcWriteOptions(compression="zstd")


@dataclass(frozen=True)
class Damage:
    """What is wrong with a segment, and what of the run cannot be read for it."""

    path: Path
    sentence: str
    lost: Sequence[tuple[str, int]]
    """Stage and iteration of each artifact."""


def loose_iterations(run_dir: Path) -> list[int]:
    """Iterations that have a folder of their own, ascending."""
    folder = run_dir / "iterations"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal()) if folder.is_dir() else []


def write_segment(run_dir: Path, first: int, last: int) -> list[str]:
    """Put the loose iterations of a range into one new segment; they stay loose, too.

    Args:
        run_dir: a run whose lock this process holds.
        first: iteration.
        last: iteration; all up to it are finished.
    Returns: a sentence for each iteration that could not be taken.
    Raises:
        IntegrityError: none of them could; nothing is written.
        StorageError: the disk fails; nothing is written.
    """
    taken: list[int] = []
    left: list[str] = []

    def fill(folder: Path) -> None:
        with contextlib.ExitStack() as open_files:
            lines = open_files.enter_context((folder / MANIFESTS).open("wb"))
            tables = {
                stage: open_files.enter_context(
                    pa.ipc.new_file(
                        open_files.enter_context((folder / f"{stem}.arrow").open("wb")),
                        archive_schema(stage),
                        options=COMPRESSION,
                    )
                )
                for stage, stem in FILE_STEMS.items()
            }
            for iteration in range(first, last + 1):
                try:
                    found = {stage: _loose(run_dir, stage, iteration) for stage in STAGES}
                except IntegrityError as error:
                    left.append(f"iteration {iteration} stays out of the archive: {error}")
                    continue
                for stage, (line, batch) in found.items():
                    lines.write(line)
                    tables[stage].write_batch(batch)
                taken.append(iteration)
        if not taken:
            raise IntegrityError("\n".join(left))

    # commit_folder reads the record after it has called fill, so that it tells what was taken
    commit_folder(segment_path(run_dir, first, last), fill, {"iterations": taken, "pyarrow": pa.__version__})
    return left


def remove_archived(run_dir: Path, iteration: int) -> None:
    """Remove the loose folder of an iteration, once the archive gives the same bytes. The caller holds the lock.

    Raises: IntegrityError if it does not; the folder then stays.
    """
    folder = run_dir / "iterations" / f"{iteration:06d}"
    segment = find_segment(run_dir, iteration)
    if segment is None:
        raise IntegrityError(f"{folder} is not in the archive")
    _refuse_surplus(folder)
    for stage in STAGES:
        line = _line(folder, stage)
        loose, archived = (
            parse_manifest(unseal(data, origin=str(folder)), stage, iteration, origin=str(folder))
            for data in (line, segment.manifest(stage, iteration))
        )
        if replace(loose, timing={}) != replace(archived, timing={}):
            raise IntegrityError(f"{segment.path} has archived another {stage} than {folder} holds; remove one of them")
        if hashlib.sha256(encode_archived(segment, loose.artifact)).hexdigest() != loose.artifact.sha256:
            raise IntegrityError(f"{segment.file(stage)} does not give the bytes that {folder} has committed")
    remove_folder(folder)


def check_segment(path: Path) -> list[Damage]:
    """Read all of a segment again: its record, files, manifests, and every artifact in it. Nothing is cached.

    Returns: all that is damaged; nothing if it is whole.
    """
    try:
        segment = read_segment(path)
    except IntegrityError as error:
        first, _, last = path.name.partition("-")
        lost = [(stage, i) for i in range(int(first), int(last) + 1) for stage in STAGES]
        return [Damage(path, str(error), lost)]
    found = _surplus(segment)
    for stage in STAGES:
        file = segment.file(stage)
        everything = [(stage, iteration) for iteration in segment.iterations]
        try:
            is_whole = hash_file(file) == segment.files[file.name]
        except FileNotFoundError:
            found.append(Damage(file, f"{file} is missing, though it was committed", everything))
            continue
        if not is_whole:
            found.append(Damage(file, f"{file} is damaged: its sha256 is not the committed one", everything))
            continue
        for iteration in segment.iterations:
            try:
                _check_archived(segment, stage, iteration)
            except IntegrityError as error:
                found.append(Damage(file, str(error), [(stage, iteration)]))
    return found


def _loose(run_dir: Path, stage: str, iteration: int) -> tuple[bytes, pa.RecordBatch]:
    """Manifest and table of a loose artifact, if its bytes can be made again from them. Raises IntegrityError."""
    folder = run_dir / "iterations" / f"{iteration:06d}"
    _refuse_surplus(folder)
    line = _line(folder, stage)
    manifest = parse_manifest(unseal(line, origin=str(folder)), stage, iteration, origin=str(folder))
    table = read_artifact(run_dir, manifest.artifact).combine_chunks()
    path = run_dir / manifest.artifact.path
    if hashlib.sha256(encode_again(table, manifest)).hexdigest() != manifest.artifact.sha256:
        raise IntegrityError(f"{path} was written by another pyarrow, whose bytes this one does not make")
    if table.nbytes > MAX_TABLE_BYTES:
        raise IntegrityError(f"{path} holds {table.nbytes} bytes; at most {MAX_TABLE_BYTES} are archived")
    numbers = pa.array([iteration] * table.num_rows, pa.int32())
    whole = pa.Table.from_arrays([numbers, *table.columns], schema=archive_schema(stage)).combine_chunks()
    batches = whole.to_batches()
    return line, batches[0] if batches else pa.RecordBatch.from_pylist([], whole.schema)


def _line(folder: Path, stage: str) -> bytes:
    """The manifest of a loose artifact, byte for byte."""
    path = folder / f"{FILE_STEMS[stage]}.json"
    try:
        line = read_file(path)
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing, though its iteration is finished") from None
    if line.count(b"\n") != 1:
        raise IntegrityError(f"{path} is not one line of JSON")
    return line


def _refuse_surplus(folder: Path) -> None:
    """Raise IntegrityError if a loose iteration holds what no stage wrote: it would be removed with the rest."""
    known = {stem + end for stem in FILE_STEMS.values() for end in (".arrow", ".json")}
    if not folder.is_dir():
        raise IntegrityError(f"{folder} is missing")
    surplus = sorted(p.name for p in folder.iterdir() if p.name not in known and not is_leftover(p))
    if surplus:
        raise IntegrityError(f"{folder} holds what no stage writes: {', '.join(surplus[:5])}; move it away")


def _surplus(segment: Segment) -> list[Damage]:
    there = {str(p.relative_to(segment.path)): p for p in segment.path.rglob("*")}
    return [
        Damage(there[name], f"{there[name]} was never committed there; move it away", [])
        for name in sorted(there.keys() - segment.files.keys() - {"manifest.json"})
    ]


def _check_archived(segment: Segment, stage: str, iteration: int) -> None:
    """Raise IntegrityError unless an artifact comes out of a segment as it was committed."""
    origin = str(segment.path / MANIFESTS)
    manifest = parse_manifest(segment.record(stage, iteration), stage, iteration, origin=origin)
    digest = hashlib.sha256(encode_archived(segment, manifest.artifact)).hexdigest()
    if digest != manifest.artifact.sha256 and segment.pyarrow == pa.__version__:
        path = artifact_path(iteration, stage)
        raise IntegrityError(f"{segment.file(stage)} does not give {path} as it was committed")
