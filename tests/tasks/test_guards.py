"""What is kept of guards on disk: the record, the alias of the last good checkpoint, and retention around it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import IntegrityError, RunLockedError, UserError
from rlhf_core.contracts.records import read_record, write_record
from rlhf_core.contracts.run_folder import RunFolder
from tasks.lifecycle import guards as module
from tasks.lifecycle.guards import GuardRecord, Guards, accept_tripped, change_guards, guard_metrics
from tasks.lifecycle.retention import expired_checkpoints

KL = [1.0, 5.0, 20.0, 20.0, 1.0, 20.0]
STOP = ("guards.kl_ceiling.threshold=10", "guards.kl_ceiling.action=stop")
OTHERS_OFF = [
    f"guards.{name}.threshold=null"
    for name in ("negative_kl", "entropy_floor", "distinct_floor", "repetition_ceiling", "length_correlation")
]


@pytest.fixture
def made(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunFolder]:
    def make(*overrides: str) -> RunFolder:
        return RunFolder.create(tmp_path / "run", tiny_config([*OTHERS_OFF, *overrides]), {"a": 1, "models": {}})

    return make


@pytest.fixture(autouse=True)
def numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six finished iterations, of which only a few numbers are known."""
    monkeypatch.setattr(
        module,
        "_metrics",
        lambda _run, i: {"objective/kl": KL[i], "kl/k3": KL[i], "kl/beta": 0.1, "policy/entropy_avg": 1.0},
    )
    monkeypatch.setattr(RunFolder, "num_finished", lambda _self: 0)


def names(found: Any) -> list[str]:
    return [finding.guard for finding in found]


