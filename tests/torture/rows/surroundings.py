"""What happens around a run while it works, or is stopped: other hosts, clocks, files, libraries, memory and names.

A run goes on to the same hash, or ends with one sentence of this project and goes on to it once all is well again.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import resource
import shutil
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from torture.battery import Effort, Outcome
from torture.deaths import KILLED, live, log_of
from torture.power import everywhere
from torture.rows.clock import move_clock
from torture.runs import battery_config, fingerprint, fork, go_on, in_child, start, start_or_go_on

from flows import calling, cli
from rlhf_core.contracts import errors, locking
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config, canonical_json
from rlhf_core.contracts.durable import Disk, using_disk
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.models import untrusted
from rlhf_core.sweeping.grid import plan_runs
from tasks.lifecycle.start import record_drift

NAME = "hosts, clocks, files, libraries, memory, names"
GOAL = "same hash, or one sentence and then the same hash"
DAY_S = 86400.0
MIDST = "000001/04_ref_logprobs.json"
"""Renamed in the middle of the second iteration."""
PATIENCE_S = 60.0
ENDS_SHORT = (1, 8, 24)
"""MiB of address space that a run may take beyond what its process has."""
Act = Callable[[], object]


class MeddlingDisk(Disk):
    """A disk on which something happens just before one rename.

    Args:
        act: what.
        at: end of the path that something is renamed to.
    """

    def __init__(self, act: Act, at: str = MIDST) -> None:
        self.act, self.at = act, at

    def rename(self, source: Path, target: Path) -> None:
        if str(target).endswith(self.at):
            self.act()
        super().rename(source, target)


FUNCTION = "def scored(responses):\n    return [len(text) / {divisor} for text in responses]\n"
"""A reward function's file."""
BETWEEN_UPDATES = "000002/04_ref_logprobs.json"
"""Renamed in the iteration after the first checkpoint."""
SLOW_PATTERN = r"(?:a+)+$"


class Bench:
    """An undisturbed run, one that was killed in its second iteration, and a copy of the world that may be spoilt.

    Args:
        effort: of the row.
    """

    def __init__(self, effort: Effort) -> None:
        self.folder = effort.folder
        self.world = effort.folder / "world"
        self.world.mkdir()
        self.config = battery_config(effort.tiny)
        self.run = effort.folder / "run"
        self.whole, self.half = effort.folder / "whole", effort.folder / "half"
        if in_child(lambda: start(self.config, self.whole), log=log_of(self.whole)):
            raise RuntimeError(log_of(self.whole).read_text())
        self.expected = fingerprint(self.whole)
        if live(self.config, self.half, effort.folder / "ledger", MIDST) != KILLED:
            raise RuntimeError("no run was killed in its second iteration")

    def begin(self, *, half: bool = False) -> None:
        """An empty place for a run, or one that was killed."""
        shutil.rmtree(self.run, ignore_errors=True)
        if half:
            shutil.copytree(self.half, self.run, symlinks=True)

    def ends(self, work: Act) -> str:
        """How some work in a child ended: nothing, or the name and text of what it raised."""
        log = log_of(self.run)
        log.unlink(missing_ok=True)
        if in_child(work, log=log) == 0:
            return ""
        lines = log.read_text().strip().splitlines() if log.is_file() else []
        named = [line for line in lines if _is_ours(line)]
        return (named or lines or ["killed"])[-1]

    def heals(self, config: RunConfig | None = None, expected: str = "") -> str:
        """What is wrong with how the run goes on when all is well again, or nothing."""
        if said := self.ends(lambda: start_or_go_on(config or self.config, self.run)):
            return f"it does not go on: {said}"
        return "" if fingerprint(self.run) == (expected or self.expected) else "it goes on to other numbers"


def _is_ours(line: str) -> bool:
    name = line.partition(":")[0].rpartition(".")[2]
    kind = getattr(errors, name, None)
    return isinstance(kind, type) and issubclass(kind, errors.RlhfError)


