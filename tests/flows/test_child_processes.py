"""Processes that a command starts: they end with it, however it ends, and what they said last is known."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import group, lives, until

from flows.child_processes import Child, end

SLEEPS = "import time; print('begun', flush=True); time.sleep(60)"
DEAF = "import signal, time; signal.signal(15, signal.SIG_IGN); print('begun', flush=True); time.sleep(60)"
WITH_A_CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {SLEEPS!r}])"
BREAKS_OFF = """
import sys, time
from pathlib import Path
from flows.child_processes import Child
child = Child([sys.executable, "-S", "-c", sys.argv[1]], Path(sys.argv[2]))
print(child.pid, flush=True)
time.sleep(60)
"""


def python(code: str, log: Path, **environment: str) -> Child:
    return Child([sys.executable, "-S", "-c", code], log, {**os.environ, **environment} if environment else None)


def test_what_it_said_last_and_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "hunter2-hunter2")
    log = tmp_path / "logs/a.log"
    log.parent.mkdir()
    log.write_text("of an earlier process\n")
    child = python("import os; print('one\\n\\ntwo', os.environ['SOME_API_KEY']); raise SystemExit(3)", log)
    until(lambda: child.poll() is not None)
    assert child.poll() == 3
    assert child.last_lines(20) == ["one", "two ***"], "its own, and no secret"
    assert child.last_lines(1) == ["two ***"]
    assert log.read_text().startswith("of an earlier process\n")


def test_told_to_end(tmp_path: Path) -> None:
    children = [python(SLEEPS, tmp_path / name) for name in ("a", "b")]
    until(lambda: all(child.last_lines(1) == ["begun"] for child in children))
    end(children, signal.SIGINT, grace_s=60)
    assert [child.poll() for child in children] == [130, 130], "by themselves: what has to be ended has 137"


def test_one_that_does_not_hear_is_ended_and_so_is_what_it_has_started(tmp_path: Path) -> None:
    deaf, parent = python(DEAF, tmp_path / "deaf"), python(WITH_A_CHILD, tmp_path / "parent")
    until(lambda: deaf.last_lines(1) == ["begun"] == parent.last_lines(1))
    assert len(group(parent.pid)) == 2
    end([deaf, parent], grace_s=0.3)
    until(lambda: not group(deaf.pid) and not group(parent.pid))
    assert deaf.poll() == 137


def test_it_does_not_outlive_a_parent_that_was_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BREAKS_OFF, SLEEPS, str(tmp_path / "log")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    until(lambda: (tmp_path / "log").read_text() == "begun\n")
    assert lives(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until(lambda: not lives(pid), 5)
