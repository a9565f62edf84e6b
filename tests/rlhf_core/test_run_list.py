"""The runs of a folder: each state is told apart, and what cannot be read is listed with the reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from damage import flip
from made_runs import made_run

from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.records import write_record
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.run_list import list_runs, listed, measured
from rlhf_core.sweeping.folder import SweepFolder, SweepRecord

SIX = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def state_of(path: Path) -> tuple[str, str]:
    run = listed(path, path.name)
    return run.state, run.note


def test_a_finished_and_a_stopped_run(tmp_path: Path) -> None:
    made_run(tmp_path / "a", SIX)
    made_run(tmp_path / "b", SIX[:2], is_reported=False)
    found = {run.name: run for run in list_runs(tmp_path)}
    assert (found["a"].state, found["a"].finished, found["a"].of) == ("finished", 6, 6)
    assert (found["a"].score, found["a"].kl, found["a"].model) == (6.0, 2.5, "a-policy")
    assert (found["b"].state, found["b"].finished) == ("stopped", 2)


def test_what_is_written_last_comes_first(tmp_path: Path) -> None:
    for name, written in (("old", 1_000), ("new", 3_000), ("middle", 2_000)):
        run = made_run(tmp_path / name, [1.0])
        for path in run.path.rglob("*"):
            os.utime(path, (written, written))
    runs = list_runs(tmp_path)
    assert [run.name for run in runs] == ["new", "middle", "old"]
    assert [run.age_s(3_500) for run in runs] == [500, 1_500, 2_500]
    assert runs[0].age_s(2_000) == 0, "a clock that was set back"


def test_one_that_a_process_works_on_runs_or_waits_for_a_person(tmp_path: Path) -> None:
    run = made_run(tmp_path / "a", SIX[:2], changes=["guards.kl_ceiling.action=pause"], is_reported=False)
    with run.locked():
        assert state_of(run.path) == ("running", "")
        write_record(run.path / "guards.json", {"tripped": {"1": ["kl_ceiling"]}, "accepted": {}, "stopped": None})
        assert state_of(run.path) == ("waiting", "paused by kl_ceiling: a person decides")
        write_record(
            run.path / "guards.json", {"tripped": {"1": ["kl_ceiling"]}, "accepted": {"kl_ceiling": 1}, "stopped": None}
        )
        assert state_of(run.path) == ("running", "")
    write_record(run.path / "guards.json", {"tripped": {}, "accepted": {}, "stopped": "kl_ceiling"})
    assert state_of(run.path) == ("stopped", "stopped by a guard: kl_ceiling")


def test_damage_is_listed_with_the_reason(tmp_path: Path) -> None:
    for name, file in (("a", "run.json"), ("b", "iterations/000005/05_experience.json"), ("c", "guards.json")):
        run = made_run(tmp_path / name, SIX)
        write_record(run.path / "guards.json", {"tripped": {}, "accepted": {}, "stopped": None})
        flip(run.path / file)
    lost = made_run(tmp_path / "d", SIX)
    lost.path.joinpath("lock").touch()
    lost.path.joinpath("run.json").unlink()
    found = list_runs(tmp_path)
    assert {run.name for run in found} == {"a", "b", "c", "d"}
    assert {run.state for run in found} == {"damaged"}
    assert all(run.note and run.num_bytes for run in found)


def test_runs_of_a_sweep_stand_one_folder_deeper_and_wait_for_their_turn(tmp_path: Path) -> None:
    from made_runs import TREE

    from rlhf_core.contracts.config_io import build_config

    sweep = SweepFolder.create(tmp_path / "s", SweepRecord.of(build_config(TREE), {"kl.coef": [0.1, 0.2]}, [0], 1))
    made_run(sweep.run_path(sweep.runs[0]), SIX)
    found = {run.name: run.state for run in list_runs(tmp_path)}
    assert found == {"s/kl.coef=0.1_seed=0": "finished", "s/kl.coef=0.2_seed=0": "waiting"}


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside = made_run(tmp_path / "outside" / "a", SIX)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(outside.path)
    (tmp_path / "runs" / "room").symlink_to(outside.path.parent)
    assert list_runs(tmp_path / "runs") == []


def test_a_run_folder_is_listed_alone_and_what_is_none_is_told(tmp_path: Path) -> None:
    run = made_run(tmp_path / "a", SIX)
    assert [each.name for each in list_runs(run.path)] == ["a"]
    with pytest.raises(UserError, match="nowhere is not there; name a folder of runs"):
        list_runs(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"run\.json is a file"):
        list_runs(run.path / "run.json")


def test_a_file_counts_once_however_many_names_it_has(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 1_000)
    os.link(tmp_path / "a", tmp_path / "b")
    (tmp_path / "c").symlink_to(tmp_path / "a")
    assert measured(tmp_path)[0] == 1_000


def test_nothing_is_written(tmp_path: Path) -> None:
    run = made_run(tmp_path / "a", SIX)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    list_runs(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    assert RunFolder.open(run.path).num_finished() == 6
