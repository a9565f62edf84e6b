"""A whole run read again, one artifact at a time: works while the run is going."""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from rlhf_core.contracts.archive import FOLDER as ARCHIVE
from rlhf_core.contracts.archive import segment_paths
from rlhf_core.contracts.artifacts import read_manifest
from rlhf_core.contracts.cleaned import FILE as CLEANED
from rlhf_core.contracts.cleaned import Cleaned
from rlhf_core.contracts.compaction import check_segment
from rlhf_core.contracts.durable import is_leftover, read_file
from rlhf_core.contracts.errors import IntegrityError, RlhfError, StorageError, UserError
from rlhf_core.contracts.records import read_record
from rlhf_core.contracts.run_folder import RECORD_REMEDY, RunFolder
from rlhf_core.contracts.shards import SHARDS
from rlhf_core.contracts.stage_graph import FILE_STEMS, STAGES
from rlhf_core.verification.checkpoints import ALIAS, CheckpointCheck, strangers
from rlhf_core.verification.findings import Finding, Verification, said
from rlhf_core.verification.iterations import FILES, IterationCheck

QUARANTINE = ".quarantine"
"""Where a repair puts what does not belong."""
KNOWN = frozenset(
    {"run.json", "lock", "lock.held", "iterations", "checkpoints", "guards.json", "mlflow.json", "prefect.json",
     "before_after.json", "report.png", "view.html", "evaluations", CLEANED, ARCHIVE, QUARANTINE, SHARDS}
)  # fmt: skip
SETTLE_S = 0.5
"""How long a run that is going has for a write, before a second look."""

Progress = Callable[[int, int], None]


def verify_run(
    path: Path, *, load_weights: bool = True, is_held: bool = False, progress: Progress | None = None
) -> Verification:
    """Read everything again that a run has written.

    Args:
        path: the run folder.
        load_weights: also load each checkpoint, and compare the digest of its weights.
        is_held: the caller holds the lock, so that nobody writes meanwhile.
        progress: told how many of how many iterations and checkpoints are done.
    Returns: every finding; a run that is whole has none that is damage.
    Raises: UserError if the folder holds no run.
    """
    progress = progress or _tell_nobody
    going = not is_held and _is_going(path)
    first = _look(path, load_weights, progress, going=going)
    if not first.damage or not going:
        return first
    time.sleep(SETTLE_S)  # what a process changed while it was read is no damage
    second = _look(path, load_weights, progress, going=going)
    seen = {(finding.path, finding.kind) for finding in first.findings}
    kept = [f for f in second.findings if not f.is_damage or (f.path, f.kind) in seen]
    return Verification(**{**vars(second), "findings": kept})


def num_finished(run: RunFolder) -> int:
    """Iterations that were finished once, by whatever still shows it: also where their records are damaged."""
    folders = sorted(int(p.name) for p in _folders(run.path / "iterations"))
    finished = 0
    for iteration in folders:
        for stage in STAGES:
            if _has_manifest(run, stage, iteration):
                finished = max(finished, iteration + (stage == "ppo_update"))
    for iteration in run.checkpoints():
        try:
            record = read_record(run.checkpoint_path(iteration) / "manifest.json")
        except IntegrityError:
            continue
        if record.get("iteration") == iteration and record.get("identity") in run.identities:
            finished = max(finished, iteration)
    for _, last, _ in segment_paths(run.path):
        finished = max(finished, last + 1)
    while (run.path / f"iterations/{finished:06d}/{FILE_STEMS['ppo_update']}.json").is_file():
        finished += 1  # its record is there, though it is damaged
    return finished


def _tell_nobody(_done: int, _total: int) -> None:
    pass


