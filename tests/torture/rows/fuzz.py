"""Mutants of everything that a run reads: an error of ours, or a value that is right in itself; never anything else.

A child with bounded memory and time reads thousands of them and says before each which one it is at, so that a crash,
a hang or a full memory has its mutant. ``show(kind, index, folder, tiny)`` reads one of them again.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from iteration import tiny_tree
from tiny_world import Tiny
from torture.battery import Effort, Outcome
from torture.mutants import mutate_bytes, mutate_tree
from torture.runs import battery_config, in_child, start

from rlhf_core.contracts.artifacts import ArtifactRef, artifact_path, read_artifact, read_manifest
from rlhf_core.contracts.batches import Experience, Prompts, ReferenceLogprobs, Rollouts, Scores
from rlhf_core.contracts.config import PromptsConfig
from rlhf_core.contracts.config_io import build_config, load_config
from rlhf_core.contracts.errors import IntegrityError, RlhfError
from rlhf_core.contracts.records import read_record, seal
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.stage_graph import SCHEMAS, STAGES
from rlhf_core.evaluation.folder import EvaluationFolder, new_record
from rlhf_core.models.checkpoints import load_checkpoint
from rlhf_core.prompts.sources import load_prompt_set
from tasks.lifecycle.guards import GuardRecord

NAME = "fuzz"
GOAL = ">= 100,000 mutants: 0 crashes, 0 raw tracebacks, 0 silent"

CHUNK = 2000
MEMORY_BYTES = 2 << 30
HANG_S = 30
SEED = "rlhf"
CPU = torch.device("cpu")
SHARES = {
    "config": 6000,
    "override": 6000,
    "prompts.jsonl": 12000,
    "prompts.json": 3000,
    "prompts.csv": 8000,
    "prompts.parquet": 8000,
    "prompts.arrow": 8000,
    "artifact": 10000,
    "artifact, digest made to match": 12000,
    "manifest": 8000,
    "manifest, sealed again": 8000,
    "run.json": 4000,
    "run.json, sealed again": 3000,
    "guards.json": 1500,
    "guards.json, sealed again": 1500,
    "evaluation": 1500,
    "evaluation, sealed again": 1500,
    "checkpoint": 1000,
    "checkpoint, digests made to match": 400,
}
"""Kind -> mutants in full."""


@dataclass
class Bed:
    """Where a child works: its own copies of what it damages.

    Args:
        folder: the child's own.
        tiny: the tiny world.
        run: a finished run, which only copies of are changed.
    """

    folder: Path
    tiny: Tiny
    run: Path

    def copy(self, name: str) -> Path:
        """A file of the run, or a folder, in the child's own run folder."""
        target = self.folder / "run" / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            source = self.run / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        return target


Reader = Callable[[random.Random], None]


def _silent(what: object) -> None:
    raise AssertionError(f"silently accepted: {str(what)[:200]}")


def _must_refuse(read: Callable[[], object]) -> None:
    """Damage to what was committed has one answer."""
    try:
        value = read()
    except IntegrityError:
        return
    _silent(value)


# -- one function a kind: it prepares, and returns what makes and reads a mutant


def _config(bed: Bed) -> Reader:
    text = (
        b"seed: 7\nnum_iterations: 3\nprompts: {source: p.jsonl, batch_size: 8}\n"
        b"policy:\n  model: m\n  lora: {rank: 4}\n"
        b"reward:\n  components:\n    - {kind: model, model: r, weight: 1e-1}\n    - kind: http\n"
        b"      url: 'http://localhost/x'\n"
        b"ppo: {learning_rate: 1e-5, num_minibatches: 2}\n"
    )
    path = bed.folder / "config.yaml"

    def read(random_: random.Random) -> None:
        path.write_bytes(mutate_bytes(random_, text))
        config = load_config(path)
        assert build_config(config.model_dump()) == config, "a config that does not survive its own dump"

    return read


def _override(bed: Bed) -> Reader:
    tree = tiny_tree(bed.tiny)
    texts = [b"ppo.learning_rate=1e-4", b"reward.components.0.weight=2", b"reward.components.1={kind: function}"]
    texts += [b"prompts.columns=[a, b]", b"kl.coef=0.1", b"policy.lora.rank=8", b"guards.kl_ceiling.threshold=5"]

    def read(random_: random.Random) -> None:
        overrides = [mutate_bytes(random_, random_.choice(texts)).decode(errors="surrogateescape") for _ in range(2)]
        config = build_config(tree, overrides)
        assert build_config(config.model_dump()) == config, "a config that does not survive its own dump"

    return read


