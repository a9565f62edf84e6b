"""Worker processes: what they do, what happens when one dies, and that none outlives the process it works for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from chores import die, die_once, fail

from rlhf_core.contracts.errors import NumericalError, WorkerError
from tasks.shards.local_workers import LocalWorkers
from tasks.shards.workers import using_workers, workers

ROOT = Path(__file__).parents[2]


def write_pid(path: Path) -> None:
    path.write_text(str(os.getpid()))


def until(holds: Callable[[], bool], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def is_there(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def two() -> Iterator[LocalWorkers]:
    there = LocalWorkers(2)
    with using_workers(there):
        assert workers() is there
        yield there
    assert workers() is None


def test_calls_are_done_elsewhere_and_side_by_side(two: LocalWorkers, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda n: two.call("generate", "a note", write_pid, tmp_path / str(n)), range(6)))
    did = {int((tmp_path / str(n)).read_text()) for n in range(6)}
    assert did <= set(two.process_ids())
    assert os.getpid() not in did


def test_what_a_call_raises_is_raised_here(two: LocalWorkers) -> None:
    before = two.process_ids()
    with pytest.raises(NumericalError, match="i000000-p000001-s0"):
        two.call("score_rewards", "scores", fail, NumericalError("i000000-p000001-s0 has no finite score"))
    assert two.process_ids() == before


def test_a_worker_that_dies_is_replaced_and_its_call_done_again(
    two: LocalWorkers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = set(two.process_ids())
    two.call("generate", "generate of iteration 7, shard 1 of 2", die_once, tmp_path / "once")
    assert (tmp_path / "once").read_text() == "done"
    assert len(set(two.process_ids()) & before) == 1, "the other one has not noticed"
    assert "a worker died computing generate of iteration 7, shard 1 of 2" in caplog.text


def test_a_call_that_kills_every_worker_is_an_error_that_says_so(two: LocalWorkers, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"3 workers in a row died computing scores.*num_workers"):
        two.call("score_rewards", "scores", die)
    two.call("generate", "a note", write_pid, tmp_path / "after")
    assert (tmp_path / "after").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_none_outlives_the_process_it_works_for(number: int, tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from tasks.shards.local_workers import LocalWorkers\n"
        "if __name__ == '__main__':\n"
        "    there = LocalWorkers(2)\n"
        "    there.call('generate', 'a start', int, 0)\n"
        "    Path(sys.argv[1]).write_text(' '.join(map(str, there.process_ids())))\n"
        "    time.sleep(60)\n"
    )
    (tmp_path / "main.py").write_text(script)
    told = tmp_path / "pids"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    main = subprocess.Popen([sys.executable, str(tmp_path / "main.py"), str(told)], env=environment)
    try:
        assert until(lambda: told.exists() and len(told.read_text().split()) == 2)
        main.send_signal(number)
        main.wait(30)
        assert until(lambda: not any(is_there(int(pid)) for pid in told.read_text().split()))
    finally:
        main.kill()