def _look(path: Path, load_weights: bool, progress: Progress, *, going: bool) -> Verification:
    try:
        run = RunFolder.open(path)
    except UserError:
        if not (path / "iterations").is_dir():
            raise
        return _without_record(path, "missing", "the record of the run is missing")
    except StorageError:
        raise  # a disk that does not give a file says nothing of the file
    except RlhfError as error:
        return _without_record(path, "damaged", said(error, path / "run.json").removesuffix(f"; {RECORD_REMEDY}"))
    others = _foreign_identities(run)
    if others:
        return _without_record(path, "damaged", f"it is of another run: {others}")
    finished = num_finished(run)
    try:
        Cleaned.of(path)
    except IntegrityError as error:
        return _without_record(path, "damaged", said(error, path / CLEANED), CLEANED)
    found: list[Finding] = []
    checkpoints = CheckpointCheck(run, load_weights=load_weights)
    saved = sorted(int(p.name) for p in _folders(run.path / "checkpoints"))
    total = len(saved) + finished
    for done, iteration in enumerate(saved):
        progress(done, total)
        findings = checkpoints.one(iteration)
        if iteration > finished:
            findings = [_beyond(run, f"checkpoints/{iteration:06d}", finished)]
        found += findings if run.checkpoint_path(iteration).is_dir() else []
    found += checkpoints.missing(finished, is_complete=(path / "before_after.json").exists())
    found += checkpoints.alias()
    found += _archive(run)
    iterations = IterationCheck(run, [i for first, last, _ in segment_paths(path) for i in range(first, last + 1)])
    for iteration in range(finished):
        progress(len(saved) + iteration, total)
        found += iterations.finished(iteration)
    found += iterations.unfinished(finished)
    progress(total, total)
    found += _records(run, finished)
    found += _strangers(run, finished, going=going)
    return Verification(
        path,
        sorted(found, key=lambda finding: finding.path),
        finished,
        run.config.num_iterations,
        checkpoints.num_files + iterations.num_files + 1,
        checkpoints.num_bytes + iterations.num_bytes,
        len(saved),
        max((i for i in checkpoints.intact if i <= finished), default=None),
    )


def _without_record(path: Path, kind: str, problem: str, name: str = "run.json") -> Verification:
    remedy = RECORD_REMEDY if name == "run.json" else f"put {name} back from a copy"
    remedy += ". Everything else is read once it is there"
    finding = Finding(name, kind, problem, remedy, recoverable=False)  # pyright: ignore[reportArgumentType]
    return Verification(path, [finding], 0, 0, 1, 0)


def _archive(run: RunFolder) -> Iterator[Finding]:
    """The segments of old iterations; what is lost with one can be computed again."""
    cleaned = Cleaned.of(run.path)
    for first, last, segment in segment_paths(run.path):
        for damage in check_segment(segment):
            if last < cleaned.artifacts_before and damage.path.suffix == ".arrow" and not damage.path.exists():
                continue
            where = str(damage.path.relative_to(run.path))
            problem = said(IntegrityError(damage.sentence), damage.path)
            lost = tuple((iteration, stage) for stage, iteration in damage.lost)
            drift = run.drift_after(first)
            if not lost:
                aside = f"`rlhf resume {run.path} --repair` moves it aside"
                yield Finding(where, "surplus", problem, aside, moved_aside=True)
            elif drift is None:
                remedy = f"`rlhf resume {run.path} --repair` takes out what is whole and computes the rest again"
                kind = "damaged" if damage.path.exists() else "missing"
                yield Finding(where, kind, problem, remedy, stages=lost)
            else:
                remedy = (
                    f"put it back from a copy: it is older than the drift accepted at iteration {drift.iteration}, "
                    "so that it cannot be computed again here"
                )
                yield Finding(where, "damaged", problem, remedy, recoverable=False, stages=lost)


def _records(run: RunFolder, finished: int) -> Iterator[Finding]:
    """The small files beside the iterations."""
    for name, afterwards in (
        ("guards.json", "the guards then judge anew, and ask again what a person had accepted"),
        ("prefect.json", "the flow run that it names is then not marked as crashed"),
        ("mlflow.json", "a new MLflow run is then begun and everything is sent to it"),
    ):
        path = run.path / name
        if not path.exists():
            continue
        try:
            read_record(path)
        except IntegrityError as error:
            remedy = f"put it back from a copy, or `rlhf resume {run.path} --repair` moves it aside: {afterwards}"
            problem = said(error, path)
            yield Finding(name, "damaged", problem, remedy, moved_aside=True)
    again = f"`rlhf resume {run.path}` writes it again"
    report, samples = run.path / "report.png", run.path / "before_after.json"
    if samples.exists():
        try:
            read_record(samples)
        except IntegrityError as error:
            problem = said(error, samples)
            yield Finding(samples.name, "damaged", problem, again, stops_resume=False)
        if not report.exists():
            yield Finding(report.name, "missing", "the picture of this finished run is missing", again,
                          stops_resume=False)  # fmt: skip
    elif report.exists() and finished == run.config.num_iterations and not (run.path / "guards.json").exists():
        yield Finding(samples.name, "missing", "the samples of this finished run are missing", again,
                      stops_resume=False)  # fmt: skip
    if report.exists() and not _is_whole_png(read_file(report)):
        yield Finding(report.name, "damaged", "it is not a whole PNG file", again, stops_resume=False)


