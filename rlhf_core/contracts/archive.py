"""Old iterations, many in one folder: how they are read. Written by :mod:`rlhf_core.contracts.compaction`.

    RUN/archive/000000-000099/01_prompts.arrow … 06_update.arrow   Arrow IPC *file*, zstd; one record batch an iteration
    RUN/archive/000000-000099/manifests.jsonl                      the iterations' manifests, as they were: 6 lines each
    RUN/archive/000000-000099/manifest.json                        sealed: iterations, sha256 of each file

A segment's table is its stage's with an ``iteration`` column before the others, so that pandas, polars, DuckDB and
`datasets` open it as one. An iteration taken out of it and encoded again has the sha256 that its stage committed:
nothing but its place has changed. The digest of a segment's file is checked before it is parsed, and what a record
batch would take in memory before it is decompressed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import pyarrow as pa

from rlhf_core.contracts.durable import hash_file, read_file
from rlhf_core.contracts.errors import IntegrityError, StorageError
from rlhf_core.contracts.ipc_sizes import batch_message, decompressed_bytes
from rlhf_core.contracts.records import read_record, unseal
from rlhf_core.contracts.stage_graph import FILE_STEMS, SCHEMAS, STAGES

FOLDER: Final = "archive"
MANIFESTS: Final = "manifests.jsonl"
ITERATION: Final = pa.field("iteration", pa.int32(), nullable=False)
MAX_TABLE_BYTES: Final = 1 << 30
"""What one iteration's table may take when decompressed; a larger artifact stays loose."""
_NAME: Final = re.compile(r"([0-9]{6,9})-([0-9]{6,9})")


@dataclass(frozen=True)
class Segment:
    """One folder of the archive, its record read and checked; its tables are checked as they are read."""

    path: Path
    iterations: tuple[int, ...]
    """Those it holds, ascending: all of its range, but for those that stayed loose."""
    files: Mapping[str, str]
    """Name -> sha256."""
    pyarrow: str
    """The version that wrote it: another one may encode equal values as other bytes."""
    lines: tuple[bytes, ...]
    """The sealed manifests, as they were: six an iteration, in flow order."""

    def manifest(self, stage: str, iteration: int) -> bytes:
        """A stage's manifest, byte for byte as it was committed."""
        return self.lines[self.iterations.index(iteration) * len(STAGES) + list(STAGES).index(stage)]

    def record(self, stage: str, iteration: int) -> dict[str, Any]:
        """The values of a stage's manifest. Raises IntegrityError if its seal is broken."""
        return unseal(self.manifest(stage, iteration), origin=f"{self.path / MANIFESTS} ({stage}, {iteration})")

    def file(self, stage: str) -> Path:
        """The file with a stage's tables."""
        return self.path / f"{FILE_STEMS[stage]}.arrow"

    def table(self, stage: str, iteration: int) -> pa.Table:
        """What a stage wrote in an iteration: the segment's digest checked, then sizes, schema and values.

        Raises:
            IntegrityError: missing, damaged, foreign, or larger than anything that is archived.
            StorageError: the disk does not give it.
        """
        path = self.file(stage)
        try:
            about = path.stat()
            digest = _digest(path, about.st_ino, about.st_mtime_ns, about.st_size)
        except FileNotFoundError:
            raise IntegrityError(f"{path} is missing, though it was committed") from None
        if digest != self.files[path.name]:
            raise IntegrityError(
                f"{path} is damaged: sha256 {digest[:12]}…, committed as {self.files[path.name][:12]}…"
            )
        try:
            return self._batch(path, stage, iteration)
        except (pa.ArrowException, ValueError) as error:
            raise IntegrityError(f"{path} is not the archive of a stage: {error}") from None
        except OSError as error:
            if error.errno is None:  # of Arrow, about what it reads
                raise IntegrityError(f"{path} is not the archive of a stage: {error}") from None
            raise StorageError.of(error, path, "read") from error

    def _batch(self, path: Path, stage: str, iteration: int) -> pa.Table:
        expected = archive_schema(stage)
        with path.open("rb") as file:
            reader = pa.ipc.open_file(file)
            if not reader.schema.equals(expected):
                raise ValueError(f"another schema.\nexpected:\n{expected}\nfound:\n{reader.schema.remove_metadata()}")
            if reader.num_record_batches != len(self.iterations):
                raise ValueError(f"{reader.num_record_batches} record batches for {len(self.iterations)} iterations")
            message = batch_message(file, self.iterations.index(iteration))
        needed = decompressed_bytes(message)
        if needed > MAX_TABLE_BYTES:
            raise ValueError(f"iteration {iteration} would take {needed} bytes; at most {MAX_TABLE_BYTES} are archived")
        batch = pa.ipc.read_record_batch(pa.ipc.read_message(pa.BufferReader(message)), expected)
        batch.validate(full=True)
        if set(batch.column(0).to_pylist()) - {iteration}:
            raise ValueError(f"the record batch of iteration {iteration} holds rows of another one")
        return pa.Table.from_batches([batch]).drop_columns([ITERATION.name])


