"""Locks on disks that have none: one holder at a time, and the lock of a process that has died is free."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.contracts import locking
from rlhf_core.contracts.durable import remove_file, write_file, write_folder
from rlhf_core.contracts.errors import RunLockedError, StorageError
from rlhf_core.contracts.locking import holding, is_held

NO_FLOCK = """
import errno, fcntl, os, sys, time
def flock(descriptor, how):
    raise OSError(errno.ENOSYS, "Function not implemented")
fcntl.flock = flock
from pathlib import Path
from rlhf_core.contracts import locking
from rlhf_core.contracts.errors import RunLockedError
from rlhf_core.contracts.locking import holding
lock, winners, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
"""
HOLDS = (
    NO_FLOCK
    + """
with holding(lock, "a run"):
    print("held", flush=True)
    time.sleep(60)
"""
)
RACES = (
    NO_FLOCK
    + """
try:
    with holding(lock, "a run"):
        (winners / str(os.getpid())).mkdir()
        assert len(list(winners.iterdir())) == 1, "two hold it"
        time.sleep(float(how))
        (winners / str(os.getpid())).rmdir()
        print("won")
except RunLockedError:
    print("refused")
"""
)


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK])
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_descriptor: int, _how: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


def start(script: str, folder: Path, how: str = "") -> subprocess.Popen[str]:
    (folder / "winners").mkdir(exist_ok=True)
    command = [sys.executable, "-c", script, str(folder / "lock"), str(folder / "winners"), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A lock whose holder was killed."""
    process = start(HOLDS, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return tmp_path / "lock"


@pytest.mark.usefixtures("no_flock")
def test_one_process_holds_it_and_lets_it_go(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with holding(lock, "the run"):
        assert is_held(lock)
        with (
            pytest.raises(RunLockedError, match=rf"another process \({os.getpid()}\) is working on the run"),
            holding(lock, "the run"),
        ):
            pass
    assert not is_held(lock)
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]


@pytest.mark.usefixtures("no_flock")
def test_the_lock_of_a_killed_process_is_free(killed: Path) -> None:
    assert killed.with_name("lock.held").exists()
    assert not is_held(killed)
    with holding(killed, "the run"):
        assert is_held(killed)
    assert not killed.with_name("lock.held").exists()


@pytest.mark.usefixtures("no_flock")
@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"machine": "another"}, {"pids": "pid:[1]"}])
def test_what_nobody_here_can_know_is_refused_with_what_to_do(killed: Path, other: dict[str, Any]) -> None:
    held = killed.with_name("lock.held")
    held.write_text(json.dumps(json.loads(held.read_text()) | other))
    assert is_held(killed)
    with pytest.raises(RunLockedError, match=r"is working on the run"), holding(killed, "the run"):
        pass
    if "host" in other:
        with pytest.raises(RunLockedError, match=r"of 'elsewhere' .* remove .*lock\.held"), holding(killed, "the run"):
            pass


@pytest.mark.usefixtures("no_flock")
def test_a_lock_from_before_the_machine_started_is_free(killed: Path) -> None:
    held = killed.with_name("lock.held")
    held.write_text(json.dumps(json.loads(held.read_text()) | {"boot": "before", "pid": os.getpid()}))
    with holding(killed, "the run"):
        pass


@pytest.mark.usefixtures("no_flock")
def test_a_disk_without_locks_and_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with (
        pytest.raises(StorageError, match=r"neither lock files nor link them .* choose another disk"),
        holding(tmp_path / "lock", "the run"),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]


@pytest.mark.usefixtures("no_flock")
def test_whoever_was_faster_keeps_it(killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, judge = killed.with_name("lock.held"), locking._has_ended
    dead = json.loads(held.read_text())
    faster = dead | {"pid": os.getpid(), "began": locking._began(os.getpid()), "token": "of another"}

    def judged(holder: dict[str, Any]) -> bool:
        if holder == dead:
            held.write_text(json.dumps(faster))
            return True
        return judge(holder)

    monkeypatch.setattr(locking, "_has_ended", judged)
    with pytest.raises(RunLockedError), holding(killed, "the run"):
        pass
    assert json.loads(held.read_text()) == faster


def test_of_many_that_find_a_dead_one_at_most_one_holds_it_at_a_time(killed: Path) -> None:
    processes = [start(RACES, killed.parent, "0.5") for _ in range(6)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert said.count("won\n") >= 1


HOST_OF_ITS_OWN = """
import socket, sys
from pathlib import Path
from rlhf_core.contracts import locking
from rlhf_core.contracts.locking import holding
locking._flock = lambda descriptor, how: True
socket.gethostname = lambda: "elsewhere"
with holding(Path(sys.argv[1]), "the run"):
    print("held", flush=True)
    sys.stdin.read()
"""


class TestAnotherHostThatIsGivenTheSameLock:
    @pytest.fixture
    def elsewhere(self, tmp_path: Path) -> Iterator[Callable[[], Callable[[], None]]]:
        """Lets another host take the lock; what it returns lets it go."""
        started: list[subprocess.Popen[str]] = []

        def take() -> Callable[[], None]:
            command = [sys.executable, "-c", HOST_OF_ITS_OWN, str(tmp_path / "lock")]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            started.append(process)
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            return lambda: (process.communicate(), None)[1]

        yield take
        for process in started:
            process.kill()
            process.communicate()

    @pytest.mark.parametrize("has_ended", [False, True])
    def test_the_first_one_writes_no_more(self, has_ended: bool, tmp_path: Path, elsewhere: Any) -> None:
        with holding(tmp_path / "lock", "the run"):
            write_file(tmp_path / "more" / "file", b"first")
            let_go = elsewhere()
            if has_ended:
                let_go()
            for change in (
                lambda: write_file(tmp_path / "more" / "file", b"second"),
                lambda: write_folder(tmp_path / "folder", lambda _: None, lambda _: b"{}"),
                lambda: remove_file(tmp_path / "more" / "file"),
            ):
                with pytest.raises(RunLockedError, match=r"has taken over the run"):
                    change()
            write_file(tmp_path.with_name("beside"), b"not its business")
        assert (tmp_path / "more" / "file").read_bytes() == b"first"
        assert not (tmp_path / "folder").exists()
        assert (tmp_path / "lock.held").exists() != has_ended

    def test_the_second_one_says_so(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "lock.held").write_text(json.dumps({"host": "elsewhere", "pid": 7, "boot": "x", "machine": "y"}))
        with holding(tmp_path / "lock", "the run"):
            write_file(tmp_path / "file", b"second")
        assert "process 7 of 'elsewhere' was working on the run" in caplog.text

    def test_a_pipe_in_its_place_is_replaced(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "lock.held")
        with holding(tmp_path / "lock", "the run"):
            write_file(tmp_path / "file", b"mine")
        assert not (tmp_path / "lock.held").exists()


def test_a_disk_without_locks_whose_file_was_removed(no_flock: None, tmp_path: Path) -> None:
    with holding(tmp_path / "lock", "the run"):
        (tmp_path / "lock.held").unlink()
        with pytest.raises(RunLockedError, match="another process has taken over the run"):
            write_file(tmp_path / "file", b"mine")
