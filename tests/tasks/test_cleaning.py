"""Removing runs and parts of them: what nobody may lose stays, and what stays goes on."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from made_runs import made_run
from tiny_world import Tiny
from torture.runs import battery_config, go_on, in_child, start

from rlhf_core.cleaning import Wanted
from rlhf_core.contracts.cleaned import Cleaned
from rlhf_core.contracts.durable import Disk, using_disk
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.locking import holding
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.inspection import artifact_table, iteration_rows
from rlhf_core.run_list import list_runs
from rlhf_core.tables import RunTables
from rlhf_core.verification.run import verify_run
from tasks.lifecycle.cleaning import WHOLE, clean, plan_cleaning, registry_aliases
from tasks.lifecycle.extension import extend_run
from tasks.session.session import open_session
from tasks.tracking.outbox import Ledger

ALL = Wanted(keep=0)


def names(folder: Path) -> list[str]:
    return sorted(run.name for run in list_runs(folder))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        made_run(tmp_path / "runs" / name, [1.0, 2.0])
    return tmp_path / "runs"


class TestRuns:
    def test_a_plan_changes_nothing_and_names_all(self, runs: Path) -> None:
        before = sorted(runs.rglob("*"))
        plan = plan_cleaning(runs, ALL)
        assert sorted(removal.run.name for removal in plan.removals) == ["a", "b", "c"]
        assert plan.num_bytes == sum(run.num_bytes for run in list_runs(runs))
        assert sorted(runs.rglob("*")) == before

    def test_what_was_planned_is_removed_and_nothing_else(self, runs: Path) -> None:
        (runs / "notes.txt").write_text("mine")
        newest = list_runs(runs)[0].name
        assert clean(plan_cleaning(runs, Wanted(keep=1))) == []
        assert names(runs) == [newest]
        assert sorted(p.name for p in runs.iterdir()) == sorted([newest, "notes.txt"])

    def test_one_that_a_process_works_on_stays(self, runs: Path) -> None:
        plan = plan_cleaning(runs, ALL)
        with RunFolder.open(runs / "a").locked():
            assert [r.run.name for r in plan_cleaning(runs, ALL).removals if r.run.name == "a"] == []
            (problem,) = clean(plan)
        assert "another process is working on" in problem
        assert names(runs) == ["a"]

    def test_one_that_was_written_since_stays(self, runs: Path) -> None:
        plan = plan_cleaning(runs, ALL)
        (runs / "b" / "notes.txt").write_text("new")
        os.utime(runs / "b" / "notes.txt", (9e9, 9e9))
        (problem,) = clean(plan)
        assert "b has changed since this was planned" in problem
        assert names(runs) == ["b"]

    def test_one_that_is_gone_already_is_no_problem(self, runs: Path) -> None:
        plan = plan_cleaning(runs, ALL)
        assert clean(plan) == []
        assert clean(plan) == []

    def test_links_lead_nowhere(self, runs: Path, tmp_path: Path) -> None:
        outside = made_run(tmp_path / "outside" / "kept", [1.0, 2.0])
        (runs / "link").symlink_to(outside.path)
        (runs / "a" / "evaluations").symlink_to(outside.path.parent)
        (runs / "b" / "iterations" / "000009").symlink_to(outside.path)
        before = {p: p.read_bytes() for p in outside.path.rglob("*") if p.is_file()}
        assert clean(plan_cleaning(runs, ALL)) == []
        assert names(runs) == []
        assert (runs / "link").is_symlink()
        assert {p: p.read_bytes() for p in outside.path.rglob("*") if p.is_file()} == before

    def test_a_run_that_became_a_link_since_stays(self, runs: Path, tmp_path: Path) -> None:
        plan = plan_cleaning(runs, ALL)
        (runs / "a").rename(tmp_path / "outside")
        (runs / "a").symlink_to(tmp_path / "outside")
        (problem,) = clean(plan)
        assert "has changed since this was planned" in problem
        assert RunFolder.open(tmp_path / "outside").num_finished() == 2
        assert (runs / "a").is_symlink()

    def test_what_another_run_was_begun_from_stays(self, runs: Path) -> None:
        policy = runs / "a" / "checkpoints" / "000001" / "policy"
        made_run(runs / "d", [1.0], changes=[f"policy.model={policy}"])
        plan = plan_cleaning(runs, ALL)
        assert ("a", "d was begun with a model that lies in it") in [(run.name, why) for run, why in plan.spared]

    @pytest.mark.parametrize(("record", "lock"), [("sweep.json", "lock"), ("chain.json", "chain.lock")])
    def test_runs_of_a_sweep_or_chain_at_work_stay(self, runs: Path, record: str, lock: str) -> None:
        (runs / record).write_text("{}")
        with holding(runs / lock, "it"):
            assert len(plan_cleaning(runs, ALL).spared) == 3
        assert len(plan_cleaning(runs, ALL).removals) == 3

    @pytest.mark.parametrize("operation", ["rename", "unlink", "rmdir"])
    def test_killed_in_between_a_run_is_whole_or_gone_and_the_rest_goes_with_the_next(
        self, runs: Path, operation: str
    ) -> None:
        class Dying(Disk):
            pass

        def die(*arguments: Any) -> None:
            getattr(Disk, operation)(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(Dying, operation, die)

        def work() -> None:
            with using_disk(Dying()):
                clean(plan_cleaning(runs, ALL))

        assert in_child(work) == -signal.SIGKILL
        left = list_runs(runs)
        assert len(left) == 2
        assert all((run.state, run.finished) == ("stopped", 2) for run in left), "nobody meets half a run"
        plan = plan_cleaning(runs, Wanted(states=("finished",)))
        assert (len(plan.leftovers), len(plan.removals)) == (1, 0)
        assert clean(plan) == []
        assert len(list(runs.iterdir())) == 2


class Registry:
    """A client of MLflow's whose registry has these aliases: name -> {alias: version}; versions -> iteration tag."""

    def __init__(self, aliases: dict[str, str], tags: dict[str, dict[str, str]]) -> None:
        self.given, self.tags = aliases, tags

    def search_model_versions(self, asked: str) -> list[Any]:
        assert asked == "run_id = 'r1'"
        return [type("V", (), {"name": "m", "version": v, "tags": tags}) for v, tags in self.tags.items()]

    def get_registered_model(self, _: str) -> Any:
        return type("M", (), {"aliases": self.given})


