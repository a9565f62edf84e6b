"""Try the fast tier with planted bugs: ``make mutants``.

    python -m mutants [--jobs N] [--only TEXT] [--limit N] [--own-only | --fast-only] [--records FOLDER]

Each bug is planted in a copy of the tree. The test files of the fast tier that call the changed function run against
it, the module's own first, until one fails; a bug that escapes meets every other test. Results are kept in
``result.json`` and used again while the changed file, the bug and the tests that decided stay as they are;
``result.md`` is the table for people.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from mutants.bugs import BUGS, ROOT, Bug
from mutants.coverage import Coverage, coverage
from mutants.report import page
from mutants.trying import DEADLINE_S, Result, copy_tree, failing, is_current, try_bug, warm

HERE: Final = Path(__file__).parent
RESULT: Final = HERE / "result.json"


def main(arguments: Sequence[str]) -> int:
    """See the top of the file. Returns 1 if fewer than 95 % of the caught bugs are caught by the fast tier."""
    parser = argparse.ArgumentParser(prog="python -m mutants")
    parser.add_argument("--jobs", type=int, default=1, help="bugs at a time: at most one a core")
    parser.add_argument("--only", default="", help="bugs whose file or description holds this text")
    parser.add_argument("--limit", type=int, default=len(BUGS), help="try at most this many that have no result yet")
    parser.add_argument("--fast-only", action="store_true", help="do not run the rest for those that escape")
    parser.add_argument(
        "--own-only", action="store_true", help="a first pass with the nearest tests of each bug alone: minutes"
    )
    parser.add_argument("--records", type=Path, default=None, help="records of this tree that were made before")
    options = parser.parse_args(arguments)
    for bug in BUGS:
        bug.planted((ROOT / bug.file).read_text(encoding="utf-8"))
    covering = coverage(options.jobs, options.records)
    kept = {name: Result(**values) for name, values in _kept().items()}
    valid = {bug.name: kept[bug.name] for bug in BUGS if bug.name in kept and is_current(bug, kept[bug.name], covering)}
    open_ = [
        bug for bug in BUGS if bug.name not in valid or (valid[bug.name].tier == "unsure" and not options.own_only)
    ]
    chosen = [bug for bug in open_ if options.only in f"{bug.file} {bug.about}"][: options.limit]
    _write(valid)  # with those of a call that was stopped, whose parts begin anew now
    warm()
    children = [_child(number, chosen[number :: options.jobs], covering, options) for number in range(options.jobs)]
    failed = [child for child in children if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]
    for number in range(options.jobs):
        valid |= {name: Result(**values) for name, values in _part(number).items()}
    unsound = _fail_without_a_bug(valid.values()) if chosen else set[str]()
    valid = {name: result for name, result in valid.items() if result.caught_by not in unsound}
    is_met = _write(valid)
    return 2 if failed else 0 if is_met else 1


def _child(number: int, bugs: Sequence[Bug], covering: Coverage, options: argparse.Namespace) -> int:
    """Fork a process that tries some of the bugs one after another; returns its pid."""
    place = copy_tree(number)
    part = place.parent / f"part{number}.json"
    part.write_text("{}")
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = 1
    try:
        done: dict[str, object] = {}
        for bug in bugs:
            result = try_bug(
                bug,
                covering,
                place,
                own_only=options.own_only,
                with_rest=not (options.fast_only or options.own_only),
            )
            done[bug.name] = asdict(result)
            part.write_text(json.dumps(done))
            sys.stdout.write(f"{result.tier:8} {result.seconds:6.0f} s  {bug.file}: {bug.about}\n")
            sys.stdout.flush()
        code = 0
    except Exception as error:
        sys.stderr.write(f"error: {error}\n")
    finally:
        os._exit(code)


def _write(results: Mapping[str, Result]) -> bool:
    """Write both files; returns whether the goal is met."""
    kept = {bug.name: asdict(results[bug.name]) for bug in BUGS if bug.name in results}
    RESULT.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text, is_met = page(BUGS, results)
    (HERE / "result.md").write_text(text, encoding="utf-8")
    return is_met


def _fail_without_a_bug(results: Iterable[Result]) -> set[str]:
    """Tests that are said to have caught a bug, and fail in the clean copy as well: they prove nothing."""
    tests = sorted({r.caught_by for r in results if r.caught_by and not r.caught_by.endswith(")")})
    found = set(failing(ROOT / ".mutants/tree0", ["-m", "", *tests], DEADLINE_S, until_first=False)) if tests else set()
    for test in sorted(found):
        sys.stderr.write(f"warning: {test} fails without a bug, too; what it caught is tried again\n")
    return found


def _kept() -> dict[str, dict[str, Any]]:
    """Results in the repository, and those of a call that was stopped."""
    kept: dict[str, dict[str, Any]] = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    for part in sorted((ROOT / ".mutants").glob("part*.json")):
        kept |= json.loads(part.read_text())
    return kept


def _part(number: int) -> dict[str, dict[str, Any]]:
    return json.loads((ROOT / ".mutants" / f"part{number}.json").read_text())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
