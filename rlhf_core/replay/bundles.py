"""One iteration of a run in one file: what it was computed from, what it gave, and a sealed list of both.

    manifest.json                     sealed: the iteration, what the models are, sha256 and bytes of each file
    run/run.json                      as the run has it, and so are
    run/iterations/000007/            its six artifacts with their manifests
    run/iterations/000006/06_update.json   the loop state that it starts from
    run/checkpoints/000007/           policy, critic and optimizer before it
    models/policy.model/ …            models, adapters and tokenizers that the config names
    prompts.jsonl                     the prompts that it draws

A plain zip without compression, entries in the order of their names and without clocks: equal content, equal bytes.
A seal shows damage, not who has made the file. So one from somebody else is read as what it may be: no name leads out
of the folder, no entry is a link, nothing grows when it is unpacked, every digest is compared before a byte is used.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
import stat
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

from rlhf_core.contracts.durable import hash_file, make_folder, move, sync
from rlhf_core.contracts.errors import IntegrityError, StorageError, UserError
from rlhf_core.contracts.records import seal, unseal
from rlhf_core.contracts.typed import typed

FORMAT: Final = "rlhf-bundle/1"
RECORD: Final = "manifest.json"
RUN: Final = "run"
MODELS: Final = "models"
PROMPTS: Final = "prompts.jsonl"
MAX_RECORD_BYTES: Final = 1 << 26
MAX_FILES: Final = 10_000
MAX_PROMPTS: Final = 1 << 26
"""Of a prompt source: their order is drawn in memory."""
_CHUNK: Final = 1 << 20
_SEGMENT: Final = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_NAME: Final = re.compile(rf"{RECORD}|{PROMPTS}|(?:{RUN}|{MODELS})(?:/{_SEGMENT}){{1,6}}")
_PLACE: Final = re.compile(rf"{MODELS}/{_SEGMENT}")
_MARK: Final = b"PK\x03\x04"
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)
_ZIP_FAULTS: Final = (
    zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, ValueError, NotImplementedError, RuntimeError, struct.error,
    OverflowError,
)  # fmt: skip


@dataclass(frozen=True)
class File:
    """One file of a bundle."""

    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class BundleRecord:
    """What a bundle says of itself."""

    format: str
    run: str
    """Name of the run folder it was taken from."""
    iteration: int
    vocab_size: int
    with_models: bool
    models: Mapping[str, str]
    """Field of the config -> folder in the bundle: ``{"policy.model": "models/policy.model"}``."""
    templates: Mapping[str, str]
    """Field of the config -> text of the chat template whose file it names."""
    prompt_rows: Sequence[int]
    """Rows of the prompt source that stand in prompts.jsonl, in its order."""
    num_prompts: int
    """Of the whole source."""
    files: Mapping[str, File]

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(file.num_bytes for file in self.files.values())

    def contents(self) -> list[dict[str, Any]]:
        """One row a part: its folder, how many files, their bytes."""
        parts: dict[str, list[File]] = {}
        for name, file in sorted(self.files.items()):
            folders = name.split("/")[:-1]
            depth = 2 if folders[:1] == [MODELS] else 3
            parts.setdefault("/".join(folders[:depth]) or name, []).append(file)
        return [
            {"part": part, "files": len(files), "bytes": sum(file.num_bytes for file in files)}
            for part, files in parts.items()
        ]


def write_bundle(out: Path, sources: Mapping[str, Path], record: BundleRecord) -> BundleRecord:
    """Write a bundle: all of it appears at once under its name.

    Args:
        out: the file, which must not exist yet.
        sources: name in the bundle -> file on the disk.
        record: what it says of itself, but for ``files``.
    Returns: the record with its files.
    Raises:
        UserError: there is a file of that name, or one that no bundle can hold.
        StorageError: the disk does not take it; nothing is then at ``out``.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out} is there already; choose another name, or remove it first")
    for name in sources:
        if not _NAME.fullmatch(name):
            raise UserError(f"{sources[name]} has a name that a bundle does not hold ({name!r}); rename that file")
    files = {name: File(hash_file(path), path.stat().st_size) for name, path in sorted(sources.items())}
    whole = BundleRecord(**{**vars(record), "files": files})
    make_folder(out.parent)
    temporary = out.with_name(f".{out.name[:200]}.{secrets.token_hex(4)}.tmp")
    try:
        with zipfile.ZipFile(temporary, "x", zipfile.ZIP_STORED, allowZip64=True) as archive:
            archive.writestr(_entry(RECORD), seal(asdict(whole)))
            for name, path in sorted(sources.items()):
                entry = _entry(name)
                entry.file_size = files[name].num_bytes
                with path.open("rb") as source, archive.open(entry, "w") as target:
                    if _copy(source, target) != files[name].sha256:
                        raise IntegrityError(f"{path} has changed while it was packed; try again")
        sync(temporary)
        move(temporary, out)
    except OSError as error:
        raise StorageError.of(error, out) from error
    finally:
        temporary.unlink(missing_ok=True)
    return whole


