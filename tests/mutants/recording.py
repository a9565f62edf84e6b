"""Records which test file calls which function of the packages, also in processes that tests start.

A pytest plugin (``-p mutants.recording``). ``RLHF_RECORD`` names the folder for its files; every process appends to one
of its own, a line for each function at its first call: the test file, the source file and the qualified name. Children
that are started with the interpreter record too, since ``site/sitecustomize.py`` stands first on PYTHONPATH.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

ROOT = str(Path(__file__).parents[2]) + os.sep
PACKAGES = tuple(ROOT + name + os.sep for name in ("flows", "tasks", "rlhf_core"))
FOLDER = "RLHF_RECORD"
_known: dict[int, CodeType] = {}
"""Code objects that were seen, by identity: to hash one takes longer than most calls. The value keeps it alive."""
_ours: list[CodeType] = []
_test = ""
_pid = 0
_file = -1


def start() -> None:
    """Record from here on, in this thread and in those that begin later."""
    global _test  # noqa: PLW0603 - of this process
    _test = os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0]
    threading.settrace(_called)
    sys.settrace(_called)
    atexit.register(sys.settrace, None)


def _called(frame: FrameType, _event: str, _argument: object) -> None:
    code = frame.f_code
    if id(code) in _known:
        return
    _known[id(code)] = code
    if code.co_filename.startswith(PACKAGES):
        _ours.append(code)
        if _test:
            _note(f"{_test}\t{code.co_filename.removeprefix(ROOT)}\t{code.co_qualname}\n")


def _note(line: str) -> None:
    global _pid, _file  # noqa: PLW0603 - a forked child writes to a file of its own
    if _pid != os.getpid():
        _pid = os.getpid()
        path = Path(os.environ[FOLDER]) / f"{_pid}.calls"
        _file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    os.write(_file, line.encode())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """Name the test file, and forget what an earlier one has called."""
    global _test  # noqa: PLW0603 - of this process
    test = item.nodeid.partition("::")[0]
    if test != _test:
        for code in _ours:
            del _known[id(code)]
        _ours.clear()
        _test = test
    if sys.gettrace() is not _called:
        start()
        _test = test
    before, cpu = time.perf_counter(), _cpu_s()
    result = yield
    record = {"test": item.nodeid, "seconds": time.perf_counter() - before, "cpu_s": _cpu_s() - cpu}
    with (Path(os.environ[FOLDER]) / f"{os.getpid()}.tests").open("a") as file:
        file.write(json.dumps(record) + "\n")
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note a test that fails without any bug: it can catch none."""
    if report.failed:
        with (Path(os.environ[FOLDER]) / f"{os.getpid()}.failed").open("a") as file:
            file.write(f"{report.nodeid}\n")


def _cpu_s() -> float:
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system
