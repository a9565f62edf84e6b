"""What is sent of an iteration and of a run: from files alone, the same each time."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_runs import made_run

from rlhf_core.contracts.records import read_record, write_record
from tasks.tracking.metrics import batch_of_metrics, iteration_metrics, result_metrics


def test_what_the_process_took_is_a_mean_over_the_stages_and_its_peak(tmp_path: Path) -> None:
    metrics = iteration_metrics(made_run(tmp_path / "run", [1.0]), 0)
    assert metrics["system/process_cpu_percentage"] == pytest.approx(150), "0.75 s in 0.5 s of each stage"
    assert metrics["system/process_memory_megabytes"] == 300
    assert metrics["system/process_peak_memory_megabytes"] == 400
    assert "system/gpu_peak_memory_megabytes" not in metrics


def test_an_iteration_that_an_older_release_committed_has_no_such_metrics(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", [1.0])
    record = run.path / "iterations/000000/06_update.json"
    values = read_record(record)
    del values["timing"]["cpu_s"]
    write_record(record, values)
    assert not [name for name in iteration_metrics(run, 0) if name.startswith("system/")]


def test_results_stand_at_one_step_that_is_drawn_as_bars(tmp_path: Path) -> None:
    assert result_metrics(made_run(tmp_path / "new", [])) == {}
    ((step, values),) = result_metrics(made_run(tmp_path / "run", [0.0, 2.0, 4.0], [0.0, 1.0, 2.0])).items()
    assert step == 0
    assert (values["achieved/score"], values["achieved/kl"], values["achieved/gain_per_nat"]) == (2.0, 1.0, 2.0)


def test_a_batch_holds_no_more_than_the_tracker_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made_run(tmp_path / "run", [1.0, 2.0, 3.0])
    monkeypatch.setattr("tasks.tracking.metrics.MAX_METRICS", 2 * len(batch_of_metrics(run, 0, 1)[0]))
    assert list(batch_of_metrics(run, 0, 3)) == [0, 1]
    assert list(batch_of_metrics(run, 2, 3)) == [2]


def test_a_stage_records_what_the_process_takes() -> None:
    from types import SimpleNamespace
    from typing import Any

    import torch

    from tasks.stage import _taken

    kept: Any = SimpleNamespace(device=torch.device("cpu"))
    taken = _taken(kept, 1.5)
    assert taken["cpu_s"] == 1.5
    assert 1e7 < taken["memory_bytes"] <= taken["peak_memory_bytes"] < 1e11
