"""Bytes that change by themselves, and files that stand in each other's place: seen before anything parses them.

Two finished runs of different seeds, and copies of the first in which one file is not what was committed. Whatever
reads that file must refuse it by its digest or by what it says of itself; spies see whether a parser was given bytes
that had failed their digest. A sample of the damaged runs is resumed: it ends with the same hash and a message, or
with an IntegrityError.
"""

from __future__ import annotations

import contextlib
import logging
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torture.battery import Effort, Outcome
from torture.runs import battery_config, fingerprint, in_child, start, start_or_go_on

from rlhf_core.contracts import records
from rlhf_core.contracts.artifacts import read_artifact
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.stage_graph import FILE_STEMS
from rlhf_core.inspection import before_and_after
from rlhf_core.models import checkpoints
from rlhf_core.models.checkpoints import load_checkpoint

NAME = "bit rot, swapped files"
GOAL = "1,000 per kind, 100 % caught before parsing"
EACH = 1000
SEED = 6
CPU = torch.device("cpu")
CHANGES: Mapping[str, Any] = {"checkpoint": {"every": 1, "keep_last": 5}}


class Spoiler:
    """Makes damage by dice.

    Args:
        mine: the bytes of each file of a run.
        other: of another run, of another seed.
        dice: decide.
    """

    def __init__(self, mine: Mapping[str, bytes], other: Mapping[str, bytes], dice: random.Random) -> None:
        self.mine, self.other, self.dice = mine, other, dice
        self.names = sorted(mine)
        self.checkpoints = sorted({"/".join(name.split("/")[:2]) for name in mine if name.startswith("checkpoints/")})

    @property
    def kinds(self) -> dict[str, Callable[[], Mapping[str, bytes]]]:
        """Each kind of damage -> what makes one of it."""
        return {
            "flipped bit": self.flipped,
            "truncated": self.truncated,
            "zeroed block": self.zeroed,
            "artifact of another stage or iteration": lambda: self.swapped(".arrow", self.mine),
            "artifact of another run": lambda: self.foreign(".arrow"),
            "manifest of another stage or iteration": lambda: self.swapped(".json", self.mine),
            "manifest of another run": lambda: self.foreign(".json"),
            "whole stage of another place": lambda: self.pair(self.mine),
            "whole stage of another run": lambda: self.pair(self.other),
            "files of a checkpoint swapped": self.swapped_inside,
            "file of another checkpoint": self.mixed,
            "checkpoint of another iteration": lambda: self.moved(self.mine),
            "checkpoint of another run": lambda: self.moved(self.other),
            "run.json of another run": lambda: {"run.json": self.other["run.json"]},
        }

    def flipped(self) -> dict[str, bytes]:
        name = self.dice.choice(self.names)
        data = bytearray(self.mine[name])
        data[self.dice.randrange(len(data))] ^= 1 << self.dice.randrange(8)
        return {name: bytes(data)}

    def truncated(self) -> dict[str, bytes]:
        name = self.dice.choice(self.names)
        return {name: self.mine[name][: self.dice.randrange(len(self.mine[name]))]}

    def zeroed(self) -> dict[str, bytes]:
        while True:
            name = self.dice.choice(self.names)
            data, size = self.mine[name], self.dice.choice((16, 512, 4096))
            start = self.dice.randrange(len(data)) // size * size
            spoilt = data[:start] + bytes(len(data[start : start + size])) + data[start + size :]
            if spoilt != data:
                return {name: spoilt}

    def swapped(self, suffix: str, source: Mapping[str, bytes]) -> dict[str, bytes]:
        first, second = self._two([n for n in self.names if n.startswith("iterations/") and n.endswith(suffix)])
        return {first: source[second], second: source[first]} if self.dice.random() < 0.5 else {first: source[second]}

    def foreign(self, suffix: str) -> dict[str, bytes]:
        name = self.dice.choice([n for n in self.names if n.startswith("iterations/") and n.endswith(suffix)])
        return {name: self.other[name]}

    def pair(self, source: Mapping[str, bytes]) -> dict[str, bytes]:
        there = sorted(n.removesuffix(".arrow") for n in self.names if n.endswith(".arrow"))
        place, origin = self._two(there) if source is self.mine else [self.dice.choice(there)] * 2
        return {f"{place}{suffix}": source[f"{origin}{suffix}"] for suffix in (".arrow", ".json")}

    def swapped_inside(self) -> dict[str, bytes]:
        while True:
            folder = self.dice.choice(self.checkpoints)
            first, second = self._two([n for n in self.names if n.startswith(folder + "/")])
            if self.mine[first] != self.mine[second]:
                return {first: self.mine[second], second: self.mine[first]}

    def mixed(self) -> dict[str, bytes]:
        while True:
            name = self.dice.choice([n for n in self.names if n.startswith("checkpoints/")])
            folder = "/".join(name.split("/")[:2])
            source = self.dice.choice((self.mine, self.other))
            origin = self.dice.choice(self.checkpoints) + name.removeprefix(folder)
            if source[origin] != self.mine[name]:
                return {name: source[origin]}

    def moved(self, source: Mapping[str, bytes]) -> dict[str, bytes]:
        place, origin = self._two(self.checkpoints) if source is self.mine else [self.dice.choice(self.checkpoints)] * 2
        inside = [n.removeprefix(place) for n in self.names if n.startswith(place + "/")]
        return {place + name: source[origin + name] for name in inside}

    def _two(self, names: list[str]) -> list[str]:
        return self.dice.sample(names, 2)


