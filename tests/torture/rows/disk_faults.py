"""A disk that is full, read-only, over quota or broken, at every operation of a run; and real ones that are.

Each fault must end the run with a StorageError in one sentence, leave whatever was promised before, and be forgotten
once the disk is well again: the same command then ends with the same hash. What is left after different faults often
looks alike to a reader; each look is resumed once.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torture.battery import Effort, Outcome
from torture.namespaces import enter_namespace, mount_tmpfs
from torture.power import (
    FOLDER,
    Contents,
    Model,
    RecordingDisk,
    contents_of,
    digest_of,
    everywhere,
    materialise,
    read_trace,
    record,
    visible,
)
from torture.runs import battery_config, fingerprint, in_child, start_or_go_on

from flows import calling, cli
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import canonical_json
from rlhf_core.contracts.errors import StorageError

NAME = "disk full, EIO, short write at every operation"
GOAL = "clear error, old commit intact, same hash after"
SENTENCE = re.compile(
    r"\S+ was not (written|removed|cleaned|read): .+; nothing (is lost|was changed): .+, "
    "then run the same again or resume"
)
SEED = 5
SHORT = -1
"""Instead of an error: the disk takes half of the bytes, and no more in the next call if the fault lasts."""
FULL, BROKEN, READ_ONLY, QUOTA = errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT
FAULTS = {
    "create": (FULL, QUOTA, READ_ONLY, BROKEN, errno.EMFILE),
    "write": (FULL, QUOTA, BROKEN, SHORT),
    "fsync": (BROKEN, FULL, QUOTA),
    "fsync of a folder": (BROKEN, FULL),
    "rename": (FULL, QUOTA, READ_ONLY, BROKEN),
    "symlink": (FULL, READ_ONLY, BROKEN),
    "mkdir": (FULL, READ_ONLY, BROKEN),
    "unlink": (READ_ONLY, BROKEN),
    "rmdir": (READ_ONLY, BROKEN),
    "lock": (FULL, READ_ONLY, errno.EACCES, BROKEN),
    "read": (BROKEN,),
}
"""Operation -> the errors that it may meet."""
BEGINNING, LATER = "beginning", "resumed"


@dataclass(frozen=True)
class Fault:
    """One error of one operation.

    Example: ``Fault("beginning", 17, "fsync", 5, lasts=False)``
    """

    phase: str
    """beginning: of a new run; resumed: of one that was killed in its second iteration."""
    at: int
    kind: str
    error: int
    lasts: bool
    """Every later operation that changes the disk fails too."""

    def __str__(self) -> str:
        name = "a short write" if self.error == SHORT else errno.errorcode[self.error]
        return f"{name} at operation {self.at} ({self.kind}, {self.phase}{', lasting' if self.lasts else ''})"


class FaultyDisk(RecordingDisk):
    """A disk on which one operation fails, and those after it if the fault lasts.

    Args:
        root, trace: of the recording.
        fault: None: all is well, and ``kinds`` says what could fail.
    """

    def __init__(self, root: Path, trace: Path, fault: Fault | None) -> None:
        super().__init__(root, trace)
        self.fault = fault
        self.kinds: list[str] = []
        self.failed_syncs: list[Path] = []
        self.synced_again: list[Path] = []

    def will(self, kind: str, path: Path) -> None:
        if not (path == self.root or self.root in path.parents):
            return
        at, fault = len(self.kinds), self.fault
        self.kinds.append(f"{kind} of a folder" if kind == "fsync" and path.is_dir() else kind)
        if kind == "fsync" and path in self.failed_syncs and path.is_file():
            self.synced_again.append(path)
        if fault is None or fault.error == SHORT or (kind == "read" and at != fault.at):
            return
        if at == fault.at or (fault.lasts and at > fault.at):
            if kind == "fsync":
                self.failed_syncs.append(path)
            raise OSError(fault.error, os.strerror(fault.error))

    def write(self, descriptor: int, data: memoryview) -> int:
        at, fault = len(self.kinds), self.fault
        if fault is not None and fault.error == SHORT and at >= fault.at:
            if at == fault.at:
                return super().write(descriptor, data[: max(1, len(data) // 2)])
            if fault.lasts:
                return 0
        return super().write(descriptor, data)


@dataclass
class Tried:
    """Faults so far."""

    count: int = 0
    passed: int = 0
    failures: list[str] = field(default_factory=list[str])
    looks: dict[str, tuple[Contents, list[str]]] = field(default_factory=dict[str, tuple[Contents, list[str]]])
    """Digest of what a reader sees after a fault -> one such disk, and the faults that end there."""
    sentences: dict[str, str] = field(default_factory=dict[str, str])
    """What a person reads, the path left out -> one fault that says so."""

    def judge(self, name: str, wrong: str) -> None:
        self.count += 1
        self.passed += not wrong
        if wrong:
            self.failures.append(f"{name}: {wrong}")


def measure(effort: Effort) -> Outcome:
    """Let each operation of a run fail in each way, then heal the disk and go on."""
    dice = random.Random(SEED)
    config = battery_config(effort.tiny)
    bench = Bench(config, effort.folder)
    tried = Tried()
    faults = [
        Fault(phase, at, kind, error, lasts)
        for phase in (BEGINNING, LATER)
        for at, kind in enumerate(bench.kinds[phase])
        for error in FAULTS[kind]
        for lasts in ((False, True) if error == SHORT else (bool((at + error) % 2),))
    ]
    chosen = faults if effort.full else _one_of_each(faults, dice)
    for number, fault in enumerate(chosen):
        effort.progress(number, len(chosen))
        bench.meet(fault, tried)
    looks = sorted(tried.looks.items())[: None if effort.full else 3]
    for number, (look, (contents, names)) in enumerate(looks, len(chosen)):
        effort.progress(number, len(chosen) + len(looks))
        wrong = bench.heal(contents, look)
        if wrong:
            tried.passed -= len(names)
            tried.failures.append(f"{names[0]} and {len(names) - 1} others: {wrong}")
    operations = tried.count
    for fault in dice.sample([f for f in faults if f.phase == LATER and f.error != SHORT], effort.size(1, 40)):
        tried.judge(f"rlhf resume, {fault}", bench.say(fault))
    commands = tried.count - operations
    real, missing = _real_disks(bench, effort, tried)
    return Outcome(
        tried=tried.count,
        passed=tried.passed,
        figure=(
            f"{operations:,} faults at the {len(bench.kinds[BEGINNING])} + {len(bench.kinds[LATER])} operations of a "
            f"new and a resumed run, {len(tried.looks)} different disks afterwards, each healed and resumed; "
            f"{commands} seen from the command line; {real} real ones (small tmpfs, read-only mount, file size limits)"
        ),
        goal_size=len(faults),
        failures=tried.failures[:10],
        numbers={
            "faults": operations,
            "looks": len(tried.looks),
            "commands": commands,
            "real": real,
            "real_not_possible": missing,
            "sentences": dict(sorted(tried.sentences.items())[:30]),
        },
    )


class Bench:
    """An undisturbed run to compare with, and a half one to begin from.

    Args:
        config: of all runs.
        folder: for everything.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.root, self.log, self.trace = folder / "disk", folder / "log", folder / "trace"
        self.kinds: dict[str, list[str]] = {}
        self.half: Contents = {}
        self.root.mkdir()
        self.kinds[BEGINNING] = self._kinds_of_a_run()
        self.expected = fingerprint(self.root / "run")
        self.half = _half_way(contents_of(self.root))
        self._reset(LATER)
        self.kinds[LATER] = self._kinds_of_a_run()

    def meet(self, fault: Fault, tried: Tried) -> None:
        """A run that meets a fault; what is wrong with how it ends is noted."""
        self._reset(fault.phase)
        report = self._run(fault)
        wrong, sentence = _judge(fault, report), str(report.get("sentence", ""))
        model = Model.of(self.half if fault.phase == LATER else {})
        for operation in read_trace(self.trace):
            model.say(operation)
        now = contents_of(self.root)
        wrong = wrong or next(iter(model.broken_promises(now)), "")
        tried.judge(str(fault), wrong)
        if sentence:
            tried.sentences.setdefault(re.sub(r"^\S*/", "", sentence), str(fault))
        if not wrong:
            tried.looks.setdefault(digest_of(visible(now)), (now, []))[1].append(str(fault))

    def heal(self, contents: Contents, look: str) -> str:
        """Go on from a disk that is well again. Returns: what is wrong, or nothing."""
        _empty(self.root)
        materialise(contents, self.root)
        if in_child(lambda: start_or_go_on(self.config, self.root / "run"), log=self.log):
            return f"does not go on ({look[:12]}): {self.log.read_text().splitlines()[-1]}"
        return "" if fingerprint(self.root / "run") == self.expected else f"goes on to other numbers ({look[:12]})"

    def say(self, fault: Fault) -> str:
        """What ``rlhf resume`` prints when it meets a fault. Returns: what is wrong with it, or nothing."""
        self._reset(LATER)
        told = self.folder / "told.json"
        told.unlink(missing_ok=True)

        def work() -> None:
            def at_once(flow: Any, *arguments: Any, **named: Any) -> Any:
                return flow.fn(*arguments, **named)

            everywhere(calling.run_flow, at_once)
            disk = FaultyDisk(self.root, self.trace, fault)
            status: object = "it ended well"
            with calling.without_prefect(), contextlib.redirect_stderr(io.StringIO()) as printed:
                try:
                    record(lambda: cli.main(["resume", str(self.root / "run")]), disk)
                except SystemExit as end:
                    status = end.code
            told.write_bytes(canonical_json({"status": str(status), "printed": printed.getvalue()}))

        if in_child(work, log=self.log):
            return f"a traceback: {self.log.read_text().splitlines()[-1]}"
        values = json.loads(told.read_text())
        printed = values["printed"].strip()
        lines = [line for line in printed.splitlines() if line.startswith("error: ")]
        if values["status"] != str(cli.EXIT_MISTAKE) or "Traceback" in printed:
            return f"exit code {values['status']}, printed {printed[-200:]!r}"
        return "" if len(lines) == 1 and SENTENCE.search(lines[0]) else f"printed {printed[-300:]!r}"

    def _kinds_of_a_run(self) -> list[str]:
        return self._run(None)["kinds"]

    def _run(self, fault: Fault | None) -> dict[str, Any]:
        """Start or resume in a child that meets a fault; what it reports."""
        told = self.folder / "told.json"
        told.unlink(missing_ok=True)
        self.trace.unlink(missing_ok=True)

        def work() -> None:
            disk, report = FaultyDisk(self.root, self.trace, fault), dict[str, Any]()
            try:
                record(lambda: start_or_go_on(self.config, self.root / "run"), disk)
                report["end"] = "done"
            except StorageError as error:
                report |= {"end": "told", "sentence": str(error)}
            except BaseException:
                report |= {"end": "raw", "traceback": traceback.format_exc()}
            report |= {"kinds": disk.kinds, "synced_again": [str(p) for p in disk.synced_again]}
            told.write_bytes(canonical_json(report))

        status = in_child(work, log=self.log)
        if status or not told.is_file():
            raise RuntimeError(f"a child that meets {fault} ended with {status}:\n{self.log.read_text()}")
        return json.loads(told.read_text())

    def _reset(self, phase: str) -> None:
        _empty(self.root)
        if phase == LATER:
            materialise(self.half, self.root)


