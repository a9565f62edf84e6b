"""What a person reads in the terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from flows.console import Console
from flows.displays.narrow import print_rows
from flows.displays.terminal import TerminalWatcher, next_commands, print_records, print_result, sparkline

METRICS = {
    "objective/scores": 1.25,
    "objective/kl": 3.5,
    "kl/beta": 0.15,
    "rollout/response_len": 12.0,
    "time/iteration_s": 2.0,
}


def printed(width: int = 100) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=width), out


def row(iteration: int, score: float, kl: float) -> dict[str, float]:
    rest = dict.fromkeys(("beta", "entropy", "length", "eos_rate", "clip_fraction", "seconds"), 1.0)
    return {"iteration": iteration, "score": score, "kl": kl, **rest}


def test_a_sparkline_rises_with_its_values() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert len(sparkline(range(100), width=40)) == 40


def test_without_a_terminal_each_iteration_is_a_line() -> None:
    console, out = printed()
    with TerminalWatcher(console, 2) as watcher:
        watcher.stage_started(0, "generate")
        watcher.iteration_finished(0, METRICS)
    line = "iteration 0 score 1.250 kl 3.50 beta 0.1500 length 12.0 2.00 s"
    assert " ".join(out.getvalue().split()) == line


def test_the_result_compares_the_mean_of_the_first_and_last_iterations_with_the_target() -> None:
    console, out = printed()
    rows = [row(i, score=float(i), kl=0.5 * i) for i in range(10)]
    sample = {
        "prompt": "the [b]film",
        "before": "was bad",
        "score_before": -1.0,
        "after": "was good",
        "score_after": 2.0,
    }
    print_result(console, "runs/a", rows, [sample], kl_target=4.0, tracking_uri="sqlite:///x.db")
    text = out.getvalue()
    assert all(number in text for number in ("2.000", "7.000", "+5.000")), "means of iterations 0-4 and 5-9"
    assert "target 4 (-12%)" in text, "3.5 nats"
    assert "the [b]film" in text, "text of a model is no markup"
    assert "inspect runs/a" in text


def test_commands_can_be_copied_from_a_narrow_terminal() -> None:
    console, out = printed(width=40)
    print_result(console, "runs/a", [], [], kl_target=None, tracking_uri="sqlite:////somewhere/mlflow.db")
    commands = next_commands("runs/a", "sqlite:////somewhere/mlflow.db").values()
    assert all(f"  {command}\n" in out.getvalue() for command in commands)


def test_programs_outside_the_path_are_named_by_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / ".venv/bin/python"))
    monkeypatch.chdir(tmp_path)
    assert next_commands("r", "http://x")["look into the run"] == ".venv/bin/rlhf inspect r"
    assert next_commands("r", "http://x")["compare runs in MLflow"] == "http://x"
    assert next_commands("a/r", "sqlite:///x.db")["compare runs in MLflow"] == ".venv/bin/rlhf ui --runs a"
    assert "compare runs in MLflow" not in next_commands("r", ""), "nothing is tracked"


def test_wide_rows_stand_one_below_the_other_and_lists_are_summed_up() -> None:
    console, out = printed(80)
    print_records(console, [{f"column_{i}": [1.0, 2.0] for i in range(12)}], "wide")
    assert "column_11        2 x 1.500" in out.getvalue()
    print_rows(console, [{"a": 1, "tokens": [3, 4, 5]}])
    assert "3" in out.getvalue().splitlines()[-2]