@contextlib.contextmanager
def spying(run_dir: Path) -> Iterator[set[str]]:
    """Notes the files that reach the parsers of Arrow, JSON and safetensors, and the loaders of models."""
    parsed: set[str] = set()
    real_arrow, real_json = pa.ipc.open_file, records.read_json
    real_tensors, real_policy = checkpoints.load_file, checkpoints.load_policy

    def name(path: object) -> str:
        return str(Path(str(path)).relative_to(run_dir))

    def open_file(source: Any) -> Any:
        data = source.read()
        source.seek(0)
        parsed.update(name(p) for p in run_dir.glob("iterations/*/*.arrow") if p.read_bytes() == data)
        return real_arrow(source)

    def read_json(data: bytes, *, origin: str) -> dict[str, Any]:
        parsed.add(name(origin))
        return real_json(data, origin=origin)

    def load_file(path: Path) -> Any:
        parsed.add(name(path))
        return real_tensors(path)

    def load_policy(config: RunConfig, device: torch.device, checkpoint: Path) -> Any:
        parsed.update(name(p) for p in checkpoint.glob("policy/*"))
        return real_policy(config, device, checkpoint=checkpoint)

    spies: Any = (open_file, read_json, load_file, load_policy)
    pa.ipc.open_file, records.read_json, checkpoints.load_file, checkpoints.load_policy = spies
    checkpoints.read_json = read_json
    try:
        yield parsed
    finally:
        pa.ipc.open_file, records.read_json = real_arrow, real_json
        checkpoints.load_file, checkpoints.load_policy = real_tensors, real_policy
        checkpoints.read_json = real_json


def read_back(run_dir: Path, names: Iterable[str]) -> None:
    """Read what some files of a run stand for, as the loop does. Raises IntegrityError."""
    run = RunFolder.open(run_dir)
    # the first commit of a run tells whether run.json belongs to it
    stages = {_stage_of(name) for name in names if name.startswith("iterations/")} or {("sample_prompts", 0)}
    for stage, iteration in sorted(stages):
        manifest = run.manifest(stage, iteration)
        assert manifest is not None
        read_artifact(run_dir, manifest.artifact)
    if "before_after.json" in names:
        before_and_after(run)
    for folder in sorted({int(name.split("/")[1]) for name in names if name.startswith("checkpoints/")}):
        load_checkpoint(run.checkpoint_path(folder), run.config, CPU, identities=run.identities)


def measure(effort: Effort) -> Outcome:
    """Spoil a finished run in each way, and read the spoilt part; resume some."""
    dice = random.Random(SEED)
    runs = [effort.folder / "mine", effort.folder / "other"]
    configs = [battery_config(effort.tiny, {**CHANGES, "seed": seed}) for seed in (7, 8)]
    for config, run_dir in zip(configs, runs, strict=True):
        _child(lambda config=config, run_dir=run_dir: start(config, run_dir), effort.folder)
    expected, (mine, other) = fingerprint(runs[0]), [_files(run_dir) for run_dir in runs]
    spoiler, each = Spoiler(mine, other, dice), effort.size(6, EACH)
    caught: dict[str, int] = {}
    failures: list[str] = []
    some: list[tuple[str, Mapping[str, bytes]]] = []
    for number, (kind, make) in enumerate(spoiler.kinds.items()):
        effort.progress(number, len(spoiler.kinds))
        caught[kind] = 0
        for index in range(each):
            spoilt = make()
            wrong = _read_spoilt(runs[0], mine, spoilt)
            caught[kind] += not wrong
            if wrong:
                failures.append(f"{kind} of {', '.join(sorted(spoilt)[:2])}: {wrong}")
            if index < effort.size(1, 20):
                some.append((kind, spoilt))
    resumed = some if effort.full else dice.sample(some, 3)
    ends = [_resume_spoilt(configs[0], effort.folder, mine, expected, kind, spoilt) for kind, spoilt in resumed]
    wrong_ends = [end for end in ends if end not in (REFUSED, REPAIRED)]
    tried, passed = each * len(caught) + len(ends), sum(caught.values()) + len(ends) - len(wrong_ends)
    return Outcome(
        tried=tried,
        passed=passed,
        figure=(
            f"{each:,} of each of {len(caught)} kinds, {sum(caught.values()):,} of {each * len(caught):,} caught "
            f"before a parser saw them; {len(ends)} spoilt runs resumed: {ends.count(REPAIRED)} repaired to the same "
            f"hash and told, {ends.count(REFUSED)} refused"
        ),
        goal_size=EACH * len(caught),
        failures=[*failures[:6], *wrong_ends[:4]],
        numbers={"caught": caught, "repaired": ends.count(REPAIRED), "refused": ends.count(REFUSED)},
    )