def _one_of_each(faults: list[Fault], dice: random.Random) -> list[Fault]:
    """One for each kind of operation, with errors that pass: a second try would hide them; and a short write."""
    passing = [fault for fault in faults if not fault.lasts]
    groups = [[f for f in passing if f.kind == kind and f.error != SHORT] for kind in FAULTS]
    return [dice.choice(group) for group in (*groups, [f for f in passing if f.error == SHORT]) if group]


def _judge(fault: Fault, report: dict[str, Any]) -> str:
    """What is wrong with how a run ended, or nothing."""
    if report["synced_again"]:
        return f"fsync was tried again on {report['synced_again'][0]}"
    if report["end"] == "raw":
        return f"a raw error: {report['traceback'].strip().splitlines()[-1]}"
    if report["end"] == "done":
        return "" if fault.error == SHORT and not fault.lasts else "it ended as if nothing had failed"
    return "" if SENTENCE.fullmatch(report["sentence"]) else f"it says only: {report['sentence']}"


def _half_way(whole: Contents) -> Contents:
    """A finished run as it was in its second iteration, with what a kill leaves."""
    later = ("run/iterations/000002", "run/checkpoints", "run/before_after.json", "run/report.png",
             "run/view.html")  # fmt: skip
    kept = {
        path: value
        for path, value in whole.items()
        if not path.startswith(later) and not re.search(r"000001/0[3-6]_", path)
    }
    return kept | {
        "run/checkpoints": (FOLDER, b""),
        "run/iterations/000001/.03_scores.arrow.0a1b2c3d.tmp": ("torn", b"ARROW1"),
    }


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)


