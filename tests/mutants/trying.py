"""Plants one bug in a copy of the tree and runs tests against it, in a child that is forked from warm libraries."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mutants.bugs import ROOT, Bug
from mutants.coverage import KEPT, Coverage, tests_of_users, tests_that_name

LIBRARIES: Final = (
    "torch", "numpy", "pyarrow", "pyarrow.compute", "pydantic", "ruamel.yaml", "httpx", "safetensors.torch", "pytest",
    "hypothesis", "transformers", "transformers.models.gpt2.modeling_gpt2", "rich.console", "typer",
)  # fmt: skip
"""Imported before the forks. None of them starts a thread, which a child would lack."""
QUIETLY: Final = ("-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
"""Does not mind that a library with a plugin was imported before pytest began."""
DEADLINE_S: Final = 900.0
"""A bug that makes tests hang is caught."""
REST: Final = "(exhaustive or slow or browser) and not gpu and not torture"
REST_DEADLINE_S: Final = 5400.0


@dataclass(frozen=True)
class Result:
    """What became of a bug."""

    key: str
    """Digest of the bug, of the file that holds it, and of the tests that decided."""
    caught_by: str
    """The first test that failed; "" if none did."""
    tier: str
    """``fast`` or ``all``: where it was caught; ``escaped``: nowhere; ``unsure``: the rest was not run."""
    num_files: int
    """Test files that ran the bug."""
    seconds: float


def warm() -> None:
    """Import the libraries that every test file imports."""
    from environment import be_quiet_and_private

    be_quiet_and_private()
    for name in LIBRARIES:
        importlib.import_module(name)


def result_key(bug: Bug, tests: Sequence[str]) -> str:
    """Digest of all that a kept result depends on: it is used again while that stays."""
    digest = hashlib.sha256("\0".join((bug.file, bug.text, bug.replacement)).encode())
    for name in (bug.file, "tests/conftest.py", *sorted(tests)):
        path = ROOT / name
        digest.update(path.read_bytes() if path.is_file() else b"gone")
    return digest.hexdigest()[:24]


def is_current(bug: Bug, result: Result, covering: Coverage) -> bool:
    """Whether a kept result still holds: the file, the bug and the tests that decided are the same."""
    caught = result.tier in ("fast", "all")
    return result.key == result_key(bug, [_file(result.caught_by)] if caught else covering.tests_of(bug))


def try_bug(bug: Bug, covering: Coverage, place: Path, *, own_only: bool, with_rest: bool) -> Result:
    """Run the tests that cover a bug until one fails.

    Args:
        place: a copy of the tree (:func:`copy_tree`) that nobody else uses meanwhile.
        own_only: run the module's own tests alone, or those next to it where it has none.
        with_rest: whether a bug that escapes the fast tier meets every other test.
    """
    tests, begun, path = covering.tests_of(bug), time.monotonic(), place / bug.file
    source = (ROOT / bug.file).read_text(encoding="utf-8")
    caught_by, tier = "", "unsure"
    path.write_text(bug.planted(source), encoding="utf-8")
    try:
        for files in [group for group in _groups(bug, tests) if group][: 1 if own_only else None]:
            if not caught_by:
                caught_by = next(iter(failing(place, [*files, *_deselected(covering)], DEADLINE_S)), "")
        if caught_by:
            tier = "fast"
        elif with_rest:
            caught_by = next(iter(failing(place, ["tests", "-m", REST], REST_DEADLINE_S)), "")
            tier = "all" if caught_by else "escaped"
    finally:
        path.write_text(source, encoding="utf-8")
    key = result_key(bug, [_file(caught_by)] if caught_by else tests)
    return Result(key, caught_by, tier, len(tests), round(time.monotonic() - begun, 1))


def _groups(bug: Bug, tests: Sequence[str]) -> list[list[str]]:
    """The module's own tests, those of the core that name or use it, others of the core, and then the rest."""
    near, own = tests_that_name(bug.file) | tests_of_users(bug.file), f"test_{Path(bug.file).stem}"
    groups: list[list[str]] = [[], [], [], []]
    for test in tests:
        in_core = test.startswith("tests/rlhf_core/")
        groups[0 if Path(test).stem == own else 1 if test in near and in_core else 2 if in_core else 3].append(test)
    return groups


def _deselected(covering: Coverage) -> list[str]:
    return [word for name in covering.failed for word in ("--deselect", name)]


def _file(test: str) -> str:
    return test.partition("::")[0]


class _Failures:
    """A pytest plugin that writes down the tests and files that fail."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_text("")

    def _note(self, report: Any) -> None:
        if report.failed:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{report.nodeid}\n")

    pytest_runtest_logreport = _note
    pytest_collectreport = _note


def failing(place: Path, arguments: Sequence[str], deadline_s: float, *, until_first: bool = True) -> list[str]:
    """Run pytest in a forked child; returns the tests that fail: the first one, or all."""
    log, failed = place.parent / f"{place.name}.log", place.parent / f"{place.name}.failed"
    sys.stdout.flush()
    child = os.fork()
    if not child:
        _become_pytest(place, [*QUIETLY, *["-x"] * until_first, *arguments], log, failed)
    until = time.monotonic() + deadline_s
    ended, status = 0, 0
    while not ended and time.monotonic() < until:
        time.sleep(0.1)
        ended, status = os.waitpid(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # also servers and workers that a failed test has left
    if not ended:
        os.waitpid(child, 0)
        return [f"{arguments[0]}::(hangs)"]
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return []
    names = failed.read_text().splitlines()
    if not names and code not in (1, 2):
        raise RuntimeError(f"pytest ended with {code} without a failed test; see {log}")
    return names or [f"{arguments[0]}::(exit code {code})"]


def _become_pytest(place: Path, arguments: Sequence[str], log: Path, failed: Path) -> None:
    code = 70
    try:
        os.setpgid(0, 0)
        os.chdir(place)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        for name in [name for name in sys.modules if name.partition(".")[0] in ("mutants", "environment")]:
            del sys.modules[name]
        paths = [str(place), str(place / "tests")]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        sys.path[:] = [*paths, *(path for path in sys.path if not path.startswith(str(ROOT)) or ".venv" in path)]
        import pytest

        code = int(pytest.main([*arguments], plugins=[_Failures(failed)]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def copy_tree(number: int) -> Path:
    """A fresh copy of the files that git would commit, with a link to the environment."""
    place = KEPT / f"tree{number}"
    shutil.rmtree(place, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.decode().split("\0"):
        source = ROOT / name
        if name and source.is_file() and not source.is_symlink():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, place / name)
    (place / ".venv").symlink_to((ROOT / ".venv").resolve())
    return place
