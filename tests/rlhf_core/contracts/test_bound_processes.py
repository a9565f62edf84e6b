"""A bound process ends when its parent is killed, and not when the thread ends that has started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import lives, until

from rlhf_core.contracts import bound_processes
from rlhf_core.contracts.bound_processes import BOUND_PID, start_bound

SLEEP = [sys.executable, "-S", "-c", "import time; print('begun', flush=True); time.sleep(60)"]
PARENT = """
import subprocess, sys, time
from rlhf_core.contracts.bound_processes import start_bound
child = start_bound([sys.executable, "-S", "-c", sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()  # it is what it was to become
print(child.pid, flush=True)
time.sleep(60)
"""
DEAF = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"
BUSY = "print(flush=True)\nwhile True: pass"
SELF_BOUND = """
import os, subprocess, sys, time
from rlhf_core.contracts.bound_processes import end_with_parent
if len(sys.argv) > 1:
    end_with_parent(int(sys.argv[1]))
    print(os.getpid(), flush=True)
else:
    subprocess.Popen([sys.executable, "-c", os.environ["SELF"], str(os.getpid())])
time.sleep(60)
"""


def kill_parent_of(code: str, *arguments: str, **environment: str) -> int:
    """Start a parent, kill it once it has a child; the child's PID."""
    command = [sys.executable, "-c", code, *arguments]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    return pid


def test_it_ends_with_a_parent_that_was_killed() -> None:
    for code in (DEAF, BUSY):
        pid = kill_parent_of(PARENT, code)
        until(lambda: not lives(pid), 5)  # noqa: B023 - called at once


def test_one_that_binds_itself_ends_with_its_parent() -> None:
    pid = kill_parent_of(SELF_BOUND, SELF=SELF_BOUND)
    until(lambda: not lives(pid), 5)


def test_one_whose_parent_is_gone_already_ends_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", SELF_BOUND, "1"], check=False, timeout=60, capture_output=True)
    assert (done.returncode, done.stdout) == (1, b"")


def test_it_outlives_the_thread_that_asked_for_it() -> None:
    started: list[subprocess.Popen[bytes]] = []

    def work() -> None:
        started.append(start_bound(SLEEP, stdout=subprocess.PIPE))
        assert started[0].stdout is not None
        started[0].stdout.readline()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (child,) = started
    assert child.stdout is not None
    time.sleep(0.3)
    assert child.poll() is None
    child.stdout.close()
    child.kill()
    assert child.wait() == -signal.SIGKILL


def test_its_own_exit_code_output_and_environment_are_kept(tmp_path: Path) -> None:
    code = f"import os; print(os.getpid(), os.environ[{BOUND_PID!r}]); raise SystemExit(3)"
    child = start_bound([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, cwd=tmp_path)
    output, _ = child.communicate(timeout=60)
    assert output.split() == [str(child.pid).encode()] * 2, "the same process, which its children find"
    assert child.returncode == 3


def test_an_error_of_the_start_is_the_callers(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        start_bound(SLEEP, cwd=tmp_path / "nowhere")


def test_one_that_nobody_waits_for_any_more_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while it starts."""
    made: list[subprocess.Popen[bytes]] = []

    class Interrupted(bound_processes.Future):
        def result(self, timeout: float | None = None) -> subprocess.Popen[bytes]:
            made.append(super().result(timeout))
            if len(made) == 1:
                raise KeyboardInterrupt
            return made[0]

    monkeypatch.setattr(bound_processes, "Future", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        start_bound(SLEEP)
    assert made[0].poll() == -signal.SIGKILL


def test_a_fork_starts_its_own() -> None:
    start_bound([sys.executable, "-S", "-c", ""]).wait()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            code = start_bound([sys.executable, "-S", "-c", "raise SystemExit(7)"]).wait()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
