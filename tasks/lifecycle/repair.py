"""Repairing a run: what is damaged is computed again beside it, compared, and only then put in its place.

Every stage is a deterministic function of what is stored before it, so a lost artifact comes back with the sha256
that its manifest, or whoever read it, names. The work is done in a copy of the run folder made of hard links:
nothing of the run is touched before all of it has come back as it was.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_core.contracts.archive import open_segment, segment_paths
from rlhf_core.contracts.artifacts import ArtifactRef, Manifest, artifact_path, commit_folder, read_manifest
from rlhf_core.contracts.durable import hash_file, move, read_file, remove_file, settle, write_file
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.records import read_record
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.stage_graph import STAGES
from rlhf_core.verification.checkpoints import CheckpointCheck
from rlhf_core.verification.findings import Verification
from rlhf_core.verification.iterations import IterationCheck
from rlhf_core.verification.run import QUARANTINE, Progress, verify_run
from tasks.lifecycle.start import check_identity, save_state
from tasks.replay.shadow import compute_stage, manifest_path, take_out
from tasks.session.session import open_session

Item = tuple[int, str]
"""Iteration and stage."""


def repair_run(run_dir: str, progress: Progress | None = None) -> list[str]:
    """Bring a damaged run back to what it was, or leave it as it is.

    Args:
        run_dir: its folder.
        progress: told how far its verification is.
    Returns: one line for each thing that was done; none if the run is whole.
    Raises:
        IntegrityError: something cannot be recovered, or did not come back as it was; nothing was overwritten.
        DriftError: the conditions are not those of the run.
        RunLockedError: a process is working on it.
    """
    path = Path(run_dir)
    with _held(path):
        found = verify_run(path, is_held=True, progress=progress)
        lost = [finding for finding in found.obstacles if not finding.recoverable]
        if lost:
            lines = [f"{path} cannot be repaired; nothing was changed:"]
            lines += [f"  {finding.path} ({finding.kind}): {finding.problem}; {finding.remedy}" for finding in lost]
            raise IntegrityError("\n".join([*lines, _way_on(found)] if found.num_finished else lines))
        if not any(finding.is_repaired for finding in found.findings):
            return []
        run = RunFolder.open(path)
        check_identity(run, "repairing")
        try:
            done = _Repair(run, found).work()
        finally:
            open_session.cache_clear()
        settle(path, links=("checkpoints/last_good",))
    return done


class _Repair:
    """One repair: a plan, a copy to work in, and what was done."""

    def __init__(self, run: RunFolder, found: Verification) -> None:
        self.run, self.found = run, found
        self.aside = [finding.path for finding in found.findings if finding.moved_aside]
        self.damaged = {item for finding in found.findings for item in finding.stages}
        self.checkpoints = sorted({f.checkpoint for f in found.findings if f.checkpoint is not None})
        self.segments = {
            path
            for *_, path in segment_paths(run.path)
            if any(f.path.startswith(f"{path.relative_to(run.path)}") and f.stages for f in found.findings)
        }
        self.taken_out: set[Item] = set()
        self.stays = run.path / QUARANTINE / secrets.token_hex(4)

    def work(self) -> list[str]:
        """Compute, compare, then put in place."""
        if not (self.damaged or self.checkpoints):
            return self._move_aside()
        shadow_path = self.run.path / f".repair.{secrets.token_hex(4)}.tmp"
        shadow_path.mkdir()
        try:
            iterations = [iteration for iteration, _ in self.damaged]
            for path in self.segments:
                first, _, last = path.name.partition("-")
                iterations += range(int(first), int(last) + 1)
            until = max([*iterations, *(c - 1 for c in self.checkpoints)])
            begin = self._begin(min([*iterations, *self.checkpoints]))
            self._fill(shadow_path, max(begin - 1, 0), min(until + 1, self.found.num_finished - 1))
            shadow = RunFolder.open(shadow_path)
            for iteration in range(begin, until + 2):
                if iteration in self.checkpoints:
                    self._rebuild(shadow, iteration)
                if any(i == iteration for i, _ in self.damaged):
                    self._compute(shadow, iteration)
            self._check(shadow, begin, min(until + 1, self.found.num_finished - 1))
            return self._put_in_place(shadow) + self._move_aside()
        finally:
            shutil.rmtree(shadow_path, ignore_errors=True)

    def _begin(self, first: int) -> int:
        """The newest intact checkpoint at or before the first damage; 0 for the beginning."""
        check = CheckpointCheck(self.run, load_weights=False)
        earlier = [i for i in self.run.checkpoints() if i <= first and i not in self.checkpoints]
        return next((i for i in reversed(earlier) if not check.one(i)), 0)

    def _fill(self, shadow: Path, first: int, last: int) -> None:
        """Hard links to everything intact that the work reads."""
        _link(self.run.path / "run.json", shadow / "run.json")
        for iteration in range(first, last + 1):
            for stage in STAGES:
                if (iteration, stage) in self.damaged:
                    continue
                for path in (artifact_path(iteration, stage), manifest_path(iteration, stage)):
                    if (self.run.path / path).is_file():
                        _link(self.run.path / path, shadow / path)
        for iteration in self.run.checkpoints():
            if first <= iteration <= last + 1 and iteration not in self.checkpoints:
                source = self.run.checkpoint_path(iteration)
                for file in [
                    p for p in source.rglob("*") if p.is_file() and str(p.relative_to(self.run.path)) not in self.aside
                ]:
                    _link(file, shadow / file.relative_to(self.run.path))
        for start, end, path in segment_paths(self.run.path):
            if path not in self.segments and start <= last and first <= end:
                for file in path.iterdir():
                    _link(file, shadow / file.relative_to(self.run.path))
            elif path in self.segments:
                self._take_out(path, shadow)

    def _take_out(self, path: Path, shadow: Path) -> None:
        """What is whole in a damaged segment, as the loose files that it was made of."""
        try:
            segment = open_segment(path)
        except IntegrityError:
            return
        for iteration in segment.iterations:
            for stage in STAGES:
                if (iteration, stage) in self.damaged:
                    continue
                take_out(segment, stage, iteration, shadow)
                self.taken_out.add((iteration, stage))

    def _compute(self, shadow: RunFolder, iteration: int) -> None:
        """The stages of an iteration that are not there, and a comparison with what is known of them."""
        refs: dict[str, ArtifactRef] = {}
        for stage in STAGES:
            refs[stage] = compute_stage(shadow, stage, iteration, refs)
        for stage in STAGES:
            before, after = self._trusted(iteration, stage), shadow.manifest(stage, iteration)
            assert after is not None
            if before is not None and replace(before, timing={}) != replace(after, timing={}):
                self._refuse(
                    artifact_path(iteration, stage),
                    f"computed again it has sha256 {after.artifact.sha256[:12]}…, committed as "
                    f"{before.artifact.sha256[:12]}…",
                )

    def _trusted(self, iteration: int, stage: str) -> Manifest | None:
        """The manifest of a stage, unless something is wrong with itself."""
        blaming = [f for f in self.found.findings if (iteration, stage) in f.stages]
        if any(f.path != artifact_path(iteration, stage) or len(f.stages) > 1 for f in blaming):
            return None
        try:
            return read_manifest(self.run.path, stage, iteration)
        except IntegrityError:
            return None

    def _rebuild(self, shadow: RunFolder, iteration: int) -> None:
        """A checkpoint, and a comparison with its manifest if that has survived."""
        save_state(open_session(str(shadow.path)), iteration)
        rebuilt = read_record(shadow.checkpoint_path(iteration) / "manifest.json")
        try:
            before = read_record(self.run.checkpoint_path(iteration) / "manifest.json")
        except (IntegrityError, FileNotFoundError, NotADirectoryError):
            return
        same_place = (before.get("iteration"), before.get("identity")) == (iteration, rebuilt["identity"])
        names = [f.path for f in self.found.findings if f.checkpoint == iteration]
        if same_place and not any(name.endswith("/manifest.json") for name in names) and before != rebuilt:
            files: Any = before.get("files")
            other = sorted(n for n, digest in rebuilt["files"].items() if files.get(n) != digest)
            self._refuse(f"checkpoints/{iteration:06d}", f"rebuilt, it differs in {', '.join(other) or 'its record'}")

    def _check(self, shadow: RunFolder, begin: int, last: int) -> None:
        """The work fits to what stands before and after it."""
        check = IterationCheck(shadow)
        check.begin_at(begin)
        findings = [f for iteration in range(begin, last + 1) for f in check.finished(iteration)]
        checkpoints = CheckpointCheck(shadow, load_weights=False)
        findings += [f for iteration in shadow.checkpoints() if iteration > begin for f in checkpoints.one(iteration)]
        for finding in findings:
            self._refuse(finding.path, f"with it computed again, {finding.problem}")

    def _refuse(self, path: str, problem: str) -> None:
        raise IntegrityError(
            f"{self.run.path} was not repaired; nothing was changed:\n"
            f"  {path}: {problem}: what it was computed with, a reward service or a file, is not what it was\n"
            f"{_way_on(self.found)}"
        )

    def _put_in_place(self, shadow: RunFolder) -> list[str]:
        done: list[str] = []
        written: dict[str, list[str]] = {}
        for iteration, stage in sorted(
            self.damaged | self.taken_out, key=lambda item: (item[0], [*STAGES].index(item[1]))
        ):
            artifact, manifest = Path(artifact_path(iteration, stage)), Path(manifest_path(iteration, stage))
            trusted = (iteration, stage) not in self.taken_out and self._trusted(iteration, stage) is not None
            for path in (artifact, manifest):
                keep = path == manifest and trusted and (self.run.path / path).is_file()
                if not keep and not _is_same(self.run.path / path, shadow.path / path):
                    if (self.run.path / path).is_file():
                        _link(self.run.path / path, self.stays / path)
                    write_file(self.run.path / path, read_file(shadow.path / path))
                    written.setdefault(str(path.parent), []).append(path.name)
        done += [f"{folder}: computed again: {', '.join(names)}" for folder, names in written.items()]
        for iteration in self.checkpoints:
            source, target = shadow.checkpoint_path(iteration), self.run.checkpoint_path(iteration)
            if target.exists() or target.is_symlink():
                move(target, self.stays / target.relative_to(self.run.path))
            record = read_record(source / "manifest.json")
            record.pop("files")

            def fill(folder: Path, source: Path = source) -> None:
                shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))

            commit_folder(target, fill, record)
            done.append(f"checkpoints/{iteration:06d} was rebuilt")
        for segment in self.segments:
            move(segment, self.stays / segment.relative_to(self.run.path))
            done.append(f"{segment.relative_to(self.run.path)} was moved to {self.stays.relative_to(self.run.path)}")
        return done

    def _move_aside(self) -> list[str]:
        done: list[str] = []
        for name in self.aside:
            path = self.run.path / name
            if path.is_symlink():
                remove_file(path)
                done.append(f"{name}, a link, was removed")
            elif path.exists():  # not with the folder around it already
                move(path, self.stays / name)
                done.append(f"{name} was moved to {self.stays.relative_to(self.run.path)}")
        return done


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """The lock of a run that may hold links, or have no readable record."""
    try:
        run = RunFolder.open(path)
    except IntegrityError:
        yield  # its verification says so
        return
    with run.locked(settled=False):
        yield


def _way_on(found: Verification) -> str:
    if found.newest_intact is None:
        return "no checkpoint is intact: begin a new run with `rlhf train`, or put the files back from a copy"
    return (
        f"the newest intact state is {found.path}/checkpoints/{found.newest_intact:06d}: put the files back from a "
        "copy, or begin a new run from its policy/ (policy.model; with LoRA policy.adapter)"
    )


def _is_same(path: Path, other: Path) -> bool:
    return path.is_file() and not path.is_symlink() and hash_file(path) == hash_file(other)


def _link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the disk has no hard links. It is only read or replaced."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