CHAT = [{"role": "user", "content": "Hi"}]
ROWS = [{"prompt": "Hi", "n": 1}, {"prompt": 'Hö "x"', "n": None}, {"prompt": "a\nb", "n": 2}, {"prompt": "c", "n": 3}]


def _prompts(bed: Bed, kind: str) -> Reader:
    suffix = kind.partition(".")[2]
    sources = [bed.folder / f"source{i}.{suffix}" for i in range(2)]
    chats = [{"prompt": CHAT, "n": 1}, {"prompt": [*CHAT, {"role": "assistant", "content": "Ho"}, *CHAT], "n": 2}]
    for rows, path in zip((ROWS, chats), sources, strict=True):
        table = pa.Table.from_pylist(rows)
        if suffix == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif suffix == "json":
            path.write_text(json.dumps(rows))
        elif suffix == "csv":
            path.write_text('prompt,n\r\nHi,1\r\n"a, ""b""\nc",2\r\nlast,3\r\n')
        elif suffix == "parquet":
            pq.write_table(table, path, compression="zstd" if rows is ROWS else "none")
        else:
            options = pa.ipc.IpcWriteOptions(compression="lz4" if rows is ROWS else None)
            make = pa.ipc.new_file if rows is ROWS else pa.ipc.new_stream
            with make(path, table.schema, options=options) as writer:
                writer.write_table(table)
    data = [path.read_bytes() for path in sources]
    path = bed.folder / f"prompts.{suffix}"

    def read(random_: random.Random) -> None:
        path.write_bytes(mutate_bytes(random_, random_.choice(data)))
        columns = random_.choice(([], ["n"]))
        found = load_prompt_set(PromptsConfig(source=str(path), columns=columns))
        for entry in found.entries:
            texts = [entry] if isinstance(entry, str) else [t for m in entry for t in (m["role"], m["content"])]
            assert entry, "an empty prompt"
            for text in texts:
                text.encode()
        json.dumps(found.columns, allow_nan=False)
        assert len(found.columns) == len(found.entries)

    return read


def _artifacts(bed: Bed, *, fresh: bool) -> Reader:
    refs = {stage: manifest.artifact for stage, manifest in RunFolder.open(bed.run).manifests(0).items()}
    data = {stage: (bed.run / ref.path).read_bytes() for stage, ref in refs.items()}
    prompts = Prompts.from_table(read_artifact(bed.run, refs["sample_prompts"]))
    batches: dict[str, Callable[[pa.Table], object]] = {
        "sample_prompts": Prompts.from_table,
        "generate": lambda table: Rollouts.from_table(table, prompts),
        "score_rewards": Scores.from_table,
        "reference_logprobs": ReferenceLogprobs.from_table,
        "shape_rewards": Experience.from_table,
        "ppo_update": lambda table: table,
    }

    def read(random_: random.Random) -> None:
        stage = random_.choice(list(refs))
        ref, path = refs[stage], bed.folder / refs[stage].path
        path.parent.mkdir(parents=True, exist_ok=True)
        mutant = mutate_bytes(random_, data[stage])
        path.write_bytes(mutant)
        if not fresh:
            _must_refuse(lambda: read_artifact(bed.folder, ref))
            return
        found = ArtifactRef(stage, 0, ref.path, sha256(mutant).hexdigest(), ref.rows)
        table = read_artifact(bed.folder, found)
        assert table.schema.equals(SCHEMAS[stage]), "another schema"
        table.validate(full=True)
        batches[stage](table)

    return read


def _records(names: list[str], opened: Callable[[Bed, str], object], *, fresh: bool) -> Callable[[Bed], Reader]:
    """Sealed records of the run, damaged, or with other values and a seal that fits."""

    def prepare(bed: Bed) -> Reader:
        originals = {name: (bed.run / name).read_bytes() for name in names}
        trees = {name: read_record(bed.run / name) for name in names}
        for name in {*names, "run.json"}:
            bed.copy(name)

        def read(random_: random.Random) -> None:
            name = random_.choice(names)
            path = bed.copy(name)
            if fresh:
                try:
                    mutant = seal(mutate_tree(random_, trees[name]))
                except (ValueError, TypeError):  # nothing that JSON, or a record, could hold
                    return
                path.write_bytes(mutant)
                opened(bed, name)
            else:
                path.write_bytes(mutate_bytes(random_, originals[name]))
                _must_refuse(lambda: opened(bed, name))

        return read

    return prepare