def measure(effort: Effort) -> Outcome:
    """Each kind in turn."""
    bench = Bench(effort)
    failures: list[str] = []
    tried: dict[str, int] = {}
    seconds: dict[str, float] = {}
    kinds = (
        two_hosts, clock_jumps, swapped_files, swapped_inputs, files_that_lie, libraries, memory_limits,
        names_in_other_case,
    )  # fmt: skip
    for kind in kinds:
        began = time.monotonic()
        for name, wrong in kind(bench, effort):
            tried[kind.__name__] = tried.get(kind.__name__, 0) + 1
            failures += [f"{name}: {wrong}"] if wrong else []
            effort.progress(sum(tried.values()), 0)
        seconds[kind.__name__] = round(time.monotonic() - began, 1)
    total = sum(tried.values())
    said = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in tried.items())
    return Outcome(
        tried=total,
        passed=total - len(failures),
        figure=f"{total - len(failures)}/{total} noticed or without effect: {said}",
        goal_size=total,
        failures=failures,
        numbers={"tried": tried, "seconds": seconds},
    )


# ---------------------------------------------------------------------------------------------- two hosts


def two_hosts(bench: Bench, _effort: Effort) -> Iterator[tuple[str, str]]:
    """A host takes over the folder of a run that another one still computes, on a disk that locks each host alone."""
    bench.begin()
    waits, may = bench.folder / "waits", bench.folder / "may"

    def first() -> None:
        _on_host("first")

        def wait() -> None:
            waits.touch()
            until = time.monotonic() + PATIENCE_S
            while not may.exists() and time.monotonic() < until:
                time.sleep(0.01)

        with using_disk(MeddlingDisk(wait)):
            start(bench.config, bench.run)

    def second() -> None:
        _on_host("second")
        go_on(bench.run)

    log = bench.folder / "first.log"
    child = fork(first, log=log)
    until = time.monotonic() + PATIENCE_S
    while not waits.exists() and time.monotonic() < until:
        time.sleep(0.01)
    taken = bench.ends(second)
    written = _state_of(bench.run)
    may.touch()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    last = log.read_text().strip().splitlines()[-1] if log.is_file() else ""
    wrong = "" if _state_of(bench.run) == written else "the first wrote after the second had taken over"
    if status == 0:
        wrong = "both wrote to the end, and neither noticed"
    elif "RunLockedError" not in last or "has taken over" not in last:
        wrong = f"the first says {last!r}"
    yield "two hosts", taken or wrong
    yield "two hosts, afterwards", bench.heals()


def _on_host(name: str) -> None:
    """Give this process, a child, another host's name, and locks that no other host sees."""
    socket.gethostname = lambda: name
    cast("Any", locking)._flock = lambda descriptor, how: True


def _state_of(run: Path) -> dict[str, tuple[int, int]]:
    files = [p for p in run.rglob("*") if p.is_file() and not p.name.startswith(("lock", "."))]
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


def clock_jumps(bench: Bench, _effort: Effort) -> Iterator[tuple[str, str]]:
    """The clock goes three days forward in mid-run, and four days back a little later."""
    bench.begin()

    def work() -> None:
        back = MeddlingDisk(lambda: move_clock(-4 * DAY_S), "000002/02_rollouts.json")

        class Both(MeddlingDisk):
            def rename(self, source: Path, target: Path) -> None:
                if str(target).endswith(self.at):
                    self.act()
                back.rename(source, target)

        with using_disk(Both(lambda: move_clock(3 * DAY_S))):
            start(bench.config, bench.run)

    said = bench.ends(work)
    same = bool(said) or fingerprint(bench.run) == bench.expected
    yield "clock +3 days, then -1 day", said if same else "it came to other numbers"


# -------------------------------------------------------------------------------------------------- files


def swapped_files(bench: Bench, effort: Effort) -> Iterator[tuple[str, str]]:
    """A file is replaced in mid-run, or while the run is stopped, and put back afterwards."""
    world = bench.world
    for name in ("policy", "reward"):
        shutil.copytree(effort.tiny.root / name, world / name)
    shutil.copy(effort.tiny.prompts, world / "prompts.jsonl")
    reward = {"components": [{"kind": "model", "model": str(world / "reward")}]}
    config = battery_config(
        effort.tiny,
        {
            "prompts": {"source": str(world / "prompts.jsonl"), "batch_size": 8},
            "policy": {"model": str(world / "policy"), "critic": {"init": "policy"}},
            "reward": reward,
            "frozen_models": "disk",
        },
    )
    bench.begin()
    if said := bench.ends(lambda: start(config, bench.run)):
        yield "the copied world", said
        return
    expected = fingerprint(bench.run)
    other = bench.folder / "other"
    shutil.copytree(bench.run, other)
    half = bench.folder / "half_of_world"
    if live(config, half, bench.folder / "ledger2", MIDST) != KILLED:
        yield "the copied world", "no run was killed"
        return
    for name, file, change in _swaps(bench, world):
        for stopped in (False, True) if effort.full else (file.is_relative_to(bench.run),):
            bench.begin()
            held = bench.folder / "held"

            def swap(file: Path = file, change: Callable[[Path], object] = change, held: Path = held) -> None:
                shutil.copy2(file, held)
                change(file)

            if stopped:
                shutil.copytree(half, bench.run, symlinks=True)
                swap()
                said = bench.ends(lambda: go_on(bench.run))
            else:

                def work(swap: Act = swap) -> None:
                    with using_disk(MeddlingDisk(swap)):
                        start(config, bench.run)

                said = bench.ends(work)
            held.replace(file)
            when = "stopped" if stopped else "running"
            if said and not _is_ours(said):
                yield f"{name}, {when}", f"it says {said!r}"
            else:
                yield f"{name}, {when}", bench.heals(config, expected)