class TestAliases:
    @pytest.fixture
    def tracked(self, runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        Ledger.of(runs / "a").change(runs / "a", outbox="o", run_id="r1", experiment_id="1")
        client = Registry({"champion": "2"}, {"1": {"rlhf.iteration": "1"}, "2": {"rlhf.iteration": "2"}})
        monkeypatch.setattr("tasks.lifecycle.cleaning.connect", lambda _: (client, "1"))
        (runs / "mlflow.db").touch()
        return runs

    def test_what_an_alias_names_stays(self, tracked: Path) -> None:
        plan = plan_cleaning(tracked, ALL)
        assert [(run.name, why) for run, why in plan.spared] == [("a", "MLflow's m@champion is of it")]
        assert clean(plan) == []
        assert names(tracked) == ["a"]
        assert clean(plan_cleaning(tracked, ALL, asks_registry=False)) == []

    def test_where_nobody_can_tell_it_stays(self, tracked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def down(_: object) -> None:
            raise ConnectionError("no answer")

        monkeypatch.setattr("tasks.lifecycle.cleaning.connect", down)
        ((run, why),) = plan_cleaning(tracked, ALL).spared
        assert (run.name, why) == (
            "a",
            "whether an alias of MLflow names it is not known (no answer); start that tracker, or give "
            "--ignore-registry",
        )
        (tracked / "mlflow.db").unlink()
        ((_, why),) = plan_cleaning(tracked, ALL).spared
        assert "mlflow.db is not there" in why
        assert not (tracked / "mlflow.db").exists(), "no empty store is made"

    def test_a_version_that_says_no_iteration_is_of_the_whole_run(self, tracked: Path) -> None:
        run = RunFolder.open(tracked / "a")
        assert registry_aliases(run, Registry({"x": "1", "y": "1"}, {"1": {}})) == {WHOLE: ["m@x", "m@y"]}
        assert registry_aliases(run, Registry({}, {"1": {"rlhf.iteration": "1"}})) == {}


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of five iterations with four checkpoints."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    checkpoint = {"every": 1, "keep_last": 4, "keep_best": False}
    open_session.cache_clear()
    start(battery_config(tiny, {"num_iterations": 5, "checkpoint": checkpoint}), run_dir)
    return run_dir


class TestParts:
    @pytest.fixture
    def run_dir(self, whole: Path, tmp_path: Path) -> Path:
        open_session.cache_clear()
        shutil.copytree(whole, tmp_path / "runs" / "run", symlinks=True)
        return tmp_path / "runs" / "run"

    def test_a_cleaned_run_is_whole_and_goes_on(self, run_dir: Path) -> None:
        plan = plan_cleaning(run_dir.parent, Wanted(keep=0, parts=("checkpoints", "artifacts")))
        assert [(r.part, list(r.checkpoints), list(r.artifacts)) for r in plan.removals] == [
            ("checkpoints", [2, 3, 4], []),
            ("artifacts", [], [1, 2, 3, 4]),
        ]
        before = iteration_rows(RunFolder.open(run_dir))
        assert clean(plan) == []
        run = RunFolder.open(run_dir)
        assert run.checkpoints() == [5]
        assert [len(list(p.glob("*.arrow"))) for p in sorted((run_dir / "iterations").iterdir())] == [6, 0, 0, 0, 0]
        assert iteration_rows(run) == before, "manifests stay"
        assert list(Cleaned.of(run_dir).checkpoints) == [2, 3, 4]
        assert verify_run(run_dir).findings == []
        assert RunTables(run).samples().iterations == (0,)
        with pytest.raises(IntegrityError, match=r"was removed by `rlhf clean` on .*, with all artifacts of it"):
            artifact_table(run, 2, "generate")
        extend_run(str(run_dir), 6)
        go_on(run_dir)
        assert RunFolder.open(run_dir).num_finished() == 6
        assert verify_run(run_dir).findings == []

    def test_what_was_not_cleaned_is_still_missed(self, run_dir: Path) -> None:
        clean(plan_cleaning(run_dir.parent, Wanted(keep=0, parts=("artifacts",))))
        (run_dir / "iterations/000000/03_scores.arrow").unlink()
        shutil.rmtree(run_dir / "checkpoints/000003")
        assert sorted(f.path for f in verify_run(run_dir).findings) == [
            "checkpoints/000003",
            "iterations/000000/03_scores.arrow",
        ]

    def test_checkpoints_that_an_alias_names_stay(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        Ledger.of(run_dir).change(run_dir, outbox="o", run_id="r1", experiment_id="1")
        client = Registry({"best": "1"}, {"1": {"rlhf.iteration": "3"}})
        monkeypatch.setattr("tasks.lifecycle.cleaning.connect", lambda _: (client, "1"))
        (run_dir.parent / "mlflow.db").touch()
        clean(plan_cleaning(run_dir.parent, Wanted(keep=0, parts=("checkpoints",))))
        assert RunFolder.open(run_dir).checkpoints() == [3, 5]

    def test_killed_after_the_record_the_next_does_the_rest(self, run_dir: Path) -> None:
        class Dying(Disk):
            def unlink(self, path: Path) -> None:
                super().unlink(path)
                os.kill(os.getpid(), signal.SIGKILL)

        what = Wanted(keep=0, parts=("checkpoints", "artifacts"))

        def work() -> None:
            with using_disk(Dying()):
                clean(plan_cleaning(run_dir.parent, what))

        assert in_child(work) == -signal.SIGKILL
        assert [f for f in verify_run(run_dir).findings if f.is_damage] == []
        assert clean(plan_cleaning(run_dir.parent, what)) == []
        assert RunFolder.open(run_dir).checkpoints() == [5]
        assert verify_run(run_dir).findings == []

    def test_archived_artifacts_go_by_whole_segments(self, tiny: Tiny, tmp_path: Path) -> None:
        changes = {"num_iterations": 7, "artifacts": {"keep_iterations": 2}, "checkpoint": {"every": 2, "keep_last": 1}}
        open_session.cache_clear()
        start(battery_config(tiny, changes), tmp_path / "runs" / "run")
        run_dir = tmp_path / "runs" / "run"
        assert [p.name for p in sorted((run_dir / "archive").iterdir())] == ["000000-000001", "000002-000003"]
        clean(plan_cleaning(run_dir.parent, Wanted(keep=0, parts=("artifacts",))))
        assert [len(list(p.glob("*.arrow"))) for p in sorted((run_dir / "archive").iterdir())] == [6, 0]
        assert verify_run(run_dir).findings == []
        assert RunTables(RunFolder.open(run_dir)).samples().iterations == (0, 1)
        extend_run(str(run_dir), 9)
        go_on(run_dir)
        assert verify_run(run_dir).findings == []