def unpack_bundle(path: Path, folder: Path) -> BundleRecord:
    """Unpack a bundle, whoever made it, and compare every digest.

    Args:
        path: the file.
        folder: an empty one.
    Raises:
        UserError: it is no bundle, of another release, or holds what none holds.
        IntegrityError: it is damaged.
    """
    with _opened(path) as (archive, entries):
        record = _read_record(path, archive, entries)
        free = shutil.disk_usage(folder).free
        if record.num_bytes > free:
            raise UserError(
                f"{path} holds {record.num_bytes} bytes, and the disk of {folder} has {free} free: free some, or let "
                "TMPDIR name a folder on another disk"
            )
        for name, expected in record.files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entries[name]) as source, target.open("xb") as file:
                if _copy(source, file) != expected.sha256:
                    raise IntegrityError(f"{path} is damaged: the sha256 of {name} is not the one in its manifest")
    return record


def read_bundle_record(path: Path) -> BundleRecord:
    """What a bundle says of itself, its seal and the list of its entries checked. Raises as :func:`unpack_bundle`."""
    with _opened(path) as (archive, entries):
        return _read_record(path, archive, entries)


def is_bundle(path: Path) -> bool:
    """Whether a path is a file, and so at best a bundle: a run is a folder."""
    return path.is_file()


@contextmanager
def _opened(path: Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """The archive and its entries by name, each of them such as :func:`write_bundle` makes them."""
    try:
        with path.open("rb") as file:
            if file.read(4) != _MARK:
                raise UserError(f"{path} is neither a run folder nor a bundle: `rlhf bundle` makes one")
        with zipfile.ZipFile(path) as archive:
            yield archive, _checked(path, archive.infolist())
    except OSError as error:
        raise StorageError.of(error, path, "read") from error
    except _ZIP_FAULTS as error:
        raise IntegrityError(
            f"{path} is damaged, cut off, or no bundle ({str(error) or type(error).__name__}); get it again"
        ) from None


def _checked(path: Path, infos: Sequence[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Refuse what a bundle never holds: other names, links, compression, the same bytes twice."""
    if len(infos) > MAX_FILES:
        raise UserError(f"{path} holds {len(infos)} entries; a bundle has at most {MAX_FILES}")
    if RECORD not in (info.orig_filename for info in infos):
        raise UserError(f"{path} is no bundle: it has no {RECORD}; `rlhf bundle` makes one")
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.orig_filename
        if not _NAME.fullmatch(name):
            raise UserError(f"{path} holds an entry named {name[:100]!r}, which no bundle has; nothing was unpacked")
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
            raise UserError(f"{path} holds {name}, which is a link or a device and no file; nothing was unpacked")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise UserError(
                f"{path} holds {name} compressed or encrypted; a bundle holds files as they are: nothing was unpacked"
            )
        if name in entries:
            raise UserError(f"{path} holds {name} twice; nothing was unpacked")
        entries[name] = info
    total, there = sum(info.file_size for info in infos), path.stat().st_size
    if total > there:
        raise UserError(f"{path} has {there} bytes and claims to hold {total}; nothing was unpacked")
    return entries


def _read_record(path: Path, archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo]) -> BundleRecord:
    if entries[RECORD].file_size > MAX_RECORD_BYTES:
        raise UserError(f"{path} has a {RECORD} of {entries[RECORD].file_size} bytes; at most {MAX_RECORD_BYTES}")
    values = unseal(archive.read(entries[RECORD]), origin=f"{RECORD} of {path}")
    if values.get("format") != FORMAT:
        raise UserError(f"{path} has the format {str(values.get('format'))[:40]!r}; this release reads {FORMAT}")
    try:
        record = typed(BundleRecord, values)
    except ValueError as error:
        raise IntegrityError(f"{RECORD} of {path} is not that of a bundle: {error}") from None
    fits = all(_PLACE.fullmatch(place) for place in record.models.values()) and record.run.isprintable()
    if not fits or not 0 <= record.num_prompts <= MAX_PROMPTS:
        raise IntegrityError(f"{RECORD} of {path} is not that of a bundle: it names what no bundle holds")
    if lost := sorted(record.files.keys() - entries.keys()):
        raise IntegrityError(f"{path} is damaged: {lost[0]} is missing")
    if surplus := sorted(entries.keys() - record.files.keys() - {RECORD}):
        raise IntegrityError(f"{path} holds {surplus[0]}, which its manifest does not name")
    for name, file in record.files.items():
        if entries[name].file_size != file.num_bytes:
            raise IntegrityError(f"{path} is damaged: {name} has {entries[name].file_size} bytes, not {file.num_bytes}")
    return record


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.compress_type = zipfile.ZIP_STORED
    entry.create_system = 3
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    return entry


def _copy(source: IO[bytes], target: IO[bytes]) -> str:
    """Copy to the end; returns the sha256 of what was copied."""
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        target.write(chunk)
    return digest.hexdigest()
