"""The suite itself: its arithmetic, its list, and that what has no accelerator here still runs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.cost_points import GRID, Spec, measure, replace_point, small
from benchmarks.figures import Figure, alternate, log_log_slope, median_of, ratio
from benchmarks.processes import measured
from benchmarks.suite import TABLES, Effort, Result, load_table, measure_table, unlisted_tables
from benchmarks.tables.quality import first_window
from benchmarks.world import ROOT, World

from rlhf_core.costs.calibration import Point, calibration
from rlhf_core.costs.hardware import parse_hardware
from rlhf_core.costs.memory import device_memory
from rlhf_core.costs.seconds import TIMED_STAGES


class TestFigures:
    @pytest.mark.parametrize(
        ("figure", "met", "verdict"),
        [
            (Figure("", 2.6, 2.5), True, "yes"),
            (Figure("", 2.2, 2.5), False, "12 % below"),
            (Figure("", 2.0, 1.6, "at most"), False, "25 % above"),
            (Figure("", 8.0, 1.6, "at most"), False, "5 times the goal"),
            (Figure("", 1.6, 1.6, "at most"), True, "yes"),
            (Figure("", -3.0, 5.0, "at most", "%"), True, "yes"),
            (Figure("", 7.0, 5.0, "at most", "%"), False, "by 2 %"),
            (Figure("", math.inf, 0.25, "at most"), False, "never reached"),
            (Figure("", None, 2.5), None, "not measured"),
            (Figure("", None, 2.5, why_not="TRL not measured"), None, "TRL not measured"),
            (Figure("", 1.0, 5.0, why_not="no GPU here"), None, "no GPU here"),
            (Figure("", 1.0), None, ""),
        ],
    )
    def test_met_or_by_how_much_not(self, figure: Figure, met: bool | None, verdict: str) -> None:
        assert figure.met is met
        assert figure.verdict == verdict
        json.dumps(figure.to_json(), allow_nan=False)

    def test_texts(self) -> None:
        figure = Figure("", 1234.5, 0.6, "at most", "x TRL")
        assert (figure.goal_text, figure.value_text) == ("≤ 0.6 x TRL", "1,234 x TRL")

    def test_medians_leave_out_what_was_not_measured(self) -> None:
        assert median_of([3.0, None, 1.0, 2.0]) == 2.0
        assert median_of([None]) is None
        assert ratio(3.0, 2.0) == 1.5
        assert ratio(None, 2.0) is None
        assert ratio(1.0, 0.0) is None

    def test_sides_take_turns_and_swap(self) -> None:
        order: list[str] = []

        def side(name: str) -> Callable[[int], str]:
            def measure(turn: int) -> str:
                order.append(name)
                return f"{name}{turn}"

            return measure

        assert alternate({"A": side("A"), "B": side("B")}, 3) == {"A": ["A0", "A1", "A2"], "B": ["B0", "B1", "B2"]}
        assert order == ["A", "B", "B", "A", "A", "B"]

    def test_slope(self) -> None:
        assert log_log_slope([1, 2, 4], [5, 10, 20]) == pytest.approx(1.0)
        assert log_log_slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2.0)

    def test_the_first_window_at_the_threshold(self) -> None:
        assert first_window([0, 1, 2, 3, 4], 3.0, window=2) == 4
        assert first_window([5, 1, 5], 3.0, window=2) == 1
        assert first_window([5], 3.0, window=2) is None
        assert first_window([1, 1, 1], 3.0, window=2) is None


class TestTables:
    @pytest.mark.parametrize("name", TABLES)
    def test_has_what_a_table_has(self, name: str) -> None:
        table = load_table(name)
        assert table.NAME
        assert table.GOAL
        assert callable(table.measure)

    def test_none_is_forgotten(self) -> None:
        assert unlisted_tables() == []

    def test_one_that_raises_has_failed(self, tmp_path: Path) -> None:
        class Broken:
            NAME: str = "broken"
            GOAL: str = "none"

            def measure(self, effort: Effort) -> Result:
                raise ZeroDivisionError("one by nothing")

        result = measure_table(Broken(), Effort(True, 1, 1, tmp_path, World(tmp_path)))
        assert result.met is None
        assert result.failure == "it raised ZeroDivisionError: one by nothing"

    def test_is_met_only_if_all_that_could_be_judged_is(self) -> None:
        good, bad, unknown = Figure("", 1.0, 1.0), Figure("", 0.5, 1.0), Figure("", None, 1.0)
        assert Result([good, unknown]).met
        assert Result([good, bad]).met is False
        assert Result([unknown]).met is None


def test_a_measured_process_tells_its_memory_and_its_failure(tmp_path: Path) -> None:
    held = "import time; held = b'x' * 50_000_000; time.sleep(0.5)"
    ended = measured([sys.executable, "-c", held], threads=1, folder=tmp_path)
    assert 50e6 < ended.peak_bytes < 500e6
    assert ended.memory
    with pytest.raises(RuntimeError, match="ended with code 3"):
        measured([sys.executable, "-c", "raise SystemExit(3)"], threads=1, folder=tmp_path)


def test_the_accelerator_script_runs_where_there_is_none(tmp_path: Path) -> None:
    """In a process of its own, and importing nothing but what the core needs."""
    out = tmp_path / "found.json"
    code = (
        "import sys, runpy\n"
        "sys.argv = ['accelerator', '--small', '--rounds', '1', '--json', sys.argv[1]]\n"
        "runpy.run_module('benchmarks.accelerator', run_name='__main__')\n"
        "assert not {'prefect', 'mlflow', 'trl', 'rich', 'flows', 'tasks'} & set(sys.modules), 'more than the core'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["small"]
    assert found["decode"]["tokens_per_s"].keys() == {"ours", "transformers, autocast", "transformers, cast"}
    assert found["update"]["operations"] > 0
    assert "goal" in done.stdout


class TestCostPoints:
    def test_the_grid_has_points_that_no_fit_sees(self) -> None:
        assert len({spec.name for spec in GRID}) == len(GRID)
        held_out = [spec for spec in GRID if spec.held_out]
        assert len(GRID) / 4 < len(held_out) < len(GRID) / 2

    def test_a_point_takes_the_place_of_its_predecessor(self, tmp_path: Path) -> None:
        path = tmp_path / "points.json"
        for name, hardware, seconds in (("a", "1xCPU2", 1), ("b", "1xCPU2", 2), ("a", "1xH200", 3), ("a", "1xCPU2", 4)):
            replace_point(path, {"name": name, "hardware": hardware, "seconds": seconds})
        assert [point["seconds"] for point in json.loads(path.read_text())] == [4, 2, 3]

    @pytest.mark.slow
    @pytest.mark.parametrize("spec", [small(GRID[0]), replace(GRID[3], batch_size=32, response_len=8)])
    def test_a_real_run_takes_the_memory_that_was_predicted(self, spec: Spec) -> None:
        """The stages in a process of their own; what else the machine does, does not matter."""
        point = Point.from_json(measure(spec, threads=2))
        assert {row.stage for row in point.rows} == set(TIMED_STAGES)
        assert point.peak_bytes is not None
        predicted = device_memory(point.workload, parse_hardware("CPU2"), calibration("CPU2").overhead).peak_bytes
        assert predicted == pytest.approx(point.peak_bytes, rel=0.12)