def _manifest(bed: Bed, name: str) -> object:
    stage = next(s for s in STAGES if artifact_path(0, s).removesuffix("arrow") == name.removesuffix("json"))
    manifest = read_manifest(bed.folder / "run", stage, 0)
    assert manifest is not None
    assert all(isinstance(value, float | int) for value in (*manifest.metrics.values(), *manifest.timing.values()))
    assert all(isinstance(value, str) for value in manifest.inputs.values())
    assert isinstance(manifest.artifact.rows, int)
    return manifest


def _run(bed: Bed, _: str) -> object:
    run = RunFolder.open(bed.folder / "run")
    return [run.identities, run.num_finished(), run.checkpoints(), run.last_good, run.identity_at(1), run.drift_at(1)]


def _guards(bed: Bed, _: str) -> object:
    record = GuardRecord.of(RunFolder.open(bed.folder / "run"))
    assert all(isinstance(name, str) for names in record.tripped.values() for name in names)
    assert all(isinstance(iteration, int) for iteration in record.accepted.values())
    return record


def _evaluation(bed: Bed, name: str) -> object:
    there = EvaluationFolder.open((bed.folder / "run" / name).parent)
    there.key("", 0, 1)
    return there


def _checkpoints(bed: Bed, *, fresh: bool) -> Reader:
    config = RunFolder.open(bed.run).config
    name = max(str(p.relative_to(bed.run)) for p in (bed.run / "checkpoints").glob("[0-9]*"))
    path = bed.copy(name)
    originals = {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
    record = read_record(path / "manifest.json")
    named = [n for n in originals if n != "manifest.json"] if fresh else list(originals)

    def read(random_: random.Random) -> None:
        file = random_.choice(named)
        data = originals[file]
        if file.endswith(".safetensors") and random_.random() < 0.8:  # most of it is numbers
            size = 8 + struct.unpack("<Q", data[:8])[0]
            mutant = mutate_bytes(random_, data[:size]) + data[size:]
        elif file.endswith(".json") and file != "manifest.json" and random_.random() < 0.5:
            mutant = json.dumps(mutate_tree(random_, json.loads(data))).encode()
        else:
            mutant = mutate_bytes(random_, data)
        if mutant == data:
            return
        try:
            (path / file).write_bytes(mutant)
            if fresh:
                digests = {**record["files"], file: sha256(mutant).hexdigest()}
                (path / "manifest.json").write_bytes(seal({**record, "files": digests}))
                trainer, state = load_checkpoint(path, config, CPU)
                assert trainer.digest() == record["weights"], "other weights"
                assert state.iteration == trainer.iteration, "another iteration"
            else:
                _must_refuse(lambda: load_checkpoint(path, config, CPU))
        finally:
            (path / file).write_bytes(data)
            (path / "manifest.json").write_bytes(originals["manifest.json"])

    return read


def _manifest_names() -> list[str]:
    return [artifact_path(0, stage).removesuffix("arrow") + "json" for stage in STAGES]


KINDS: dict[str, Callable[[Bed], Reader]] = {
    "config": _config,
    "override": _override,
    **{kind: lambda bed, kind=kind: _prompts(bed, kind) for kind in SHARES if kind.startswith("prompts.")},
    "artifact": lambda bed: _artifacts(bed, fresh=False),
    "artifact, digest made to match": lambda bed: _artifacts(bed, fresh=True),
    "manifest": _records(_manifest_names(), _manifest, fresh=False),
    "manifest, sealed again": _records(_manifest_names(), _manifest, fresh=True),
    "run.json": _records(["run.json"], _run, fresh=False),
    "run.json, sealed again": _records(["run.json"], _run, fresh=True),
    "guards.json": _records(["guards.json"], _guards, fresh=False),
    "guards.json, sealed again": _records(["guards.json"], _guards, fresh=True),
    "evaluation": _records(["evaluations/e/evaluation.json"], _evaluation, fresh=False),
    "evaluation, sealed again": _records(["evaluations/e/evaluation.json"], _evaluation, fresh=True),
    "checkpoint": lambda bed: _checkpoints(bed, fresh=False),
    "checkpoint, digests made to match": lambda bed: _checkpoints(bed, fresh=True),
}


# -- children


def one(kind: str, index: int, read: Reader) -> str:
    """Read one mutant; what was wrong with how it ended, or nothing."""
    try:
        read(random.Random(f"{SEED} {kind} {index}"))
    except RlhfError as error:
        return "" if str(error).strip() else "an error without a word"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})"
    return ""


