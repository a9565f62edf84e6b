"""What of a run is kept: how many iterations stay loose, what a killed compaction leaves, and leftovers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from old_iterations import commit_iteration, files_of
from torture.runs import fingerprint, go_on, start

from rlhf_core.contracts.archive import segment_paths
from rlhf_core.contracts.compaction import check_segment, loose_iterations, write_segment
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import config_digest
from rlhf_core.contracts.durable import remove_folder
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.identity import identity_digest
from rlhf_core.inspection import artifact_rows, iteration_rows, stage_rows
from tasks.lifecycle.retention import compact, compaction_is_due, remove_run_leftovers
from tasks.session.session import open_session

IDENTITY = {"num_threads": 1}


@pytest.fixture
def made(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunFolder]:
    """A run with some iterations finished, none of them computed."""

    def make(keep: int | None, num_finished: int) -> RunFolder:
        config = tiny_config(["num_iterations=20", f"artifacts.keep_iterations={keep or 'null'}"])
        run = RunFolder.create(tmp_path / "run", config, IDENTITY)
        for iteration in range(num_finished):
            commit_iteration(run.path, iteration, rows=1, identity=identity_digest(IDENTITY))
        return run

    open_session.cache_clear()
    return make


def ranges(run: RunFolder) -> list[tuple[int, int]]:
    return [(first, last) for first, last, _ in segment_paths(run.path)]


def test_how_long_iterations_stay_loose_is_no_part_of_the_identity(tiny_config: Callable[..., RunConfig]) -> None:
    assert config_digest(tiny_config(["artifacts.keep_iterations=3"])) == config_digest(tiny_config())


class TestCompaction:
    def test_nothing_is_compacted_by_default(self, made: Callable[..., RunFolder]) -> None:
        run = made(None, 0)
        assert not any(compaction_is_due(run, num_finished) for num_finished in range(100))

    @pytest.mark.parametrize("keep", [1, 2, 3])
    def test_between_once_and_twice_as_many_stay_loose(self, made: Callable[..., RunFolder], keep: int) -> None:
        run = made(keep, 0)
        for num_finished in range(1, 9):
            commit_iteration(run.path, num_finished - 1, rows=1, identity=identity_digest(IDENTITY))
            if compaction_is_due(run, num_finished):
                assert compact.fn(str(run.path), num_finished) == []
            loose = loose_iterations(run.path)
            assert loose == list(range(num_finished - len(loose), num_finished))
            assert min(keep, num_finished) <= len(loose) < 2 * keep
            assert ranges(run) == [(i, i + keep - 1) for i in range(0, num_finished - len(loose), keep)]
            assert run.num_finished() == num_finished
            assert [len(run.manifests(i)) for i in range(num_finished + 1)] == [6] * num_finished + [0]

    def test_each_iteration_is_written_once(self, made: Callable[..., RunFolder]) -> None:
        run = made(2, 4)
        compact.fn(str(run.path), 4)
        before = {p: p.stat().st_mtime_ns for p in (run.path / "archive").rglob("*.arrow")}
        for iteration in (4, 5):
            commit_iteration(run.path, iteration, rows=1, identity=identity_digest(IDENTITY))
        compact.fn(str(run.path), 6)
        assert ranges(run) == [(0, 1), (2, 3)]
        assert all(p.stat().st_mtime_ns == then for p, then in before.items())

    def test_what_a_kill_left_is_finished_by_the_next_one(self, made: Callable[..., RunFolder]) -> None:
        run = made(2, 4)
        write_segment(run.path, 0, 1)
        remove_folder(run.path / "iterations/000000")
        segment = files_of(run.path / "archive")
        assert compact.fn(str(run.path), 4) == []
        assert loose_iterations(run.path) == [2, 3]
        assert files_of(run.path / "archive") == segment

    def test_a_damaged_iteration_stays_loose_and_is_told(
        self, made: Callable[..., RunFolder], caplog: pytest.LogCaptureFixture
    ) -> None:
        run = made(2, 6)
        damaged = run.path / "iterations/000001/02_rollouts.arrow"
        damaged.write_bytes(b"x")
        with caplog.at_level(logging.WARNING):
            (told,) = compact.fn(str(run.path), 6)
        assert told.startswith("iteration 1 stays out of the archive")
        assert told in caplog.messages
        assert str(damaged) in told
        assert loose_iterations(run.path) == [1, 4, 5]
        assert damaged.read_bytes() == b"x"
        assert compact.fn(str(run.path), 6) == []  # told once

    def test_a_damaged_archive_takes_nothing_loose_away(self, made: Callable[..., RunFolder]) -> None:
        run = made(2, 4)
        write_segment(run.path, 0, 1)
        (run.path / "archive/000000-000001/05_experience.arrow").write_bytes(b"x")
        (told,) = compact.fn(str(run.path), 4)
        assert told.startswith("iterations 0 to 1 stay loose")
        assert "05_experience.arrow is damaged" in told
        assert f"`rlhf verify {run.path}`" in told
        assert loose_iterations(run.path) == [0, 1, 2, 3]


def test_leftovers_go_but_those_of_an_evaluation(made: Callable[..., RunFolder]) -> None:
    run = made(2, 1)
    gone = ["iterations/000000/.02_rollouts.arrow.1a.tmp", "checkpoints/.000002.removed/x", ".guards.json.2b.tmp"]
    gone += ["archive/.000000-000001.3c.tmp/01_prompts.arrow"]
    stay = ["evaluations/a/.part.4d.tmp", "iterations/000000/.notes"]
    for name in [*gone, *stay]:
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).touch()
    assert len(remove_run_leftovers(run)) == len(gone)
    assert [name for name in gone if (run.path / name).exists()] == []
    assert [name for name in stay if not (run.path / name).exists()] == []


class TestRun:
    def test_compaction_changes_no_number(self, tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
        changes = ["num_iterations=5", "checkpoint.every=2", "checkpoint.keep_last=1", "kl.horizon=50"]
        for name, keep in (("loose", "null"), ("compacted", "1")):
            start(tiny_config([*changes, f"artifacts.keep_iterations={keep}"]), tmp_path / name)
        assert loose_iterations(tmp_path / "loose") == [0, 1, 2, 3, 4]
        assert loose_iterations(tmp_path / "compacted") == [3, 4]
        assert fingerprint(tmp_path / "compacted") == fingerprint(tmp_path / "loose")
        assert [check_segment(path) for _, _, path in segment_paths(tmp_path / "compacted")] == [[], [], []]
        runs = [RunFolder.open(tmp_path / name) for name in ("loose", "compacted")]
        shown = [[{**row, "seconds": 0} for row in iteration_rows(run)] for run in runs]
        assert shown[0] == shown[1]
        assert artifact_rows(runs[1], 1, "generate", 8) == artifact_rows(runs[0], 1, "generate", 8)
        places = [
            {**row, "seconds": 0, "file": row["file"].rsplit("/")[-1]} for run in runs for row in stage_rows(run, 1)
        ]
        assert places[:6] == places[6:]
        assert stage_rows(runs[1], 1)[0]["file"] == "archive/000001-000001/01_prompts.arrow"

    def test_an_archived_update_is_replayed(self, tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
        """Without its checkpoints a run starts over from its first update, read from the archive."""
        config = tiny_config(["num_iterations=4", "checkpoint.every=2", "artifacts.keep_iterations=1"])
        start(config, tmp_path / "run")
        before = fingerprint(tmp_path / "run")
        for path in (tmp_path / "run/checkpoints").glob("0*"):
            remove_folder(path)
        (tmp_path / "run/iterations/000003/06_update.json").unlink()
        go_on(tmp_path / "run")
        remade = RunFolder.open(tmp_path / "run")
        assert remade.checkpoints() == [4]
        assert loose_iterations(tmp_path / "run") == [2, 3]
        start(config, tmp_path / "again")
        remove_folder(tmp_path / "again/checkpoints/000002")
        assert fingerprint(tmp_path / "again") == fingerprint(tmp_path / "run") != before