def _swaps(bench: Bench, world: Path) -> list[tuple[str, Path, Callable[[Path], object]]]:
    """What is replaced, where it is, and how."""
    run = bench.run
    return [
        ("the prompts", world / "prompts.jsonl", _reversed_lines),
        ("the policy's weights", world / "policy" / "model.safetensors", _other_weights),
        ("the reward's weights", world / "reward" / "model.safetensors", _other_weights),
        ("the reward's tokenizer", world / "reward" / "tokenizer.json", _other_tokenizer),
        ("an artifact", run / "iterations" / "000000" / "02_rollouts.arrow", _flipped),
        ("a manifest", run / "iterations" / "000000" / "06_update.json", _flipped),
        ("run.json", run / "run.json", lambda file: shutil.copy(bench.whole / "run.json", file)),
    ]


def _replace(file: Path, data: bytes) -> None:
    temporary = file.with_name(file.name + ".new")
    temporary.write_bytes(data)
    temporary.replace(file)


def _reversed_lines(file: Path) -> None:
    _replace(file, b"".join(reversed(file.read_bytes().splitlines(keepends=True))))


def _other_weights(file: Path) -> None:
    data = bytearray(file.read_bytes())
    for at in range(len(data) - 40_000, len(data) - 4, 4):
        data[at + 2] ^= 0x15
    _replace(file, bytes(data))


def _other_tokenizer(file: Path) -> None:
    tree = json.loads(file.read_text())
    tree["normalizer"] = {"type": "Lowercase"}
    _replace(file, json.dumps(tree).encode())


def _flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    _replace(file, bytes(data))


def swapped_inputs(bench: Bench, _effort: Effort) -> Iterator[tuple[str, str]]:
    """The config file, a checkpoint's folder or a reward function's file is another one between two stages."""
    yield from _config_swapped(bench)
    yield from _checkpoint_swapped(bench)
    yield from _function_swapped(bench)


def _config_swapped(bench: Bench) -> Iterator[tuple[str, str]]:
    """A config is read once, and its copy in the run folder counts from there."""
    bench.begin()
    file = bench.folder / "config.yaml"
    file.write_bytes(canonical_json(bench.config.model_dump()))
    other = canonical_json(build_config(bench.config.model_dump(), ["seed=8", "kl.coef=0.9"]).model_dump())

    def work() -> None:
        everywhere(calling.run_flow, lambda flow, *arguments, **named: flow.fn(*arguments, **named))
        disk = MeddlingDisk(lambda: _replace(file, other))
        quietly = contextlib.redirect_stdout(io.StringIO())
        with calling.without_prefect(), using_disk(disk), quietly, contextlib.suppress(SystemExit):
            cli.main(["train", "--config", str(file), "--run-dir", str(bench.run)])

    said = bench.ends(work)
    swapped = file.read_bytes() == other
    if not said:
        said = "" if fingerprint(bench.run) == bench.expected else "it came to other numbers"
    yield "the config file, running", said or ("" if swapped else "it was not swapped")
    bench.begin(half=True)
    yield "the config file, stopped", bench.heals()


