"""The folder of a run: who may begin, open and hold it, and where its loop stands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.contracts import run_folder
from rlhf_core.contracts.artifacts import commit_folder, commit_stage
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config, canonical_json, digest_json
from rlhf_core.contracts.errors import IntegrityError, RlhfError, RunLockedError, UserError
from rlhf_core.contracts.loop_state import Cursor, LoopState, ScoreMoments
from rlhf_core.contracts.records import seal, write_record
from rlhf_core.contracts.run_folder import RunFolder, check_vacant
from rlhf_core.contracts.stage_graph import SCHEMAS, STAGES

ROOT = Path(__file__).parents[3]
CONFIG = build_config({"seed": 3, "kl": {"coef": 0.25}, "generation": {"stop": ["\n", "é"]}})
IDENTITY = {"config": "0" * 64, "versions": {"torch": "2"}}
STATE = LoopState(3, 0.1 + 0.2, 24, Cursor(1, 16), ScoreMoments(24, -1 / 3, 2e-17))
AT_ONCE_S = 1.0


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", CONFIG, IDENTITY)


def commit(run: RunFolder, stage: str, iteration: int, state: dict[str, Any] | None = None) -> None:
    commit_stage(
        run.path, stage, iteration, SCHEMAS[stage].empty_table(),
        key="k", inputs={}, seed=0, identity=digest_json(dict(run.identity)), metrics={}, state=state or {}, timing={},
    )  # fmt: skip


class TestCreateAndOpen:
    def test_round_trip(self, run: RunFolder) -> None:
        assert RunFolder.open(run.path) == run
        assert (run.config, run.identity) == (CONFIG, IDENTITY)
        assert [p.name for p in run.path.iterdir() if p.name != "lock"] == ["run.json"]

    def test_a_second_run_is_refused(self, run: RunFolder) -> None:
        before = (run.path / "run.json").read_bytes()
        with pytest.raises(UserError, match=r"--run-dir .*run already holds a run; continue it with `rlhf resume "):
            RunFolder.create(run.path, RunConfig(), IDENTITY)
        assert (run.path / "run.json").read_bytes() == before

    def test_a_folder_with_anything_in_it_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").touch()
        for path in (tmp_path, tmp_path / "thesis.txt"):
            with pytest.raises(UserError, match="is not an empty folder; choose a new one"):
                RunFolder.create(path, CONFIG, IDENTITY)
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]

    def test_a_new_an_empty_and_an_abandoned_folder_are_vacant(self, tmp_path: Path) -> None:
        check_vacant(tmp_path / "new" / "deeper")
        check_vacant(tmp_path)
        (tmp_path / "lock").touch()
        (tmp_path / ".run.json.a1b2c3.tmp").touch()  # a process was killed while it wrote run.json
        check_vacant(tmp_path)

    def test_of_two_that_begin_at_once_one_wins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The second one comes after the first has looked, and before it has written."""
        other = build_config({"seed": 4})
        refused: list[type[RlhfError]] = []

        def write_late(path: Path, values: Mapping[str, Any]) -> str:
            monkeypatch.setattr(run_folder, "write_record", write_record)
            try:
                RunFolder.create(tmp_path / "run", other, IDENTITY)
            except RlhfError as error:
                refused.append(type(error))
            return write_record(path, values)

        monkeypatch.setattr(run_folder, "write_record", write_late)
        winner = RunFolder.create(tmp_path / "run", CONFIG, IDENTITY)
        assert len(refused) == 1
        assert RunFolder.open(tmp_path / "run").config == winner.config

    def test_no_run(self, tmp_path: Path) -> None:
        for path, why in ((tmp_path, r"it has no run\.json"), (tmp_path / "none", "there is no such folder")):
            with pytest.raises(UserError, match=f"is not a run folder: {why}"):
                RunFolder.open(path)

    @pytest.mark.parametrize(
        ("record", "sentence"),
        [
            (b"", "run.json is damaged or foreign"),
            (seal({"config": {}})[:-10], "run.json is damaged or foreign"),
            (seal({"config": {}}), "run.json is not the record of a run"),
            (seal({"config": {}, "identity": {}, "more": 1}), "run.json is not the record of a run"),
        ],
    )
    def test_a_damaged_record(self, tmp_path: Path, record: bytes, sentence: str) -> None:
        (tmp_path / "run.json").write_bytes(record)
        with pytest.raises(IntegrityError, match=sentence):
            RunFolder.open(tmp_path)

    @pytest.mark.parametrize("config", [{"sed": 1}, {"seed": "x"}, [1], "x", None])
    def test_a_record_with_a_config_that_is_none(self, tmp_path: Path, config: Any) -> None:
        write_record(tmp_path / "run.json", {"config": config, "identity": {}})
        with pytest.raises(RlhfError):
            RunFolder.open(tmp_path)