def archive_schema(stage: str) -> pa.Schema:
    """The schema of a stage's table in the archive: the stage's own, with the iteration before it."""
    return pa.schema([ITERATION, *SCHEMAS[stage]])


def find_segment(run_dir: Path, iteration: int) -> Segment | None:
    """The segment that holds an iteration, or None. Raises IntegrityError if its record is damaged."""
    for first, last, path in segment_paths(run_dir):
        if first <= iteration <= last and iteration in (segment := open_segment(path)).iterations:
            return segment
    return None


def newest_archived(run_dir: Path) -> int | None:
    """The newest iteration in the archive of a run, or None. Raises IntegrityError if a record is damaged."""
    paths = segment_paths(run_dir)
    return open_segment(paths[-1][2]).iterations[-1] if paths else None


def segment_paths(run_dir: Path) -> list[tuple[int, int, Path]]:
    """First and last iteration of the range of each segment, and its folder; ascending."""
    folder = run_dir / FOLDER
    try:
        found = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    except FileNotFoundError:
        return []
    return sorted((int(match[1]), int(match[2]), path) for match, path in found)


def segment_path(run_dir: Path, first: int, last: int) -> Path:
    """The folder of the segment for a range of iterations, both ends included."""
    return run_dir / FOLDER / f"{first:06d}-{last:06d}"


def open_segment(path: Path) -> Segment:
    """The segment in a folder, parsed once while its files stay as they are. Raises IntegrityError if it is damaged."""
    known: list[int] = []
    for name in ("manifest.json", MANIFESTS):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            about = (path / name).stat()
            known += [about.st_ino, about.st_mtime_ns, about.st_size]
    return _segment(path, *known)


@functools.lru_cache(maxsize=32)
def _segment(path: Path, *_identity: int) -> Segment:
    return read_segment(path)


def read_segment(path: Path) -> Segment:
    """The segment in a folder, read anew. Raises IntegrityError if it is damaged."""
    try:
        record = read_record(path / "manifest.json")
    except (FileNotFoundError, NotADirectoryError):
        raise IntegrityError(f"{path} has no manifest.json: it was not committed") from None
    name = _NAME.fullmatch(path.name)
    iterations: Any = record.get("iterations")
    files: Any = record.get("files")
    is_record = name is not None and record.keys() == {"iterations", "pyarrow", "files"} and isinstance(files, dict)
    names = {MANIFESTS, *(f"{stem}.arrow" for stem in FILE_STEMS.values())}
    if not is_record or cast("dict[str, str]", files).keys() != names or not _ascend(iterations, name):
        raise IntegrityError(f"{path / 'manifest.json'} is not the record of an archive's segment")
    try:
        data = read_file(path / MANIFESTS)
    except FileNotFoundError:
        raise IntegrityError(f"{path / MANIFESTS} is missing, though it was committed") from None
    if hashlib.sha256(data).hexdigest() != files[MANIFESTS]:
        raise IntegrityError(f"{path / MANIFESTS} is damaged: its sha256 is not the committed one")
    lines = tuple(data.splitlines(keepends=True))
    if len(lines) != len(STAGES) * len(iterations):
        raise IntegrityError(f"{path / MANIFESTS} has {len(lines)} manifests for {len(iterations)} iterations")
    return Segment(path, tuple(iterations), files, str(record["pyarrow"]), lines)


def _ascend(iterations: Any, name: re.Match[str] | None) -> bool:
    """Whether these are iterations of the range that a segment is named after."""
    if name is None or not isinstance(iterations, list) or not iterations:
        return False
    found = cast("list[Any]", iterations)
    if not all(type(i) is int for i in found):
        return False
    return int(name[1]) <= found[0] and found[-1] <= int(name[2]) and found == sorted(set(found))


@functools.lru_cache(maxsize=256)
def _digest(path: Path, *_identity: int) -> str:
    """sha256 of a file, once while it stays as it is: what is taken out of it is compared with its own digest, too."""
    return hash_file(path)
