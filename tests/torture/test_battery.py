"""Every row of the battery, small; and that a row can fail.

The rows run in one program of their own, as `make torture` runs them: a test's process has threads, and cannot fork
children that compute.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_world import Tiny
from torture.battery import ROWS, Effort, Outcome, measure_row, unlisted_rows
from torture.report import code_digest, report, still_valid
from torture.running import Finished

ROOT = Path(__file__).parents[2]


def battery(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torture", *arguments],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the small battery says of each row that was asked for."""
    asked = [
        str(item.callspec.params["name"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == request.path and hasattr(item, "callspec")
    ]
    found = tmp_path_factory.mktemp("battery") / "torture.json"
    done = battery("--small", "--json", str(found), "--only", *asked)
    assert found.is_file(), done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(found.read_text())
    assert done.returncode == (0 if all(row["met"] for row in report["rows"]) else 1)
    return {row["name"]: row for row in report["rows"]}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_met(name: str, rows: dict[str, Any]) -> None:
    row = rows[name]
    assert row["met"], f"{row['figure']}\n" + "\n".join([*row["failures"], row["not_run"]])
    assert row["goal"]
    assert row["row"]


def test_no_row_is_forgotten() -> None:
    assert unlisted_rows() == []


class TestOutcome:
    def test_is_met_if_all_that_was_tried_passed(self) -> None:
        assert Outcome(3, 3, "3 of 3", goal_size=5).met
        assert not Outcome(3, 2, "2 of 3", goal_size=3).met
        assert not Outcome(0, 0, "nothing", goal_size=3).met
        assert not Outcome(3, 3, "3 of 3", goal_size=3, not_run="no strace here").met

    def test_is_met_in_full_only_with_as_many_tries_as_the_goal_asks_for(self) -> None:
        assert Outcome(5, 5, "", goal_size=5).met_in_full()
        assert not Outcome(4, 4, "", goal_size=5).met_in_full()


class TestARow:
    @pytest.fixture
    def effort(self, tmp_path: Path, tiny: Tiny) -> Effort:
        return Effort(full=False, folder=tmp_path, tiny=tiny)

    def test_that_raises_has_failed_with_the_traceback(self, effort: Effort, monkeypatch: pytest.MonkeyPatch) -> None:
        def measure(_effort: Effort) -> Outcome:
            raise ZeroDivisionError("one by nothing")

        monkeypatch.setattr("torture.rows.clock.measure", measure)
        outcome = measure_row("clock", effort)
        assert not outcome.met
        assert outcome.figure == "it raised ZeroDivisionError: one by nothing"
        assert any("test_battery.py" in line for line in outcome.failures)

    def test_that_is_missing_has_failed(self, effort: Effort) -> None:
        outcome = measure_row("of_nobody", effort)
        assert not outcome.met
        assert "torture.rows.of_nobody" in outcome.figure

    def test_is_not_measured_again_on_the_same_code(self, tmp_path: Path) -> None:
        found, code = tmp_path / "torture.json", code_digest()
        row = Finished("clock", "its title", "its goal", Outcome(3, 3, "3 of 3", goal_size=3), 1.0, 1.0)
        told = report([row], small=True, code=code)
        found.write_text(json.dumps(told))
        assert still_valid(found, small=True, code=code) == [row]
        done = battery("--small", "--json", str(found), "--only", "clock")
        assert "clock: met earlier on this code, 1 s" in done.stdout
        assert done.returncode == 0
        missed = {**told["rows"][0], "passed": 2}
        for other in ({"code": "another"}, {"small": False}, {"rows": [missed]}, {"machine": {"torch": "another"}}):
            found.write_text(json.dumps(told | other))
            assert still_valid(found, small=True, code=code) == []

    def test_of_no_such_name_is_refused(self) -> None:
        done = battery("--only", "nobody")
        assert done.returncode == 2
        assert "invalid choice: 'nobody'" in done.stderr