def _strangers(run: RunFolder, finished: int, *, going: bool) -> Iterator[Finding]:
    """What is not the run's own: files of other names, iterations beyond the end, temporary files."""
    iterations, checkpoints = run.path / "iterations", run.path / "checkpoints"
    ignored = "nothing of the run reads it; move it elsewhere if you want"
    aside = f"nothing of the run reads it; `rlhf resume {run.path} --repair` moves it aside"
    for path in strangers(run.path, KNOWN):
        yield Finding(path.name, "foreign", "the run did not write this", ignored)
    folders = {p.name for p in _folders(iterations)}
    for path in strangers(iterations, frozenset(folders)):
        yield Finding(f"iterations/{path.name}", "foreign", "the run did not write this", aside, moved_aside=True)
    known = frozenset(p.name for p in _folders(checkpoints)) | {ALIAS}
    for path in strangers(checkpoints, known):
        yield Finding(f"checkpoints/{path.name}", "foreign", "the run did not write this", aside, moved_aside=True)
    for name in sorted(folders):
        if int(name) > finished and any((iterations / name).iterdir()):
            yield _beyond(run, f"iterations/{name}", finished)
            continue
        for path in strangers(iterations / name, FILES):
            where = f"iterations/{name}/{path.name}"
            yield Finding(where, "foreign", "the run did not write this", aside, moved_aside=True)
    for path in sorted(run.path.rglob("*")):
        if path.is_symlink() and path != checkpoints / ALIAS and not is_leftover(path):
            remedy = f"`rlhf resume {run.path} --repair` removes the link, not what it points at"
            yield Finding(str(path.relative_to(run.path)), "surplus", "it is a link: a run folder holds none", remedy,
                          moved_aside=True)  # fmt: skip
    for path in strangers(run.path / ARCHIVE, frozenset(p.name for *_, p in segment_paths(run.path))):
        yield Finding(f"{ARCHIVE}/{path.name}", "foreign", "the run did not write this", aside, moved_aside=True)
    if not going:
        for path in sorted(p for p in run.path.rglob(".*") if is_leftover(p)):
            remedy = f"a killed process left it; `rlhf resume {run.path}` removes it"
            yield Finding(str(path.relative_to(run.path)), "leftover", "it was never committed", remedy)


def _beyond(run: RunFolder, path: str, finished: int) -> Finding:
    return Finding(
        path, "surplus", f"the run has finished {finished} iterations: this does not follow from them",
        f"`rlhf resume {run.path} --repair` moves it aside", moved_aside=True,
    )  # fmt: skip


def _folders(folder: Path) -> list[Path]:
    """The folders that are named by a number."""
    there = folder.iterdir() if folder.is_dir() else []
    return [p for p in there if p.name.isdecimal() and p.name == f"{int(p.name):06d}" and p.is_dir()]


def _foreign_identities(run: RunFolder) -> str:
    """What says that run.json is not the record of what lies beside it: most of that has other identities.

    Nothing else of the run can be judged then, and nothing may be computed again by such a record.
    """
    own, other = 0, 0
    records = [*run.path.glob("iterations/*/*.json"), *run.path.glob("checkpoints/*/manifest.json")]
    for path in records:
        try:
            identity = read_record(path).get("identity")
        except (IntegrityError, FileNotFoundError):
            continue
        own, other = own + (identity in run.identities), other + (identity not in run.identities)
    return f"{other} of {own + other} manifests beside it have other identities" if other > own else ""


def _has_manifest(run: RunFolder, stage: str, iteration: int) -> bool:
    try:
        manifest = read_manifest(run.path, stage, iteration)
    except IntegrityError:
        return False
    return manifest is not None and manifest.identity in run.identities


def _is_going(path: Path) -> bool:
    try:
        return RunFolder.open(path).is_locked()
    except StorageError:
        raise
    except RlhfError:
        return False


def _is_whole_png(data: bytes) -> bool:
    """Whether every chunk has its CRC, up to the last one."""
    position = 8
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return False
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 8 + length
        if end + 4 > len(data) or zlib.crc32(data[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            return False
        if data[position + 4 : position + 8] == b"IEND":
            return end + 4 == len(data)
        position = end + 4
    return False
