"""The watch sees a payload that runs, and the fuzzer a mutant that crashes: so those rows can fail."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torture.break_in import Seen, open_door
from torture.lair import Lair
from torture.mutants import mutate_bytes, mutate_tree
from torture.payloads import PAYLOADS
from torture.rows import fuzz, malicious

from rlhf_core.contracts.errors import IntegrityError


def load(tmp_path: Path, tiny: Any, act: Callable[[Lair], object]) -> Seen:
    for room in ("cache", "tmp"):
        (tmp_path / room).mkdir()
    return open_door(tmp_path, "planted", Lair(tmp_path / "0", tiny, tmp_path), lambda lair: lambda: act(lair))


def _unpickle(lair: Lair) -> None:
    import pickle

    pickle.loads(lair.pickled)


def _connect(_: Lair) -> None:
    import socket

    socket.create_connection(("127.0.0.1", 9))


ACTS: dict[str, tuple[Callable[[Lair], object], str]] = {
    "a shell": (lambda lair: os.system(lair.command), "os.system"),
    "a process": (lambda lair: subprocess.run(["touch", str(lair.canary)], check=True), "subprocess.Popen"),
    "a pickle": (_unpickle, "pickle.find_class"),
    "a connection": (_connect, "socket."),
    "a file outside": (lambda lair: lair.canary.touch(), "open"),
    "a folder outside": (lambda lair: (lair.folder / "x").mkdir(), "os.mkdir"),
    "a library": (lambda lair: ctypes.CDLL("libm.so.6"), "ctypes.dlopen"),
    "code of the folder": (lambda lair: exec(compile("1", str(lair.folder / "x.py"), "exec")), "compile"),
}


@pytest.mark.parametrize("act", list(ACTS))
def test_what_a_payload_does_is_seen(tmp_path: Path, tiny: Any, act: str) -> None:
    seen = load(tmp_path, tiny, ACTS[act][0])
    assert not seen.is_good
    assert any(event.startswith(ACTS[act][1]) for event in seen.events), seen
    assert "planted" in malicious.failure(seen)


def test_a_raw_error_is_seen_and_an_error_of_ours_is_not_one(tmp_path: Path, tiny: Any) -> None:
    def refuse(_: Lair) -> None:
        raise IntegrityError("damaged")

    seen = load(tmp_path, tiny, lambda _: {}["x"])
    assert (seen.outcome, seen.is_good) == ("a raw error", False)
    (tmp_path / "again").mkdir()
    assert load(tmp_path / "again", tiny, refuse) == Seen("planted", "refused", "damaged")


def test_there_are_enough_payloads_and_some_of_each_room_in_the_small_battery() -> None:
    assert len({name.partition("[")[0] for name in PAYLOADS}) >= 60
    assert len(malicious.small_names()) >= malicious.SMALL


READERS: dict[str, tuple[Callable[[random.Random], object], str]] = {
    "crash": (lambda random_: os.kill(os.getpid(), signal.SIGKILL), "the process died (-9)"),
    "hang": (lambda random_: _for_ever(), "it hangs"),
    "raw": (lambda random_: {}["x"], "KeyError: 'x'"),
    "silent": (lambda random_: fuzz._must_refuse(lambda: 1), "AssertionError: silently accepted: 1"),
    "memory": (lambda random_: bytes(16 << 30), "MemoryError"),
}


def _for_ever() -> None:
    while True:
        pass


@pytest.mark.parametrize("kind", list(READERS))
def test_a_mutant_that_ends_otherwise_is_named(
    tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    act, said = READERS[kind]
    third = random.Random(f"{fuzz.SEED} planted 2").random()
    monkeypatch.setattr(fuzz, "HANG_S", 0.5)
    monkeypatch.setitem(
        fuzz.KINDS, "planted", lambda bed: lambda random_: act(random_) if random_.random() == third else None
    )
    log = tmp_path / "log"
    log.touch()
    told = list(fuzz._read_chunk("planted", 0, 5, fuzz.Bed(tmp_path, tiny, tmp_path), log))
    (line,) = [*told, *log.read_text().splitlines()]
    assert line.startswith(f"planted 2: {said}"), line


def test_a_mutant_is_another_one_each_time_and_the_same_again() -> None:
    data, tree = b'{"a": [1, 2, "three"]}' * 4, {"a": [1, {"b": "c"}], "d": None}
    mutants = [mutate_bytes(random.Random(i), data) for i in range(300)]
    assert data not in mutants
    assert len(set(mutants)) > 250
    assert mutants == [mutate_bytes(random.Random(i), data) for i in range(300)]
    trees = [mutate_tree(random.Random(i), tree) for i in range(100)]
    assert sum(t != tree for t in trees) > 90
    assert tree == {"a": [1, {"b": "c"}], "d": None}