def _checkpoint_swapped(bench: Bench) -> Iterator[tuple[str, str]]:
    """A checkpoint that is another one's: the run at work needs it no more, whoever reads it is told."""
    last = RunFolder.open(bench.whole).checkpoints()[-1]

    def swap() -> None:
        (newest,) = RunFolder.open(bench.run).checkpoints()
        there, held = RunFolder.open(bench.run).checkpoint_path(newest), bench.folder / "held_checkpoint"
        there.rename(held)
        shutil.copytree(RunFolder.open(bench.whole).checkpoint_path(last), there)

    for name, dies in (("running", False), ("stopped", True)):
        bench.begin()
        shutil.rmtree(bench.folder / "held_checkpoint", ignore_errors=True)

        def work(dies: bool = dies) -> None:
            with using_disk(MeddlingDisk((lambda: (swap(), os._exit(9))) if dies else swap, BETWEEN_UPDATES)):
                start(bench.config, bench.run)

        said = bench.ends(work)
        if not (bench.folder / "held_checkpoint").is_dir():
            yield f"a checkpoint folder, {name}", f"it was not swapped: {said}"
            continue
        if dies:
            said = bench.ends(lambda: go_on(bench.run))
            yield "a checkpoint folder, resumed", "" if "IntegrityError" in said else f"it says {said!r}"
            (swapped,) = RunFolder.open(bench.run).checkpoints()
            there = RunFolder.open(bench.run).checkpoint_path(swapped)
            shutil.rmtree(there)
            (bench.folder / "held_checkpoint").rename(there)
        elif said:
            yield "a checkpoint folder, running", "" if _is_ours(said) else f"it says {said!r}"
        yield f"a checkpoint folder, {name}, afterwards", bench.heals()


def _function_swapped(bench: Bench) -> Iterator[tuple[str, str]]:
    """A function that a process has loaded stays; whoever loads it later compares its file."""
    home = bench.folder / "rewards"
    home.mkdir()
    file = home / "row_rewards.py"
    first, other = FUNCTION.format(divisor=10), FUNCTION.format(divisor=20)
    component = {"kind": "function", "name": "scored", "function": "row_rewards:scored", "folder": str(home)}
    tree = bench.config.model_dump() | {"reward": {"components": [component]}}
    config = build_config(tree)
    bench.begin()
    file.write_text(first)
    if said := bench.ends(lambda: start(config, bench.run)):
        yield "a reward function", said
        return
    expected = fingerprint(bench.run)
    bench.begin()

    def work() -> None:
        with using_disk(MeddlingDisk(lambda: _replace(file, other.encode()))):
            start(config, bench.run)

    said = bench.ends(work)
    same = not said and fingerprint(bench.run) == expected
    yield "a reward function, running", "" if same or (said and _is_ours(said)) else said or "it came to other numbers"
    bench.begin()
    _replace(file, first.encode())

    def dies() -> None:
        with using_disk(MeddlingDisk(lambda: os._exit(9))):
            start(config, bench.run)

    bench.ends(dies)
    _replace(file, other.encode())
    said = bench.ends(lambda: go_on(bench.run))
    yield "a reward function, stopped", "" if "DriftError" in said else f"it says {said!r}"
    _replace(file, first.encode())
    yield "a reward function, afterwards", bench.heals(config, expected)


def files_that_lie(bench: Bench, effort: Effort) -> Iterator[tuple[str, str]]:
    """A tokenizer whose pattern may search for ever, and weights whose header says what is not so: refused at once."""
    for name, spoil in (
        ("a slow pattern", _slow_pattern),
        ("a header of tensors beyond the end", _header_beyond_the_end),
        ("a header longer than any model's", _long_header),
    ):
        reward = bench.folder / "lying"
        shutil.rmtree(reward, ignore_errors=True)
        shutil.copytree(effort.tiny.root / "reward", reward)
        spoil(reward)
        config = battery_config(effort.tiny, {"reward": {"components": [{"kind": "model", "model": str(reward)}]}})
        bench.begin()
        said = bench.ends(lambda config=config: start(config, bench.run))
        refused = "UserError" in said and not bench.run.exists()
        yield name, "" if refused else f"it says {said!r}" if said else "it was taken for what it says"


def _slow_pattern(folder: Path) -> None:
    file = folder / "tokenizer.json"
    tree = json.loads(file.read_text())
    tree["normalizer"] = {"type": "Replace", "pattern": {"Regex": SLOW_PATTERN}, "content": "a"}
    _replace(file, json.dumps(tree).encode())


def _header_beyond_the_end(folder: Path) -> None:
    """Every tensor is said to lie a GiB further on."""
    file = folder / "model.safetensors"
    size, data = struct.unpack("<Q", file.read_bytes()[:8])[0], file.read_bytes()
    header = json.loads(data[8 : 8 + size])
    for key, tensor in header.items():
        if key != "__metadata__":
            tensor["data_offsets"] = [at + 2**30 for at in tensor["data_offsets"]]
    told = json.dumps(header).encode()
    _replace(file, struct.pack("<Q", len(told)) + told + data[8 + size :])