# ------------------------------------------------------------------------------------------- real disks


def _real_disks(bench: Bench, effort: Effort, tried: Tried) -> tuple[int, str]:
    """Runs on a small tmpfs, on one that turns read-only, and under limits of file sizes.

    Returns: how many, and why the mounts were not possible here.
    """
    before = tried.count
    needed = sum(len(data) for _, data in contents_of(bench.root).values())
    missing = "" if in_child(enter_namespace, log=bench.log) == 0 else bench.log.read_text().splitlines()[-1]
    sizes = [needed * i // effort.size(4, 40) for i in range(1, effort.size(3, 40))]
    for size in sizes if not missing else []:
        tried.judge(f"a tmpfs of {size} bytes", _on_mount(bench, f"size={size}"))
    for inodes in range(4, effort.size(5, 60), 3) if not missing else []:
        tried.judge(f"a tmpfs of {inodes} inodes", _on_mount(bench, f"size=64m,nr_inodes={inodes}"))
    if not missing:
        tried.judge("a read-only mount", _on_mount(bench, "size=64m", read_only=True))
    for limit in [2_000, 40_000, 400_000][: effort.size(1, 3)]:
        tried.judge(f"files of at most {limit} bytes", _under_limit(bench, limit))
    return tried.count - before, missing


def _on_mount(bench: Bench, options: str, *, read_only: bool = False) -> str:
    """What is wrong with a run on a small real disk, or nothing."""
    mount = bench.folder / "mount"
    mount.mkdir(exist_ok=True)

    def work() -> str:
        enter_namespace()
        mount_tmpfs(mount, options)
        if read_only:
            materialise(bench.half, mount)
            mount_tmpfs(mount, "", remount=True, read_only=True)
        wrong = _fails_clearly(lambda: start_or_go_on(bench.config, mount / "run"), bench.log)
        mount_tmpfs(mount, "size=256m,nr_inodes=10000", remount=True)
        return wrong or _goes_on(bench, mount / "run")

    return _said(bench, work)


def _under_limit(bench: Bench, limit: int) -> str:
    """What is wrong with a run that may write small files only, or nothing."""
    _empty(bench.root)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            start_or_go_on(bench.config, bench.root / "run")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    wrong = _fails_clearly(limited, bench.folder / "log")
    return wrong or _goes_on(bench, bench.root / "run")


def _fails_clearly(work: Callable[[], object], log: Path) -> str:
    log.unlink(missing_ok=True)
    if in_child(work, log=log) == 0:
        return "it ended as if nothing had failed"
    last = log.read_text().strip().splitlines()[-1] if log.is_file() else "nothing at all"
    named, _, sentence = last.partition(": ")
    return "" if named.endswith("StorageError") and SENTENCE.fullmatch(sentence) else f"it says: {last}"


def _goes_on(bench: Bench, run: Path) -> str:
    if in_child(lambda: start_or_go_on(bench.config, run), log=bench.log):
        return f"does not go on: {bench.log.read_text().splitlines()[-1]}"
    return "" if fingerprint(run) == bench.expected else "goes on to other numbers"


def _said(bench: Bench, work: Callable[[], str]) -> str:
    """What some work in a child returns."""
    answer = bench.folder / "answer"
    answer.unlink(missing_ok=True)
    if in_child(lambda: answer.write_text(work()), log=bench.log):
        return f"the test itself failed: {bench.log.read_text().splitlines()[-1]}"
    return answer.read_text()