def show(kind: str, index: int, folder: Path, tiny: Tiny) -> None:
    """Read one mutant here and now, with its traceback: for whoever looks into a failure."""
    (folder / "bed").mkdir(parents=True)
    KINDS[kind](Bed(folder / "bed", tiny, prepare_run(folder, tiny)))(random.Random(f"{SEED} {kind} {index}"))


def prepare_run(folder: Path, tiny: Tiny) -> Path:
    """A finished run with a record of its guards and of an evaluation."""
    config = battery_config(tiny, {"num_iterations": 2})
    if in_child(lambda: start(config, folder / "run"), log=folder / "log"):
        raise RuntimeError((folder / "log").read_text())
    run = RunFolder.open(folder / "run")
    record = new_record(run.path / "evaluations" / "e", config, run.identity, run.path, 3)
    (run.path / "evaluations" / "e").mkdir(parents=True)
    (run.path / "evaluations" / "e" / "evaluation.json").write_bytes(seal(record))
    guards = {"tripped": {"1": ["kl_ceiling"]}, "accepted": {"kl_ceiling": 1}, "stopped": "the KL is high"}
    (run.path / "guards.json").write_bytes(seal(guards))
    return run.path


def _child(kind: str, first: int, last: int, bed: Bed, at: mmap.mmap, log: Path) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28, 1 << 28))
    pa.set_cpu_count(1)
    read = KINDS[kind](bed)
    with log.open("a") as file:
        for index in range(first, last):
            at[:8] = struct.pack("<q", index)
            if problem := one(kind, index, read):
                file.write(f"{kind} {index}: {problem}\n")
                file.flush()
        at[:8] = struct.pack("<q", -1)


def _read_chunk(kind: str, first: int, last: int, bed: Bed, log: Path) -> Iterator[str]:
    """Read mutants in children; a child that dies costs its mutant, and the next goes on after it."""
    at = mmap.mmap(-1, 8)
    while first < last:
        at[:8] = struct.pack("<q", first - 1)
        child = os.fork()
        if not child:
            try:
                _child(kind, first, last, bed, at, log)
                os._exit(0)
            except BaseException:
                log.open("a").write(f"{kind} cannot be prepared: {traceback.format_exc()[-500:]}\n")
            os._exit(1)
        hung = _wait(child, at)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        index = struct.unpack("<q", at[:8])[0]
        if index == -1 and status == 0:
            return
        yield f"{kind} {index}: " + ("it hangs" if hung else f"the process died ({status})")
        first = max(first, index) + 1


def _wait(child: int, at: mmap.mmap) -> bool:
    """Until a child is done, or stays at one mutant for too long and is killed: then True."""
    seen, since = at[:8], time.monotonic()
    while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.01)
        if at[:8] != seen:
            seen, since = at[:8], time.monotonic()
        elif time.monotonic() - since > HANG_S:
            os.kill(child, signal.SIGKILL)
            return True
    return False


def measure(effort: Effort) -> Outcome:
    """Read every kind's mutants."""
    run = prepare_run(effort.folder, effort.tiny)
    log = effort.folder / "failures"
    log.touch()
    counts = {kind: count if effort.full else max(12, count // 100) for kind, count in SHARES.items()}
    total, done = sum(counts.values()), 0
    deaths: list[str] = []
    seconds: dict[str, float] = {}
    for kind, count in counts.items():
        began = time.monotonic()
        for first in range(0, count, CHUNK):
            bed = Bed(effort.folder / "bed", effort.tiny, run)
            bed.folder.mkdir()
            deaths += _read_chunk(kind, first, min(count, first + CHUNK), bed, log)
            shutil.rmtree(bed.folder)
            done += min(count, first + CHUNK) - first
            effort.progress(done, total)
        seconds[kind] = round(time.monotonic() - began, 2)
    problems = [*deaths, *log.read_text().splitlines()]
    return Outcome(
        tried=total,
        passed=total - len(problems),
        figure=f"{total:,} mutants of {len(counts)} kinds: {len(deaths)} crashes or hangs, {len(problems)} failures",
        goal_size=100_000,
        failures=problems[:20],
        numbers={"mutants": counts, "seconds": seconds},
    )