def _long_header(folder: Path) -> None:
    """The same header behind so many spaces that it is longer than is read."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    told = data[8 : 8 + size] + b" " * (untrusted.MAX_HEADER_BYTES + 8 - size)
    _replace(file, struct.pack("<Q", len(told)) + told + data[8 + size :])


# ---------------------------------------------------------------------------------------------- libraries


def libraries(bench: Bench, _effort: Effort) -> Iterator[tuple[str, str]]:
    """Another version of a library while a run is stopped: refused, or accepted and recorded; and back again."""
    bench.begin(half=True)
    before = _state_of(bench.run)
    said = bench.ends(lambda: _upgraded(lambda: go_on(bench.run)))
    told = said if "DriftError" in said else ""
    yield "an upgrade", "" if told and _state_of(bench.run) == before else f"it says {said!r}, or it wrote"
    yield "an upgrade, undone", bench.heals()
    bench.begin(half=True)

    def accepted() -> None:
        record_drift(str(bench.run))
        go_on(bench.run)

    said = bench.ends(lambda: _upgraded(accepted))
    changes = [change for drift in RunFolder.open(bench.run).drifts for change in drift.changes]
    recorded = len(changes) == 1 and changes[0].startswith("versions.transformers: ")
    yield "an upgrade, accepted", said or ("" if recorded else f"recorded was {changes}")
    said = bench.ends(lambda: go_on(bench.run))
    yield "an upgrade, accepted and undone", "" if "DriftError" in said else f"it says {said!r}"


def _upgraded(work: Act) -> None:
    real = importlib.metadata.version
    importlib.metadata.version = lambda name: "99.1" if name == "transformers" else real(name)
    work()


def memory_limits(bench: Bench, effort: Effort) -> Iterator[tuple[str, str]]:
    """A limit of address space that a resumed run meets early or late."""
    for more in ENDS_SHORT[effort.size(1, 0) :]:
        bench.begin(half=True)
        told = bench.folder / "told.json"
        told.unlink(missing_ok=True)

        def work(more: int = more, told: Path = told) -> None:
            def at_once(flow: Any, *arguments: Any, **named: Any) -> Any:
                return flow.fn(*arguments, **named)

            everywhere(calling.run_flow, at_once)
            status: object = "it ended well"
            with calling.without_prefect(), contextlib.redirect_stderr(io.StringIO()) as printed:
                _limit(more << 20)
                try:
                    cli.main(["resume", str(bench.run)])
                except SystemExit as end:
                    status = end.code
                finally:
                    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            told.write_text(json.dumps({"status": status, "printed": printed.getvalue()}))

        said = bench.ends(work)
        found = json.loads(told.read_text()) if told.is_file() else {"status": said, "printed": said}
        if found["status"] == "it ended well" or found["status"] == 0:
            wrong = ""
        else:
            clear = found["status"] == cli.EXIT_MISTAKE and "memory" in found["printed"]
            wrong = (
                ""
                if clear and "Traceback" not in found["printed"]
                else f"{found['status']}: {found['printed'][-300:]!r}"
            )
        yield f"{more} MiB more", wrong
        yield f"{more} MiB more, afterwards", bench.heals()


def _limit(more: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGESIZE") + more, resource.RLIM_INFINITY))


# -------------------------------------------------------------------------------------------------- names


def names_in_other_case(bench: Bench, _effort: Effort) -> Iterator[tuple[str, str]]:
    """No two names of one folder differ by their case alone: a disk may take them for one."""
    for folder in [bench.whole, *(p for p in bench.whole.rglob("*") if p.is_dir())]:
        names = [p.name for p in folder.iterdir()]
        folded = {name.casefold() for name in names}
        if len(folded) != len(names):
            yield str(folder.relative_to(bench.whole)), f"{sorted(names)}"
    yield "names of a run", ""
    sources = ["News.jsonl", "news.jsonl", "NEWS.jsonl"]
    planned = [run.name for run in plan_runs(bench.config, {"prompts.source": sources}, [0, 1])]
    is_clear = len({name.casefold() for name in planned}) == len(planned) == len(sources) * 2
    yield "names of a sweep", "" if is_clear else f"two of these are one folder on such a disk: {planned}"