class TestRecord:
    def test_says_which_guard_tripped_in_which_iteration(self, made: Callable[..., RunFolder]) -> None:
        run = made(*STOP)
        guards = Guards(run)
        assert [names(guards.check(i)) for i in range(3)] == [[], [], ["kl_ceiling"]]
        record = {"tripped": {"2": ["kl_ceiling"]}, "accepted": {}, "stopped": None}
        assert read_record(run.path / "guards.json") == record
        assert [guard_metrics(run, i) for i in (1, 2)] == [
            {"guard/kl_ceiling": 0.0, "guard/score_drift": 0.0},
            {"guard/kl_ceiling": 1.0, "guard/score_drift": 0.0},
        ]

    def test_there_is_none_before_a_guard_trips(self, made: Callable[..., RunFolder]) -> None:
        run = made(*STOP)
        assert Guards(run).check(1) == []
        assert not (run.path / "guards.json").exists()
        assert GuardRecord.of(run) == GuardRecord()

    def test_an_iteration_that_is_done_again_is_judged_again(self, made: Callable[..., RunFolder]) -> None:
        run = made(*STOP)
        Guards(run).check(3)
        Guards(run).check(2)
        assert GuardRecord.of(run).tripped == {"2": ["kl_ceiling"]}

    def test_acceptance_lasts_until_the_number_is_back_within(self, made: Callable[..., RunFolder]) -> None:
        run = made(*STOP)
        guards = Guards(run)
        assert guards.check(2)[0].acts
        guards.stop("kl_ceiling")
        assert GuardRecord.of(run).stopped == "kl_ceiling"
        assert guards.accept() == ["kl_ceiling"]
        assert GuardRecord.of(run).stopped is None
        assert [finding.acts for finding in guards.check(3)] == [False]
        assert guards.check(4) == []
        assert [finding.acts for finding in Guards(run).check(5)] == [True], "in another process as well"

    def test_a_warning_needs_no_acceptance(self, made: Callable[..., RunFolder]) -> None:
        guards = Guards(made(*STOP, "guards.entropy_floor.threshold=2"))
        assert names(guards.check(2)) == ["kl_ceiling", "entropy_floor"]
        assert guards.accept() == ["kl_ceiling"]

    def test_why_it_stopped_is_forgotten_once_nothing_stops_it(self, made: Callable[..., RunFolder]) -> None:
        run = made(*STOP)
        Guards(run).check(2)
        Guards(run).stop("kl_ceiling")
        Guards(run).check(2)
        assert GuardRecord.of(run).stopped == "kl_ceiling"
        change_guards(str(run.path), ["guards.kl_ceiling.threshold=30"])
        assert Guards(RunFolder.open(run.path)).check(2) == []
        assert GuardRecord.of(run).stopped is None

    def test_a_guards_history_is_read_once(
        self, made: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[int] = []
        known = module._metrics
        monkeypatch.setattr(module, "_metrics", lambda run, i: read.append(i) or known(run, i))
        guards = Guards(made(*STOP))
        for iteration in (0, 1, 1, 2, 3):
            guards.check(iteration)
        assert read == [0, 1, 2, 3]
        assert guards.last_good() == 1

    @pytest.mark.parametrize("content", [b"", b"[]", b'{"foreign": 1}'])
    def test_a_damaged_one_is_told(self, made: Callable[..., RunFolder], content: bytes) -> None:
        run = made()
        (run.path / "guards.json").write_bytes(content)
        with pytest.raises(IntegrityError, match=r"guards\.json"):
            GuardRecord.of(run)


class TestChanging:
    def test_guards_are_changed_for_good_and_nothing_else_is(self, made: Callable[..., RunFolder]) -> None:
        run = made(*STOP)
        change_guards(str(run.path), ["guards.kl_ceiling.threshold=30", "guards.score_drift.threshold=null"])
        changed = RunFolder.open(run.path)
        assert changed.config.guards.kl_ceiling.threshold == 30
        assert changed.config.guards.active.keys() == {"kl_ceiling"}
        assert changed.config.model_copy(update={"guards": run.config.guards}) == run.config
        assert changed.identity == run.identity

    @pytest.mark.parametrize(
        ("overrides", "said"),
        [
            (["kl.coef=1"], "--set kl.coef cannot be changed on resume"),
            (["guards.kl_ceiling.threshold=9", "seed=1"], "--set seed cannot be changed on resume"),
            (["guards.kl_ceiling.threshold=-9"], r"guards\.kl_ceiling\.threshold"),
            (["guards.kl_celing.threshold=9"], "did you mean kl_ceiling"),
        ],
    )
    def test_a_mistake_changes_nothing(self, made: Callable[..., RunFolder], overrides: list[str], said: str) -> None:
        run = made(*STOP)
        before = (run.path / "run.json").read_bytes()
        with pytest.raises(UserError, match=said):
            change_guards(str(run.path), overrides)
        assert (run.path / "run.json").read_bytes() == before

    def test_a_run_that_somebody_works_on_is_left_alone(self, made: Callable[..., RunFolder]) -> None:
        run = made(*STOP)
        with run.locked(), pytest.raises(RunLockedError):
            change_guards(str(run.path), ["guards.kl_ceiling.threshold=30"])
        with run.locked(), pytest.raises(RunLockedError):
            accept_tripped(str(run.path))

    def test_there_must_be_something_to_accept(self, made: Callable[..., RunFolder]) -> None:
        with pytest.raises(UserError, match="no guard is stopping"):
            accept_tripped(str(made(*STOP).path))


class TestRetention:
    @staticmethod
    def with_checkpoints(run: RunFolder, *iterations: int) -> RunFolder:
        for iteration in iterations:
            run.checkpoint_path(iteration).mkdir(parents=True)
            (run.checkpoint_path(iteration) / "manifest.json").touch()
        return run

    def test_the_last_good_one_is_out_of_reach(self, made: Callable[..., RunFolder]) -> None:
        kept_one = ("checkpoint.keep_last=1", "checkpoint.keep_best=false")
        run = self.with_checkpoints(made(*kept_one), 1, 2, 3, 4)
        assert expired_checkpoints(run) == [1, 2, 3]
        run.keep_as_last_good(2)
        assert expired_checkpoints(run) == [1, 3]
        run.keep_as_last_good(3)
        assert expired_checkpoints(run) == [1, 2], "there is one of them"

    @pytest.mark.parametrize(("action", "expired"), [("warn", [1, 2, 3]), ("stop", [1, 2]), ("pause", [1, 2])])
    def test_where_a_guard_may_stop_the_newest_is_not_kept_alone(
        self, made: Callable[..., RunFolder], action: str, expired: list[int]
    ) -> None:
        kept_one = ("checkpoint.keep_last=1", "checkpoint.keep_best=false", *STOP, f"guards.kl_ceiling.action={action}")
        assert expired_checkpoints(self.with_checkpoints(made(*kept_one), 1, 2, 3, 4)) == expired

    def test_the_alias_is_a_link_that_is_replaced_at_once(self, made: Callable[..., RunFolder]) -> None:
        run = self.with_checkpoints(made(), 1, 12)
        assert run.last_good is None
        for iteration in (12, 1):
            run.keep_as_last_good(iteration)
            link = run.path / "checkpoints" / "last_good"
            assert (run.last_good, str(link.readlink())) == (iteration, f"{iteration:06d}")
            assert (link / "manifest.json").is_file()
        assert run.checkpoints() == [1, 12]
        assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == ["000001", "000012", "last_good"]

    def test_the_alias_newest_is_not_taken_by_an_older_state_that_is_registered_late(
        self, made: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tasks.tracking.models import TrackedModels

        monkeypatch.setattr("tasks.tracking.notes.version_note", lambda _run, _iteration: "")
        aliases: dict[str, str] = {}

        class Client(MagicMock):
            def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
                aliases[alias] = version

        run = self.with_checkpoints(made(), 3, 4, 5)
        write_record(run.path / "mlflow.json", {"run_id": "r", "experiment_id": "1"})
        client = Client()
        client.search_model_versions.return_value = []
        client.search_logged_models.return_value.token = None
        client.get_registered_model.return_value.aliases = {}
        sent = TrackedModels(run, client, "r", "1", "o", lambda _links: None)
        sent.versions = {4: "1"}
        monkeypatch.setattr("tasks.tracking.models.send_model", lambda *_: None)
        for iteration, version in ((3, "2"), (5, "3")):
            (run.checkpoint_path(iteration) / "policy").mkdir()
            client.create_model_version.return_value.version = version
            sent._send(iteration)
            assert aliases == ({} if iteration == 3 else {"newest": "3"})
        assert sent.versions == {3: "2", 4: "1", 5: "3"}
