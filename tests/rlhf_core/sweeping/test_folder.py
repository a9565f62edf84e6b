"""The folder of a sweep: the same one goes on, another one is refused, and where a run stands is in its files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from damage import flip
from torture.runs import go_on, start

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import load_config
from rlhf_core.contracts.errors import IntegrityError, RunLockedError, UserError
from rlhf_core.contracts.records import write_record
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.sweeping.folder import SweepFolder, SweepRecord, check_folder
from rlhf_core.sweeping.summary import run_numbers
from tasks.lifecycle.extension import extend_run
from tasks.session.session import open_session

MakeConfig = Callable[[Sequence[str]], RunConfig]
GRID: dict[str, list[Any]] = {"ppo.learning_rate": [1e-3, 1e-4], "kl.coef": [0.1]}


@pytest.fixture
def record(tiny_config: MakeConfig) -> SweepRecord:
    return SweepRecord.of(tiny_config(["num_threads=null", "num_iterations=2"]), GRID, [0, 1], 1)


@pytest.fixture
def there(record: SweepRecord, tmp_path: Path) -> SweepFolder:
    return SweepFolder.create(tmp_path / "sweep", record)


def test_it_is_found_again_as_it_was_begun(there: SweepFolder, record: SweepRecord) -> None:
    again = SweepFolder.open(there.path)
    assert again == there
    assert list(again.grid) == ["ppo.learning_rate", "kl.coef"], "in the order given"
    assert [run.name for run in again.runs][:2] == [
        "ppo.learning_rate=0.001_kl.coef=0.1_seed=0",
        "ppo.learning_rate=0.0001_kl.coef=0.1_seed=0",
    ]
    assert [point["ppo.learning_rate"] for point in again.points] == [1e-3, 1e-4]
    for run in again.runs:
        assert load_config(there.config_path(run)) == run.config, "what its process reads"
        assert run.config.num_threads == 1, "recorded: another --jobs changes no number"
    assert again.config.num_threads is None
    assert SweepFolder.create(there.path, record) == there


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"grid": {"kl.coef": [0.1]}}, "ppo.learning_rate is 0.001, 0.0001 there, and not swept now"),
        ({"seeds": [0, 1, 2]}, "seeds are 0, 1 there, and 0, 1, 2 now"),
        ({"num_threads": 2}, "a run has 1 threads there, and 2 now"),
        ({"set": ["prompts.batch_size=4"]}, "prompts.batch_size is 8 there, and 4 now"),
    ],
)
def test_another_sweep_is_refused_with_the_difference(
    change: dict[str, Any], told: str, there: SweepFolder, tiny_config: MakeConfig
) -> None:
    config = tiny_config(["num_threads=null", "num_iterations=2", *change.get("set", [])])
    other = SweepRecord.of(
        config, change.get("grid", GRID), change.get("seeds", [0, 1]), change.get("num_threads", 1)
    )  # fmt: skip
    before = sorted(there.path.rglob("*"))
    with pytest.raises(UserError, match="holds another sweep") as caught:
        SweepFolder.create(there.path, other)
    assert told in str(caught.value)
    assert sorted(there.path.rglob("*")) == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path, record: SweepRecord) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="neither an empty folder nor a sweep"):
        check_folder(tmp_path, record)
    with pytest.raises(UserError, match="is not a sweep"):
        SweepFolder.open(tmp_path)


def test_a_damaged_record_is_told(there: SweepFolder) -> None:
    flip(there.path / "sweep.json")
    with pytest.raises(IntegrityError, match="is damaged"):
        SweepFolder.open(there.path)
    write_record(there.path / "sweep.json", {"config": {}, "axes": [], "seeds": ["a"], "num_threads": 1})
    with pytest.raises(IntegrityError, match="not the record of a sweep"):
        SweepFolder.open(there.path)


def test_where_a_run_stands(there: SweepFolder) -> None:
    run, other = there.runs[0], there.runs[1]
    assert there.standing(run).is_begun is False
    start(run.config, there.run_path(run))
    open_session.cache_clear()
    whole = there.standing(run)
    assert (whole.finished, whole.of, whole.is_finished, whole.is_running) == (2, 2, True, False)
    newest = RunFolder.open(there.run_path(run)).manifests(1)["shape_rewards"].metrics
    assert (whole.score, whole.kl) == (newest["objective/scores"], newest["objective/kl"])
    there.check_runs()
    with RunFolder.open(there.run_path(run)).locked():
        assert there.standing(run).is_running
        with pytest.raises(RunLockedError, match="another process is working on"):
            there.check_runs()
    shutil.rmtree(there.run_path(run) / "iterations/000001")
    stopped = there.standing(run)
    assert (stopped.finished, stopped.is_begun, stopped.is_finished) == (1, True, False)
    write_record(there.run_path(run) / "guards.json", {"tripped": {}, "accepted": {}, "stopped": "kl_ceiling"})
    assert there.standing(run).stopped_by == "kl_ceiling"
    shutil.copytree(there.run_path(run), there.run_path(other))
    with pytest.raises(UserError, match="is a run of another config than the sweep's"):
        there.check_runs()
    flip(there.run_path(run) / "run.json")
    assert "run.json is damaged" in str(there.standing(run).problem)


def test_a_run_that_was_extended_counts_as_when_the_sweep_ended(there: SweepFolder) -> None:
    run = there.runs[0]
    start(run.config, there.run_path(run))
    before = run_numbers(RunFolder.open(there.run_path(run)))
    extend_run(str(there.run_path(run)), 4)
    there.check_runs()
    assert there.standing(run).is_finished, "of the sweep, though the run is not"
    go_on(there.run_path(run))
    there.check_runs()
    assert (there.standing(run).finished, there.standing(run).is_finished) == (4, True)
    assert run_numbers(RunFolder.open(there.run_path(run))) == before


def test_one_process_at_a_time(there: SweepFolder) -> None:
    with there.locked(), pytest.raises(RunLockedError, match="working on the sweep"), there.locked():
        pass
    with there.locked():
        pass