class TestLock:
    def test_the_second_holder_is_refused_at_once(self, run: RunFolder) -> None:
        with run.locked(), pytest.raises(RunLockedError, match="another process is working on"), run.locked():
            pytest.fail("two hold it")
        with run.locked():
            pass

    def test_it_is_free_after_an_error(self, run: RunFolder) -> None:
        with pytest.raises(ZeroDivisionError), run.locked():
            raise ZeroDivisionError
        with run.locked():
            pass

    def test_it_is_free_after_kill_9(self, run: RunFolder) -> None:
        with another_process_holding(run.path) as process:
            started = time.monotonic()
            with pytest.raises(RunLockedError), run.locked():
                pytest.fail("two processes hold it")
            assert time.monotonic() - started < AT_ONCE_S
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            with run.locked():
                pass

    def test_looking_needs_no_lock(self, run: RunFolder) -> None:
        with run.locked():
            assert RunFolder.open(run.path).num_finished() == 0


@contextmanager
def another_process_holding(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of a run until it is killed."""
    program = (
        "import sys, pathlib, time\n"
        "from rlhf_core.contracts.run_folder import RunFolder\n"
        "with RunFolder.open(pathlib.Path(sys.argv[1])).locked():\n"
        "    print('held', flush=True)\n"
        "    time.sleep(300)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


class TestWhereTheLoopStands:
    def test_at_the_beginning(self, run: RunFolder) -> None:
        assert run.num_finished() == 0
        assert run.manifests(0) == {}
        assert run.state_before(0) == LoopState(iteration=0, kl_coef=0.25)

    def test_an_iteration_is_finished_by_its_update(self, run: RunFolder) -> None:
        commit(run, "ppo_update", 0, STATE.to_json())
        for stage in list(STAGES)[:-1]:
            commit(run, stage, 1)
        assert run.num_finished() == 1
        commit(run, "ppo_update", 1, STATE.to_json())
        assert run.num_finished() == 2
        (run.path / "iterations" / "000002").mkdir()
        (run.path / "iterations" / ".000003.tmp").mkdir()
        (run.path / "iterations" / "notes.txt").touch()
        assert run.num_finished() == 2
        assert list(run.manifests(1)) == list(STAGES), "in flow order"

    def test_many_iterations(self, run: RunFolder) -> None:
        for iteration in (8, 9, 10, 11):
            commit(run, "ppo_update", iteration)
        assert run.num_finished() == 12

    def test_state_before(self, run: RunFolder) -> None:
        commit(run, "ppo_update", 2, STATE.to_json())
        assert RunFolder.open(run.path).state_before(3) == STATE
        with pytest.raises(IntegrityError, match=r"iteration 1 of .*run is not committed"):
            run.state_before(2)

    def test_checkpoints(self, run: RunFolder) -> None:
        assert run.checkpoints() == []
        for iteration in (20, 10):
            commit_folder(run.checkpoint_path(iteration), lambda folder: (folder / "state.json").touch(), {})
        (run.path / "checkpoints" / "000030").mkdir()  # no manifest
        (run.path / "checkpoints" / ".000040.removed").mkdir()
        assert run.checkpoints() == [10, 20]
        assert run.checkpoint_path(10) == run.path / "checkpoints" / "000010"


class TestLoopState:
    def test_round_trip_is_exact(self) -> None:
        assert LoopState.from_json(json.loads(canonical_json(STATE.to_json()))) == STATE

    def test_plain_json(self) -> None:
        assert LoopState(0, 0.5).to_json() == {
            "iteration": 0,
            "kl_coef": 0.5,
            "episodes": 0,
            "cursor": {"epoch": 0, "position": 0},
            "moments": {"count": 0, "mean": 0.0, "m2": 0.0},
            "kl_error": None,
        }

    @pytest.mark.parametrize(
        "change", [{"cursor": None}, {"cursor": {"epoch": 0, "place": 1}}, {"moments": 3}, {"beta": 0.1}]
    )
    def test_anything_else_is_refused(self, change: dict[str, Any]) -> None:
        with pytest.raises(IntegrityError, match="not a loop state"):
            LoopState.from_json({**STATE.to_json(), **change})

    @pytest.mark.parametrize("missing", ["iteration", "kl_coef", "cursor", "moments"])
    def test_a_part_is_missing(self, missing: str) -> None:
        with pytest.raises(IntegrityError, match=missing):
            LoopState.from_json({k: v for k, v in STATE.to_json().items() if k != missing})
