"""Which test files of the fast tier call which function: recorded in one run of it, kept until a source changes."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mutants.bugs import ROOT, Bug
from mutants.recording import FOLDER

KEPT: Final = ROOT / ".mutants"
"""Ignored by git: the map, and copies of the tree that hold a bug each."""
MAP: Final = KEPT / "coverage.json"
SOURCES: Final = ("flows", "tasks", "rlhf_core", "tests")


@dataclass(frozen=True)
class Coverage:
    """The recorded map."""

    callers: Mapping[str, Sequence[str]]
    """``file:qualified.name`` -> the test files that call it."""
    cpu_s: Mapping[str, float]
    """Test file -> seconds of processor time."""
    failed: Sequence[str]
    """Tests that fail without any bug: they are deselected."""

    def tests_of(self, bug: Bug) -> list[str]:
        """Test files that run the bug, name its module or are of a module that uses it; the likeliest first."""
        recorded = {test for name in _functions_of(bug) for test in self.callers.get(f"{bug.file}:{name}", ())}
        naming, users, own = tests_that_name(bug.file), tests_of_users(bug.file), f"test_{Path(bug.file).stem}"
        return sorted(
            {*recorded, *naming, *users},
            key=lambda test: (
                Path(test).stem != own,
                test not in naming,
                test not in users,
                self.cpu_s.get(test, 0.0),
                test,
            ),
        )


@functools.cache
def tests_that_name(file: str) -> frozenset[str]:
    """Test files that import a source file or replace something in it by its dotted name; and its own tests."""
    return frozenset(_naming(file, "tests", "test_*.py") | _own(file))


@functools.cache
def tests_of_users(file: str) -> frozenset[str]:
    """The own tests of each source file that imports a source file."""
    users = {name for folder in SOURCES if folder != "tests" for name in _naming(file, folder, "*.py")}
    return frozenset(test for name in users for test in _own(name))


def _own(file: str) -> set[str]:
    folder, _, stem = file.removesuffix(".py").rpartition("/")
    name = f"tests/{folder}/test_{stem}.py"
    return {name} if (ROOT / name).is_file() else set()


def _naming(file: str, folder: str, pattern: str) -> set[str]:
    package, _, stem = file.removesuffix(".py").replace("/", ".").rpartition(".")
    dotted, plain = re.escape(package), re.escape(stem)
    named = re.compile(rf"\b{dotted}\.{plain}\b|^from {dotted} import .*\b{plain}\b", re.MULTILINE)
    paths = [path for path in (ROOT / folder).rglob(pattern) if "mutants" not in path.parts]
    return {str(path.relative_to(ROOT)) for path in paths if named.search(path.read_text(encoding="utf-8"))}


def digest_of_sources() -> str:
    """Digest of every Python file that the tests may read."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "mutants" not in path.parts:
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def coverage(jobs: int, records: Path | None = None) -> Coverage:
    """Return the map of these sources, recorded now unless it is kept.

    Args:
        jobs: processes at a time.
        records: a folder of records that were made of these sources already; None records here.
    """
    digest = digest_of_sources()
    if records is None and MAP.is_file():
        kept = json.loads(MAP.read_text())
        if kept.pop("digest") == digest:
            return Coverage(**kept)
    if records is None:
        records = KEPT / "records"
        shutil.rmtree(records, ignore_errors=True)
        records.mkdir(parents=True)
        _record(records, jobs)
        MAP.write_text(json.dumps({"digest": digest, **vars(_read(records))}))
    return _read(records)


def _record(records: Path, jobs: int) -> None:
    places = (ROOT / "tests/mutants/site", ROOT, ROOT / "tests")
    environment = os.environ | {FOLDER: str(records), "PYTHONPATH": os.pathsep.join(map(str, places))}
    parallel = ["-n", str(jobs), "--dist", "loadfile", "--no-loadscope-reorder"] if jobs > 1 else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "mutants.recording", *parallel]
    sys.stdout.write("recording which tests call what\n")
    subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=False)


def _read(records: Path) -> Coverage:
    callers: defaultdict[str, set[str]] = defaultdict(set)
    cpu_s: defaultdict[str, float] = defaultdict(float)
    for path in records.glob("*.calls"):
        for line in path.read_text().splitlines():
            test, file, name = line.split("\t")
            callers[f"{file}:{name}"].add(test)
    for path in records.glob("*.tests"):
        for line in path.read_text().splitlines():
            found: dict[str, Any] = json.loads(line)
            cpu_s[found["test"].partition("::")[0]] += found["cpu_s"]
    failed = {line for path in records.glob("*.failed") for line in path.read_text().splitlines()}
    return Coverage({name: sorted(tests) for name, tests in callers.items()}, dict(cpu_s), sorted(failed))


def _functions_of(bug: Bug) -> list[str]:
    """Qualified name of the innermost function that holds a bug; every function of the file if none does."""
    source = (ROOT / bug.file).read_text(encoding="utf-8")
    first = source[: source.index(bug.text)].count("\n") + 1
    last = first + bug.text.strip("\n").count("\n")
    named = list(_named(ast.parse(source), ""))
    inside = [(name, node) for name, node in named if node.lineno <= last and first <= (node.end_lineno or 0)]
    if not inside:
        return [name for name, _ in named]
    return [max(inside, key=lambda item: item[1].lineno)[0]]


def _named(node: ast.AST, prefix: str) -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    found: list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            found += [(f"{prefix}{child.name}", child), *_named(child, f"{prefix}{child.name}.<locals>.")]
        else:
            found += _named(child, f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix)
    return found
