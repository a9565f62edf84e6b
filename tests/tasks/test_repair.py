"""A damaged run comes back byte for byte, or stays as it is; a resume never starts on damage without saying so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import DAMAGES, Damage, finished_run, flip, remove
from tiny_world import Tiny
from torture.runs import battery_config, fingerprint, go_on, start

from rlhf_core.contracts.durable import hash_file
from rlhf_core.contracts.errors import DriftError, IntegrityError, RunLockedError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.models.checkpoints import Trainer
from rlhf_core.stages.ppo_update import ppo_update
from rlhf_core.verification.run import verify_run
from tasks.lifecycle import start as lifecycle
from tasks.lifecycle.repair import repair_run
from tasks.lifecycle.start import check_resumable, record_drift
from tasks.session.scoring_models import ScoringModels
from tasks.session.session import Session, open_session


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tiny, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    open_session.cache_clear()
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def content(run_dir: Path) -> dict[str, str]:
    """sha256 of every file that a repair must leave alone when it refuses."""
    files = [p for p in run_dir.rglob("*") if p.is_file() and not p.is_symlink()]
    return {str(p.relative_to(run_dir)): hash_file(p) for p in files}


class TestRepair:
    @pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
    def test_the_run_is_what_it_was(self, damage: Damage, run_dir: Path, finished: Path) -> None:
        damage.harm(run_dir)
        done = repair_run(str(run_dir))
        assert done
        assert verify_run(run_dir).findings == []
        assert fingerprint(run_dir) == fingerprint(finished)
        assert repair_run(str(run_dir)) == [], "there is nothing more to do"

    def test_intact_files_are_not_written_again(self, run_dir: Path) -> None:
        flip(run_dir / "iterations/000001/02_rollouts.arrow")
        before = {p: p.stat().st_ino for p in run_dir.rglob("*") if p.is_file()}
        assert repair_run(str(run_dir)) == ["iterations/000001: computed again: 02_rollouts.arrow"]
        after = {p: p.stat().st_ino for p in run_dir.rglob("*") if p.is_file()}
        written = [str(p.relative_to(run_dir)) for p in after if after[p] != before.get(p)]
        assert [name for name in written if not name.startswith(".quarantine/")] == [
            "iterations/000001/02_rollouts.arrow"
        ]
        assert len(written) == 2, "what it replaced is kept aside"

    def test_what_does_not_belong_is_kept_aside(self, run_dir: Path) -> None:
        (run_dir / "checkpoints/000003/policy/x.bin").write_text("mine")
        (run_dir / "iterations/notes.txt").write_text("mine, too")
        (line, _) = repair_run(str(run_dir))
        assert line.startswith("checkpoints/000003/policy/x.bin was moved to .quarantine/")
        session = {p.name: p.read_text() for p in (run_dir / ".quarantine").rglob("*") if p.is_file()}
        assert session == {"x.bin": "mine", "notes.txt": "mine, too"}

    def test_the_users_own_file_beside_the_run_stays(self, run_dir: Path) -> None:
        (run_dir / "notes.txt").write_text("mine")
        assert repair_run(str(run_dir)) == []
        assert (run_dir / "notes.txt").read_text() == "mine"

    def test_what_comes_back_otherwise_is_refused_and_nothing_is_overwritten(
        self, run_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A reward service that has another opinion today."""
        flip(run_dir / "iterations/000001/03_scores.arrow")
        remove(run_dir / "iterations/000002/02_rollouts.json")
        before = content(run_dir)
        monkeypatch.setattr(ScoringModels, "reward_components", property(_other_opinion))
        with pytest.raises(IntegrityError) as refused:
            repair_run(str(run_dir))
        assert content(run_dir) == before
        said = str(refused.value)
        assert "was not repaired; nothing was changed" in said
        assert "iterations/000001/03_scores.arrow: computed again it has sha256" in said
        assert f"the newest intact state is {run_dir}/checkpoints/000003" in said

    def test_a_lost_manifest_whose_readers_disagree_is_refused(
        self, run_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nothing tells the digest of the lost artifact but the manifests of what read it."""
        remove(run_dir / "iterations/000001/03_scores.json")
        remove(run_dir / "iterations/000001/03_scores.arrow")
        before = content(run_dir)
        monkeypatch.setattr(ScoringModels, "reward_components", property(_other_opinion))
        with pytest.raises(IntegrityError, match=r"was not repaired; nothing was changed"):
            repair_run(str(run_dir))
        assert content(run_dir) == before

    def test_a_run_without_its_record_is_refused(self, run_dir: Path) -> None:
        flip(run_dir / "run.json")
        with pytest.raises(IntegrityError, match=r"cannot be repaired; nothing was changed:\n.*put run\.json back"):
            repair_run(str(run_dir))

    def test_other_conditions_are_refused(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        flip(run_dir / "iterations/000001/03_scores.arrow")
        another_torch(monkeypatch)
        with pytest.raises(DriftError, match=r"so that repairing it would not give the same run:\n  versions\.torch"):
            repair_run(str(run_dir))

    def test_nobody_else_works_on_the_run_meanwhile(self, run_dir: Path) -> None:
        flip(run_dir / "iterations/000001/03_scores.arrow")
        with RunFolder.open(run_dir).locked(), pytest.raises(RunLockedError):
            repair_run(str(run_dir))


def _other_opinion(models: ScoringModels) -> Any:
    from rlhf_core.rewards.loading import load_component

    config = models._config.reward.components[0].model_copy(update={"weight": 1.0})
    component = load_component(
        config,
        field="reward",
        columns=[],
        policy_vocabulary="",
        device=torch.device("cpu"),
        frozen=models._models,
    )
    with torch.no_grad():
        component.model.score.weight.mul_(1.01)  # pyright: ignore[reportAttributeAccessIssue]
    return [component]


class TestResume:
    def test_damage_is_refused_with_the_remedy(self, run_dir: Path) -> None:
        flip(run_dir / "iterations/000001/02_rollouts.arrow")
        flip(run_dir / "checkpoints/000003/state.json")
        before = content(run_dir)
        with pytest.raises(IntegrityError) as refused:
            check_resumable(str(run_dir), accept_drift=False)
        first, *lines, last = str(refused.value).splitlines()
        assert first == f"{run_dir} is damaged, and was not resumed:"
        assert lines[0] == "  checkpoints/000003/state.json (damaged): its sha256 is not the committed one"
        assert lines[1].startswith("  iterations/000001/02_rollouts.arrow (damaged): sha256 ")
        assert last == f"2 damaged, 2 recoverable by  rlhf resume {run_dir} --repair"
        assert content(run_dir) == before

    def test_only_the_first_findings_are_named(self, run_dir: Path) -> None:
        for path in run_dir.glob("iterations/*/*.json"):
            flip(path)
        with pytest.raises(IntegrityError, match=rf"and 8 more: `rlhf verify {run_dir}` shows all"):
            check_resumable(str(run_dir), accept_drift=False)

    def test_damage_in_an_unfinished_iteration_is_told_and_computed_again(
        self, run_dir: Path, finished: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        for name in ("iterations/000002/06_update.json", "checkpoints/000003", "before_after.json", "report.png"):
            remove(run_dir / name)
        flip(run_dir / "iterations/000002/02_rollouts.arrow")
        flip(run_dir / "iterations/000002/03_scores.json")
        go_on(run_dir)
        said = [record.getMessage() for record in caplog.records if record.name == "tasks.lifecycle.start"]
        assert said[0].startswith("iterations/000002/02_rollouts.arrow (damaged): sha256 ")
        assert said[1].startswith("iterations/000002/03_scores.json (damaged): its content is not what was sealed; ")
        assert fingerprint(run_dir) == fingerprint(finished)

    def test_a_missing_checkpoint_is_told(self, run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
        remove(run_dir / "checkpoints/000003")
        go_on(run_dir)
        assert "checkpoints/000003 (missing)" in caplog.text
        assert verify_run(run_dir).findings == []

    def test_everything_is_read_once_in_a_process_unless_it_changes(
        self, run_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reads: list[Path] = []

        def counted(path: Path, **settings: Any) -> Any:
            reads.append(path)
            return verify_run(path, **settings)

        monkeypatch.setattr(lifecycle, "verify_run", counted)
        for _ in range(2):
            check_resumable(str(run_dir), accept_drift=False)
        assert len(reads) == 1
        flip(run_dir / "iterations/000001/02_rollouts.arrow")
        with pytest.raises(IntegrityError):
            check_resumable(str(run_dir), accept_drift=False)


def another_torch(monkeypatch: pytest.MonkeyPatch, version: str = "99.0") -> None:
    """A machine with another version of torch, as far as the run can tell."""
    real = lifecycle_run_identity

    def identity(*arguments: Any) -> dict[str, Any]:
        found = real(*arguments)
        return found | {"versions": {**found["versions"], "torch": version}}

    monkeypatch.setattr(lifecycle, "run_identity", identity)


lifecycle_run_identity = lifecycle.run_identity


def other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose updates give other bits."""

    def update(trainer: Trainer, *arguments: Any, **settings: Any) -> Any:
        result = ppo_update(trainer, *arguments, **settings)
        with torch.no_grad():
            next(parameter for _, parameter in trainer.actor_critic.named_parameters()).add_(1e-6)
        return result

    monkeypatch.setattr("tasks.session.policy_state.ppo_update", update)


@pytest.fixture
def stopped(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped in iteration 2, after three stages of it, without a checkpoint."""
    run_dir = tmp_path / "stopped"

    def stop(*_: Any, **__: Any) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr("tasks.shape_rewards.core.shape_rewards", _after(2, stop))
        with pytest.raises(InterruptedError):
            start(battery_config(tiny, {"checkpoint": {"every": 5}}), run_dir)
    open_session.cache_clear()
    assert RunFolder.open(run_dir).num_finished() == 2
    return run_dir


def _after(calls: int, then: Callable[..., Any]) -> Callable[..., Any]:
    from rlhf_core.stages.shape_rewards import shape_rewards

    done: list[int] = []

    def call(*arguments: Any, **settings: Any) -> Any:
        done.append(1)
        return (then if len(done) > calls else shape_rewards)(*arguments, **settings)

    return call


class TestDrift:
    def test_an_accepted_drift_is_recorded_and_the_next_resume_is_exact(
        self, stopped: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = RunFolder.open(stopped)
        committed = Session(old).policy_digest(2)
        before = {stage: m.key for stage, m in old.manifests(2).items()}
        another_torch(monkeypatch)
        other_bits(monkeypatch)
        with pytest.raises(DriftError, match=r"versions\.torch: .* -> 99\.0"):
            check_resumable(str(stopped), accept_drift=False)
        check_resumable(str(stopped), accept_drift=True)
        assert record_drift(str(stopped)) == [f"versions.torch: {torch.__version__} -> 99.0"]

        run = RunFolder.open(stopped)
        (drift,) = run.drifts
        assert (drift.iteration, drift.before) == (2, old.identity)
        assert drift.weights not in {committed, ""}
        assert run.checkpoints() == [2], "the weights that it goes on with are kept"
        assert (run.identity_at(1), run.identity_at(2)) == (old.identity, run.identity)
        assert run.identity["versions"]["torch"] == "99.0"
        assert Session(run).policy_digest(2) == drift.weights
        assert verify_run(stopped).findings == []

        go_on(stopped)  # accepts nothing
        run = RunFolder.open(stopped)
        assert run.num_finished() == 3
        assert {stage: m.key for stage, m in run.manifests(2).items() if stage in before}.items().isdisjoint(
            before.items()
        ), "what was computed under the old conditions is computed again"
        assert verify_run(stopped).findings == []
        remove(stopped / "checkpoints")
        assert Session(RunFolder.open(stopped)).policy.trainer(2).digest() == drift.weights, (
            "also without its checkpoint"
        )

    def test_where_the_bits_are_the_same_no_checkpoint_is_added(
        self, stopped: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        committed = Session(RunFolder.open(stopped)).policy_digest(2)
        another_torch(monkeypatch)
        record_drift(str(stopped))
        run = RunFolder.open(stopped)
        assert ([drift.weights for drift in run.drifts], run.checkpoints()) == ([committed], [])

    def test_twice_at_one_iteration(self, stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        another_torch(monkeypatch)
        record_drift(str(stopped))
        another_torch(monkeypatch, "100.0")
        other_bits(monkeypatch)
        record_drift(str(stopped))
        run = RunFolder.open(stopped)
        assert [drift.iteration for drift in run.drifts] == [2, 2]
        assert run.identity_at(1)["versions"]["torch"] == torch.__version__
        assert run.identity_at(2)["versions"]["torch"] == "100.0"
        go_on(stopped)
        assert verify_run(stopped).findings == []

    def test_without_a_drift_nothing_is_recorded(self, stopped: Path) -> None:
        assert record_drift(str(stopped)) == []
        assert RunFolder.open(stopped).drifts == ()

    def test_damage_older_than_a_drift_says_why_it_is_lost(
        self, stopped: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        another_torch(monkeypatch)
        other_bits(monkeypatch)
        record_drift(str(stopped))
        flip(stopped / "iterations/000001/03_scores.arrow")
        found = verify_run(stopped)
        assert found.summary() == "1 damaged, 1 only from a copy"
        said = "it is older than the drift accepted at iteration 2, so that it cannot be computed again here"
        with pytest.raises(IntegrityError, match=rf"(?s)cannot be repaired; nothing was changed:.*{said}.*000002"):
            repair_run(str(stopped))
        with pytest.raises(IntegrityError, match=said):
            check_resumable(str(stopped), accept_drift=False)


@pytest.fixture(scope="module")
def archived(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five iterations, the first two of them in one segment."""
    run_dir = tmp_path_factory.mktemp("archived") / "run"
    changes = {"num_iterations": 5, "checkpoint": {"every": 2, "keep_last": 2}, "artifacts": {"keep_iterations": 2}}
    start(battery_config(tiny, changes), run_dir)
    assert [p.name for p in (run_dir / "archive").iterdir()] == ["000000-000001"]
    return run_dir


class TestArchive:
    @pytest.mark.parametrize("name", ["02_rollouts.arrow", "manifests.jsonl", "manifest.json"])
    def test_a_damaged_segment_comes_back_as_the_files_it_was_made_of(
        self, archived: Path, tmp_path: Path, name: str
    ) -> None:
        open_session.cache_clear()
        run_dir = Path(shutil.copytree(archived, tmp_path / "run"))
        assert verify_run(run_dir).findings == []
        flip(run_dir / "archive/000000-000001" / name)
        found = verify_run(run_dir)
        assert {finding.kind for finding in found.findings} == {"damaged"}
        assert all(finding.path.startswith("archive/000000-000001") for finding in found.findings)
        with pytest.raises(IntegrityError, match=r"is damaged, and was not resumed"):
            check_resumable(str(run_dir), accept_drift=False)
        done = repair_run(str(run_dir))
        assert done[-1].startswith("archive/000000-000001 was moved to .quarantine/")
        assert verify_run(run_dir).findings == []
        assert fingerprint(run_dir) == fingerprint(archived)
