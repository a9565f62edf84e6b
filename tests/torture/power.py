"""A model of a disk that loses power: what may be found on it afterwards, for every moment of a real run.

A run is recorded, operation by operation (:class:`RecordingDisk`). :class:`Model` replays that and keeps apart what
is durable and what only the page cache knows. At a power cut any part of the latter may be there or not:

- of a file that was not synced: all, nothing, a beginning, zeros, or any choice of its 512-byte blocks;
- of a folder that was not synced: any choice of its new, renamed and removed names, in any order.

A journal keeps a prefix of the names only, so this is harsher than ext4, xfs and btrfs are. A rename is one step.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

from rlhf_core.contracts import durable
from rlhf_core.contracts.durable import Disk, is_leftover

BLOCK = 512
FOLDER, LINK = "folder", "link "
"""What stands in place of a digest: of a folder, and before the target of a link."""


FOREIGN = "foreign"
"""Marks an operation that a library did by itself."""
TALK = ("begin", "promise", "remove")
"""What a trace holds beside operations: what our code has said."""

# ---------------------------------------------------------------------------------------------- recording


@dataclass(frozen=True)
class Operation:
    """One line of a trace. Paths are relative to the recorded folder.

    Example: ``Operation("rename", "run/.run.json.0a1b2c3d.tmp", other="run/run.json")``
    """

    kind: str
    """create, write, fsync, rename, symlink, mkdir, unlink, rmdir; or one of TALK."""
    path: str
    other: str = ""
    """Target of a rename or link; digest of a file that was promised."""
    data: bytes = b""

    def to_line(self) -> str:
        return json.dumps([self.kind, self.path, self.other, base64.b64encode(self.data).decode()])

    @classmethod
    def of_line(cls, line: str) -> Operation:
        kind, path, other, data = json.loads(line)
        return cls(kind, path, other, base64.b64decode(data))


class RecordingDisk(Disk):
    """A disk that notes each operation that has been done, in a file; and may kill the process after one of them.

    Args:
        root: the folder that is watched.
        trace: the file, appended to.
        die_after: number of operations until this process is gone; None: it lives.
    """

    def __init__(self, root: Path, trace: Path, die_after: int | None = None) -> None:
        self.root, self.die_after = root, die_after
        self._open: dict[int, Path] = {}
        self._known = set(root.rglob("*"))
        self._trace = trace.open("a")

    def will(self, kind: str, path: Path) -> None:
        """Called before each operation, to do something about it."""

    def note(self, kind: str, path: Path, other: str = "", data: bytes = b"") -> None:
        if path == self.root or self.root in path.parents:
            self._trace.write(Operation(kind, str(path.relative_to(self.root)), other, data).to_line() + "\n")
            self._trace.flush()

    def _did(self, kind: str, path: Path, other: str = "", data: bytes = b"") -> None:
        self.note(kind, path, other, data)
        self._known.add(path)
        if self.die_after is not None:
            self.die_after -= 1
            if self.die_after < 0:
                os._exit(9)

    def _find_foreign(self, path: Path) -> None:
        """Note what a library wrote by itself into a folder that is being filled: written, and not synced."""
        for filled in [p for p in path.parents if is_leftover(p) and self.root in p.parents]:
            for found in sorted(filled.rglob("*")):
                if found not in self._known:
                    self._known.add(found)
                    if found.is_dir():
                        self.note("mkdir", found, FOREIGN)
                    else:
                        self.note("create", found, FOREIGN)
                        self.note("write", found, FOREIGN, found.read_bytes())

    def create(self, path: Path) -> int:
        self._find_foreign(path)
        self.will("create", path)
        descriptor = super().create(path)
        self._open[descriptor] = path
        self._did("create", path)
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        self.will("write", self._open[descriptor])
        written = super().write(descriptor, data)
        self._did("write", self._open[descriptor], data=bytes(data[:written]))
        return written

    def open(self, path: Path) -> int:
        self._find_foreign(path)
        descriptor = super().open(path)
        self._open[descriptor] = path
        return descriptor

    def fsync(self, descriptor: int) -> None:
        self.will("fsync", self._open[descriptor])
        super().fsync(descriptor)
        self._did("fsync", self._open[descriptor])

    def rename(self, source: Path, target: Path) -> None:
        self._find_foreign(source / "x")
        self.will("rename", source)
        super().rename(source, target)
        self._open = {fd: target if path == source else path for fd, path in self._open.items()}
        self._did("rename", source, str(target.relative_to(self.root)) if self.root in target.parents else "")

    def symlink(self, path: Path, target: str) -> None:
        self.will("symlink", path)
        super().symlink(path, target)
        self._did("symlink", path, target)

    def mkdir(self, path: Path) -> None:
        self.will("mkdir", path)
        super().mkdir(path)
        self._did("mkdir", path)

    def unlink(self, path: Path) -> None:
        self.will("unlink", path)
        super().unlink(path)
        self._did("unlink", path)

    def rmdir(self, path: Path) -> None:
        self.will("rmdir", path)
        super().rmdir(path)
        self._did("rmdir", path)

    def lock(self, path: Path) -> int:
        self.will("lock", path)
        return super().lock(path)

    def reader(self, path: Path) -> BufferedReader:
        self.will("read", path)
        return super().reader(path)


def everywhere(function: object, replacement: object) -> None:
    """Put another function in place of one, under every name that a module of ours has imported it by."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("rlhf_core", "tasks", "flows", "torture", "iteration"):
            for attribute in [a for a, value in vars(module).items() if value is function]:
                setattr(module, attribute, replacement)


