"""Deaths by SIGKILL, and what must be true of a run folder after one."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from torture.runs import in_child, start_or_go_on

from rlhf_core.contracts.artifacts import check_folder, read_artifact
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.durable import Disk, is_leftover, using_disk
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.records import read_record
from rlhf_core.contracts.run_folder import RunFolder

KILLED = -signal.SIGKILL
Result = TypeVar("Result")


class MortalDisk(Disk):
    """Counts what changes the disk, writes down what it has made durable, and kills its process at one operation.

    Args:
        ledger: file of the promises: a line for each name that a power cut would no longer take away.
        at: the operation to die at, counted from 1, or the end of the path of a rename; None: immortal.
        after: die once the operation is done, instead of before it.
    """

    def __init__(self, ledger: Path, at: int | str | None = None, *, after: bool = False) -> None:
        self.ledger, self.at, self.after = ledger, at, after
        self.count = 0
        self._folders: dict[int, Path] = {}
        self._renamed: dict[Path, list[tuple[Path, str]]] = {}

    def _change(self, act: Callable[[], Result], target: Path | None = None) -> Result:
        self.count += 1
        dies = str(target).endswith(self.at) if isinstance(self.at, str) else self.count == self.at
        if dies and not self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = act()
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def create(self, path: Path) -> int:
        return self._change(lambda: Disk.create(self, path))

    def write(self, descriptor: int, data: memoryview) -> int:
        return self._change(lambda: Disk.write(self, descriptor, data))

    def open(self, path: Path) -> int:
        descriptor = super().open(path)
        self._folders.pop(descriptor, None)
        if path.is_dir():
            self._folders[descriptor] = path
        return descriptor

    def fsync(self, descriptor: int) -> None:
        self._change(lambda: Disk.fsync(self, descriptor))
        for path, digest in self._renamed.pop(self._folders.get(descriptor, Path()), []):
            self._note(path=str(path), sha256=digest)

    def rename(self, source: Path, target: Path) -> None:
        self._note(gone=[str(source), str(target)])
        committed = source / "manifest.json" if source.is_dir() else source
        digest = hashlib.sha256(committed.read_bytes()).hexdigest() if committed.is_file() else ""
        self._change(lambda: Disk.rename(self, source, target), target)
        if digest and not is_leftover(target):
            self._renamed.setdefault(target.parent, []).append((target, digest))

    def symlink(self, path: Path, target: str) -> None:
        self._change(lambda: Disk.symlink(self, path, target))

    def mkdir(self, path: Path) -> None:
        self._change(lambda: Disk.mkdir(self, path))

    def unlink(self, path: Path) -> None:
        self._note(gone=[str(path)])
        self._change(lambda: Disk.unlink(self, path))

    def rmdir(self, path: Path) -> None:
        self._note(gone=[str(path)])
        self._change(lambda: Disk.rmdir(self, path))

    def _note(self, **line: Any) -> None:
        descriptor = os.open(self.ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(descriptor, json.dumps(line).encode() + b"\n")
        os.close(descriptor)


def live(config: RunConfig, run_dir: Path, ledger: Path, at: int | str | None = None, *, after: bool = False) -> int:
    """Start or resume a run in a child that dies as a :class:`MortalDisk` does.

    Returns: -9 if it died, 0 if it finished before; 1 if it raised, with the traceback beside the run.
    """

    def work() -> None:
        with using_disk(MortalDisk(ledger, at, after=after)):
            start_or_go_on(config, run_dir)

    return in_child(work, log=log_of(run_dir))


def count_operations(config: RunConfig, run_dir: Path, ledger: Path) -> int:
    """Make a whole run; returns how many operations changed the disk. Raises RuntimeError if it does not finish."""
    counted = run_dir.with_suffix(".count")

    def work() -> None:
        disk = MortalDisk(ledger)
        with using_disk(disk):
            start_or_go_on(config, run_dir)
        counted.write_text(str(disk.count))

    if in_child(work, log=log_of(run_dir)):
        raise RuntimeError(log_of(run_dir).read_text())
    return int(counted.read_text())


def log_of(run_dir: Path) -> Path:
    """Where a child of :func:`live` leaves its traceback."""
    return run_dir.with_suffix(".log")


def last_words(run_dir: Path) -> str:
    """The last line of that traceback."""
    lines = log_of(run_dir).read_text().strip().splitlines() if log_of(run_dir).is_file() else []
    return lines[-1] if lines else "no word"


def promises(ledger: Path) -> dict[Path, str]:
    """What was durable when the last process died: path -> sha256 of it, or of a folder's manifest."""
    held: dict[str, str] = {}
    for line in ledger.read_text().splitlines() if ledger.is_file() else []:
        note = json.loads(line)
        for gone in note.get("gone", ()):
            held = {path: digest for path, digest in held.items() if not (path + "/").startswith(gone + "/")}
        if "path" in note:
            held[note["path"]] = note["sha256"]
    return {Path(path): digest for path, digest in held.items()}


def lost(held: dict[Path, str]) -> list[str]:
    """Promises that the folder does not keep: one sentence each."""
    problems: list[str] = []
    for path, digest in held.items():
        committed = path / "manifest.json" if path.is_dir() else path
        if not committed.is_file():
            problems.append(f"lost: {path.name} was durable and is gone")
        elif hashlib.sha256(committed.read_bytes()).hexdigest() != digest:
            problems.append(f"lost: {path.name} was durable with another content")
    return problems


def torn(run_dir: Path) -> list[str]:
    """Files under a committed name that are not whole: one sentence each."""
    problems: list[str] = []
    run = RunFolder.open(run_dir) if (run_dir / "run.json").is_file() else None
    for path in sorted(run_dir.glob("iterations/[0-9]*/*.arrow")):
        try:
            pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all().validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            problems.append(f"torn: {path.relative_to(run_dir)}: {error}")
    try:
        for folder in sorted(run_dir.glob("iterations/[0-9]*")) if run else []:
            assert run is not None
            for manifest in run.manifests(int(folder.name)).values():
                if (run_dir / manifest.artifact.path).parent.is_dir():
                    read_artifact(run_dir, manifest.artifact)
        for folder in sorted(run_dir.glob("checkpoints/[0-9]*")):
            check_folder(folder)
        for path in run_dir.glob("*.json"):
            if path.name != "before_after.json":
                read_record(path)
    except IntegrityError as error:
        problems.append(f"torn: {error}")
    report = run_dir / "before_after.json"
    if report.is_file():
        json.loads(report.read_text())
    return problems


def inodes(held: dict[Path, str]) -> dict[Path, int]:
    """Which file each durable stage manifest is: a stage that is computed again gets another one."""
    return {
        path: path.stat().st_ino for path in held if path.suffix == ".json" and path.parent.parent.name == "iterations"
    }


def done_again(before: dict[Path, int]) -> list[str]:
    """Stages that were durable and have been computed again all the same."""
    return [
        f"lost: {path.parent.name}/{path.name} was durable, and its stage was computed again"
        for path, inode in before.items()
        if path.is_file() and path.stat().st_ino != inode
    ]