REFUSED, REPAIRED = "refused", "repaired"


def _read_spoilt(run_dir: Path, mine: Mapping[str, bytes], spoilt: Mapping[str, bytes]) -> str:
    """What is wrong with how a spoilt run is read, or nothing. The run is as before afterwards."""
    _put(run_dir, spoilt)
    changed = {name for name, data in spoilt.items() if data != mine[name]}
    try:
        with spying(run_dir) as parsed:
            refusal = _refusal(run_dir, spoilt)
        if not refusal.startswith(str(run_dir)):
            return f"the message does not begin with the file: {refusal}" if refusal else "nobody noticed"
        # a whole record in a false place keeps its seal, and is refused by what it says of itself
        eaten = sorted(name for name in parsed & changed if not _is_sealed(spoilt[name]))
        return f"{eaten[0]} was parsed all the same" if eaten else ""
    except Exception as error:
        return f"a raw {type(error).__name__}: {error}"
    finally:
        _put(run_dir, {name: mine[name] for name in spoilt})


def _refusal(run_dir: Path, spoilt: Mapping[str, bytes]) -> str:
    """What a reader says of the spoilt files; "" if it takes them."""
    try:
        read_back(run_dir, spoilt)
    except IntegrityError as error:
        return str(error)
    return ""


def _resume_spoilt(
    config: RunConfig, folder: Path, mine: Mapping[str, bytes], expected: str, kind: str, spoilt: Mapping[str, bytes]
) -> str:
    """Resume a spoilt run. Returns: REFUSED, REPAIRED, or what is wrong."""
    run_dir, said, log = folder / "spoilt", folder / "said", folder / "log"
    shutil.rmtree(run_dir, ignore_errors=True)
    said.write_text("")
    log.unlink(missing_ok=True)
    shutil.copytree(folder / "mine", run_dir)
    _put(run_dir, spoilt)

    def work() -> None:
        logging.basicConfig(filename=said, level=logging.WARNING, force=True)
        start_or_go_on(config, run_dir)

    what = f"{kind} of {', '.join(sorted(spoilt)[:2])}, resumed"
    if in_child(work, log=log):
        last = next((s for s in reversed(log.read_text().splitlines()) if "Error: " in s), "no word")
        return REFUSED if last.split(":")[0].endswith("IntegrityError") else f"{what}: {last}"
    if fingerprint(run_dir) != expected:
        return f"{what}: it ended with other numbers, or left the damage where it was"
    if not any(Path(name).name in said.read_text() or name in said.read_text() for name in spoilt):
        return f"{what}: it was repaired without a word"
    return REPAIRED


def _files(run_dir: Path) -> dict[str, bytes]:
    """What commits something in a run folder: relative path -> its bytes."""
    paths = [
        run_dir / "run.json",
        run_dir / "before_after.json",
        *run_dir.glob("iterations/*/*"),
        *run_dir.glob("checkpoints/*/**/*"),
    ]
    return {str(p.relative_to(run_dir)): p.read_bytes() for p in sorted(paths) if p.is_file()}


def _put(run_dir: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (run_dir / name).write_bytes(data)


def _stage_of(name: str) -> tuple[str, int]:
    stem = Path(name).stem
    return next(stage for stage, s in FILE_STEMS.items() if s == stem), int(name.split("/")[1])


def _is_sealed(data: bytes) -> bool:
    try:
        return bool(records.unseal(data, origin="it"))
    except IntegrityError:
        return False


def _child(work: Callable[[], object], folder: Path) -> None:
    if in_child(work, log=folder / "log"):
        raise RuntimeError((folder / "log").read_text())