def record(work: Callable[[], object], disk: RecordingDisk) -> None:
    """Do some work of ours in this process, which is a forked child, and let a disk write its trace.

    What it has said is noted too: that a write begins, and that it is done and promised to last.
    """
    write_file, write_folder, write_link = durable.write_file, durable.write_folder, durable.write_link
    remove_folder, remove_file = durable.remove_folder, durable.remove_file

    def told_file(path: Path, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        disk.note("begin", path, digest)
        result = write_file(path, data)
        disk.note("promise", path, digest)
        return result

    def told_folder(path: Path, *arguments: Any) -> dict[str, str]:
        digests = write_folder(path, *arguments)
        for name, digest in digests.items():
            disk.note("promise", path / name, digest)
        disk.note("promise", path / "manifest.json", durable.hash_file(path / "manifest.json"))
        return digests

    def told_link(path: Path, target: str) -> None:
        disk.note("begin", path, LINK + target)
        write_link(path, target)
        disk.note("promise", path, LINK + target)

    def told_removal(remove: Callable[[Path], None]) -> Callable[[Path], None]:
        def removal(path: Path) -> None:
            disk.note("remove", path)
            remove(path)

        return removal

    everywhere(write_file, told_file)
    everywhere(write_folder, told_folder)
    everywhere(write_link, told_link)
    everywhere(remove_folder, told_removal(remove_folder))
    everywhere(remove_file, told_removal(remove_file))
    with durable.using_disk(disk), even_clock():
        work()


@contextmanager
def even_clock() -> Iterator[None]:
    """Let each look at the clock take a millisecond: equal runs then have equal timings, and equal files."""
    before, ticks = time.perf_counter, iter(range(1, sys.maxsize))
    time.perf_counter = lambda: next(ticks) * 1e-3
    try:
        yield
    finally:
        time.perf_counter = before


def read_trace(path: Path) -> list[Operation]:
    """The operations of a trace."""
    return [Operation.of_line(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ the model


@dataclass
class Node:
    """A file, folder or link, with what is durable of it and what is not."""

    kind: str
    """file, folder, link"""
    data: bytes = b""
    durable: bytes = b""
    names: dict[str, Node] = field(default_factory=dict[str, "Node"])
    """Of a folder: as programs see it now."""
    durable_names: dict[str, Node] = field(default_factory=dict[str, "Node"])
    pending: list[dict[str, Node | None]] = field(default_factory=list[dict[str, "Node | None"]])
    """Changes of names since the last fsync; each happens as a whole or not at all."""
    digests: dict[bytes, str] = field(default_factory=dict[bytes, str])

    def change(self, names: dict[str, Node | None]) -> None:
        self.pending.append(names)
        apply(self.names, names)

    def digest(self, data: bytes) -> str:
        if data not in self.digests:
            self.digests[data] = hashlib.sha256(data).hexdigest()
        return self.digests[data]


def apply(names: dict[str, Node], change: Mapping[str, Node | None]) -> None:
    """Change the names of a folder."""
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


Contents = dict[str, tuple[str, bytes]]
"""Relative path -> (digest, or what kind of thing it is; the bytes of a file)."""


CHECKPOINT = re.compile(r"checkpoints/\d+/manifest\.json$")


class Model:
    """A disk in memory, after some operations of a trace.

    Args:
        trace: all of it, to know what was meant.
    """

    def __init__(self, trace: Iterable[Operation] = ()) -> None:
        self.root = Node("folder")
        self.promised: dict[str, set[str]] = {}
        """Relative path -> digests of which one must be there, whatever happens."""
        self.has_checkpoint = False
        """One was promised at some time: from then on there must be one."""
        self.whole: dict[str, set[str]] = {}
        """Relative path -> digests of all that was ever meant to be there."""
        for op in trace:
            if op.kind in ("begin", "promise"):
                self.whole.setdefault(op.path, set()).add(op.other)

    @classmethod
    def of(cls, contents: Contents) -> Model:
        """One whose promises are the files that are there, but for leftovers."""
        model = cls()
        model.promised = {p: {d} for p, (d, _) in visible(contents).items() if d != FOLDER}
        return model

    def say(self, op: Operation) -> None:
        """Only what an operation means for the promises."""
        if op.kind in TALK:
            self.do(op)

    def do(self, op: Operation) -> None:
        """One more operation."""
        match op.kind:
            case "create":
                self._parent(op.path).change({_name(op.path): Node("file")})
            case "mkdir":
                self._parent(op.path).change({_name(op.path): Node("folder")})
            case "symlink":
                self._parent(op.path).change({_name(op.path): Node("link", op.other.encode())})
            case "write":
                self._node(op.path).data += op.data
            case "rename":
                parent, node = self._parent(op.path), self._node(op.path)
                if parent is not self._parent(op.other):
                    raise NotImplementedError("a rename from one folder to another is two changes")
                parent.change({_name(op.path): None, _name(op.other): node})
            case "unlink" | "rmdir":
                self._parent(op.path).change({_name(op.path): None})
            case "fsync":
                node = self._node(op.path)
                node.durable, node.durable_names, node.pending = node.data, dict(node.names), []
            case "begin":
                if op.path in self.promised:
                    self.promised[op.path].add(op.other)
            case "promise":
                self.promised[op.path] = {op.other}
                self.has_checkpoint = self.has_checkpoint or CHECKPOINT.search(op.path) is not None
            case "remove":
                gone = [p for p in self.promised if p == op.path or p.startswith(op.path + "/")]
                for path in gone:
                    del self.promised[path]
            case kind:
                raise ValueError(f"unknown operation {kind}")

    def num_ways(self) -> int:
        """How much a power cut may decide now: 0 nothing, 1 names only, 2 also bytes."""
        return self._num_ways(self.root)

    def _num_ways(self, node: Node) -> int:
        here = 2 if node.data != node.durable else 1 if node.pending else 0
        return max([here, *(self._num_ways(child) for child in node.names.values() if child.kind != "link")])

    def after_cut(self, choose: Choice) -> Contents:
        """What is on the disk after a power cut that went as ``choose`` says."""
        found: Contents = {}
        self._walk(self.root, "", choose, found)
        return found

    def broken_promises(self, contents: Contents) -> list[str]:
        """One sentence for each promise that does not hold."""
        return [
            f"{path} is {'damaged' if path in contents else 'lost'}, though it was promised"
            for path, digests in self.promised.items()
            if path not in contents or contents[path][0] not in digests
        ]

    def torn(self, contents: Contents) -> list[str]:
        """One sentence for each thing that looks committed and is not whole."""
        found: list[str] = []
        for path, (digest, data) in visible(contents).items():
            if digest in (FOLDER, "") or path not in self.whole:
                continue
            if digest not in self.whole[path]:
                found.append(f"{path} is not what any write has put there")
            elif re.search(r"iterations/\d+/\w+\.json$", path):
                artifact, expected = path.removesuffix(".json") + ".arrow", json.loads(data)["artifact"]["sha256"]
                if contents.get(artifact, ("",))[0] != expected:
                    found.append(f"{path} commits an artifact that is not there")
        if self.has_checkpoint and not any(CHECKPOINT.search(path) for path in visible(contents)):
            found.append("no checkpoint is left, though there was one")
        return found

    def _walk(self, folder: Node, prefix: str, choose: Choice, found: Contents) -> None:
        names = folder.names
        if folder.pending:
            names = dict(folder.durable_names)
            for change in choose.names(folder.pending):
                apply(names, change)
        for name, node in names.items():
            path = prefix + name
            if node.kind == "folder":
                found[path] = (FOLDER, b"")
                self._walk(node, path + "/", choose, found)
            elif node.kind == "link":
                found[path] = (LINK + node.data.decode(), node.data)
            elif node.data == node.durable:
                found[path] = (node.digest(node.data), node.data)
            else:
                data = choose.data(node.data, node.durable)
                found[path] = (hashlib.sha256(data).hexdigest(), data)

    def _node(self, path: str) -> Node:
        node = self.root
        for part in Path(path).parts:
            node = node.names[part]
        return node

    def _parent(self, path: str) -> Node:
        return self._node(str(Path(path).parent))


class Choice:
    """Decides by dice what a power cut leaves.

    Args:
        dice: of this cut.
        keep_names: the chance of each name that was not synced.
        keep_data: the chance that a file that was not synced is whole; else it is damaged in one of six ways.
    """

    def __init__(self, dice: random.Random, keep_names: float, keep_data: float) -> None:
        self.dice, self.keep_names, self.keep_data = dice, keep_names, keep_data

    def names(self, pending: list[dict[str, Node | None]]) -> list[dict[str, Node | None]]:
        """The changes of a folder that happened."""
        return [change for change in pending if self.dice.random() < self.keep_names]

    def data(self, data: bytes, durable: bytes) -> bytes:
        """The bytes of a file that was not synced."""
        if self.dice.random() < self.keep_data:
            return data
        cut = self.dice.randrange(len(data)) if data else 0
        match self.dice.randrange(6):
            case 0:
                return durable
            case 1:
                return bytes(len(data))
            case 2:
                return data[:cut]
            case 3:
                return data[: cut - cut % BLOCK]
            case 4:
                start = cut - cut % BLOCK
                return data[:start] + bytes(len(data[start : start + BLOCK])) + data[start + BLOCK :]
            case _:
                blocks = [data[i : i + BLOCK] for i in range(0, len(data), BLOCK)]
                return b"".join(b if self.dice.random() < 0.5 else bytes(len(b)) for b in blocks)


CORNERS = ((1.0, 1.0), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0))
"""(keep_names, keep_data) of the cuts that are tried at every point: all, nothing, names only, data only."""


def cuts(dice: random.Random, count: int) -> Iterator[Choice]:
    """So many power cuts: the four corners, then any mixture."""
    for index in range(count):
        names, data = (
            CORNERS[index] if index < len(CORNERS) else (dice.choice((0.2, 0.5, 0.8)), dice.choice((0.1, 0.6)))
        )
        yield Choice(dice, names, data)


def digest_of(contents: Contents) -> str:
    """Identity of a whole disk."""
    return hashlib.sha256("\n".join(f"{p} {d}" for p, (d, _) in sorted(contents.items())).encode()).hexdigest()


def visible(contents: Contents) -> Contents:
    """What a reader sees: without temporary names and whatever is below them."""
    return {p: v for p, v in contents.items() if not any(is_leftover(Path(part)) for part in p.split("/"))}


def materialise(contents: Contents, folder: Path) -> None:
    """Put a disk of the model on a real one."""
    for path, (kind, data) in sorted(contents.items()):
        place = folder / path
        if kind == FOLDER:
            place.mkdir(parents=True, exist_ok=True)
        elif kind.startswith(LINK):
            place.symlink_to(data.decode())
        else:
            place.write_bytes(data)


def contents_of(folder: Path) -> Contents:
    """A real folder, as the model has it."""
    found: Contents = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            target = str(path.readlink())
            found[name] = (LINK + target, target.encode())
        elif path.is_dir():
            found[name] = (FOLDER, b"")
        else:
            data = path.read_bytes()
            found[name] = (hashlib.sha256(data).hexdigest(), data)
    return found


def _name(path: str) -> str:
    return Path(path).name
