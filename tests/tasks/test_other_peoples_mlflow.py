"""A store that others work in, delete from, rename and move: a run's tracking goes on, or says what helps."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tracked_runs import add_checkpoint, client_of, ledger_of, send, trackable

from rlhf_core.contracts.run_folder import RunFolder
from tasks.tracking import models as tracked_models
from tasks.tracking.models import TrackedModels


@pytest.fixture
def run(tmp_path: Path, empty_store: Path) -> RunFolder:
    """A finished run that the tracker knows nothing of."""
    return trackable(tmp_path / "runs" / "run", empty_store)


@pytest.fixture
def sent(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """The same, sent."""
    assert send(run, monkeypatch) == []
    return run


def the_run(run: RunFolder) -> Any:
    run_id = ledger_of(run).run_id
    assert run_id is not None
    return client_of(run).get_run(run_id)


def steps(run: RunFolder, metric: str = "episode") -> list[int]:
    return [m.step for m in client_of(run).get_metric_history(ledger_of(run).run_id, metric)]


def versions(run: RunFolder) -> dict[str, str]:
    """Version -> its iteration, or nothing where it has none."""
    found = client_of(run).search_model_versions("name = 'rlhf-policy'")
    return {str(version.version): version.tags.get("rlhf.iteration", "") for version in found}


class TestWhatOthersMade:
    @staticmethod
    def version_with(run: RunFolder, alias: str) -> str:
        return str(client_of(run).get_model_version_by_alias("rlhf-policy", alias).version)

    def test_a_version_registered_by_hand_is_left_alone(self, sent: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        client, run_id = client_of(sent), ledger_of(sent).run_id
        ours = client.get_model_version("rlhf-policy", "1")
        marked = {"rlhf.run_id": run_id, "rlhf.iteration": "the best"}
        for source, tags in ((ours.source, {}), (ours.source, marked), ("models:/rlhf-policy/1", ours.tags)):
            client.create_model_version("rlhf-policy", source, run_id=run_id, tags=tags)
        add_checkpoint(sent, 1)
        assert send(sent, monkeypatch) == []
        assert versions(sent) == {"1": "2", "2": "3", "3": "", "4": "the best", "5": "2", "6": "1"}

    def test_a_model_that_a_person_logged_into_our_run_is_left_alone(
        self, sent: RunFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client, ledger = client_of(sent), ledger_of(sent)
        for params in ({}, {"iteration": "best"}, {"iteration": "9"}):
            client.create_logged_model(ledger.experiment_id, name="mine", source_run_id=ledger.run_id, params=params)
        add_checkpoint(sent, 1)
        assert send(sent, monkeypatch) == []
        names = sorted(model.name for model in client.search_logged_models([ledger.experiment_id]))
        assert names == ["mine", "mine", "mine", "run-000001", "run-000002", "run-000003"]
        assert len(the_run(sent).outputs.model_outputs) == 3, "ours"

    def test_a_model_of_ours_that_somebody_registered_under_another_name_is_not_removed(
        self, sent: RunFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client, ledger = client_of(sent), ledger_of(sent)
        (model, *_) = client.search_logged_models([ledger.experiment_id], "name = 'run-000002'")
        client.create_registered_model("production")
        client.create_model_version("production", f"models:/{model.model_id}", run_id=ledger.run_id)
        client.delete_model_version("rlhf-policy", "1")
        shutil.rmtree(sent.checkpoint_path(2))
        assert send(sent, monkeypatch) == []
        assert client.get_logged_model(model.model_id).model_id == model.model_id

    @pytest.mark.parametrize("alias", ["newest", "best", "last_good"])
    def test_an_alias_that_was_moved_by_hand_stays(
        self, sent: RunFolder, monkeypatch: pytest.MonkeyPatch, alias: str
    ) -> None:
        client = client_of(sent)
        sent.keep_as_last_good(3)
        send(sent, monkeypatch)
        client.set_registered_model_alias("rlhf-policy", alias, "1")
        add_checkpoint(sent, 1)
        sent.keep_as_last_good(2 if alias != "last_good" else 3)
        said = send(sent, monkeypatch)
        assert self.version_with(sent, alias) == "1"
        assert f"the alias {alias} of rlhf-policy was moved by hand to version 1, and stays there" in said
        others = {"newest": "2", "best": "2", "last_good": "1"}
        for other in others.keys() - {alias}:
            assert self.version_with(sent, other) == others[other], "ours is moved"

    def test_an_alias_goes_from_run_to_run_as_before(self, sent: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("second", "third"):
            other = trackable(sent.path.parent / name, None)
            assert send(other, monkeypatch) == []
            found = client_of(sent).get_model_version_by_alias("rlhf-policy", "newest")
            assert found.tags["rlhf.run_id"] == ledger_of(other).run_id

    def test_an_alias_of_an_earlier_release_is_ours(self, sent: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        client = client_of(sent)
        with monkeypatch.context() as patched:
            patched.setattr(tracked_models, "OURS_TAG", "unknown")
            old = client.get_model_version_by_alias("rlhf-policy", "newest")
            for tag in ("rlhf.outbox", "rlhf.alias.newest"):
                client.delete_model_version_tag("rlhf-policy", old.version, tag)
        other = trackable(sent.path.parent / "second", None)
        assert send(other, monkeypatch) == []
        assert client.get_model_version_by_alias("rlhf-policy", "newest").version != old.version

    def test_a_run_with_our_name_and_one_with_our_tags_are_left_alone(
        self, sent: RunFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client, ledger = client_of(sent), ledger_of(sent)
        named = client.create_run(ledger.experiment_id, run_name="run")
        copied = client.create_run(ledger.experiment_id, run_name="run", tags={"rlhf.outbox": ledger.outbox})
        client.log_metric(copied.info.run_id, "objective/kl", 1.0)
        assert send(sent, monkeypatch) == []
        for theirs in (named, copied):
            assert client.get_run(theirs.info.run_id).info.lifecycle_stage == "active"
        assert ledger_of(sent).run_id == ledger.run_id

    def test_metrics_params_and_tables_of_others_in_our_run_stop_nothing(
        self, run: RunFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tasks.tracking import tracker as tracking

        sender = tracking._Sender(run, {})
        client, run_id = client_of(run), ledger_of(run).run_id
        client.log_metric(run_id, "episode", 1.0, step=1000)
        client.set_tag(run_id, "mlflow.loggedArtifacts", "see my notes")
        sender.ledger.change(run.path, is_described=False)
        assert send(run, monkeypatch) == []
        assert sorted(steps(run)) == [0, 1, 2, 1000]
        assert sorted(steps(run, "objective/kl")) == [0, 1, 2]

    def test_a_param_that_somebody_set_first_stays(self, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        from tasks.tracking import tracker as tracking

        real = tracking._Sender._describe

        def after_somebody(sender: Any, run_id: str) -> None:
            client_of(run).log_param(run_id, "seed", "mine")
            real(sender, run_id)

        monkeypatch.setattr(tracking._Sender, "_describe", after_somebody)
        assert send(run, monkeypatch) == []
        assert the_run(run).data.params["seed"] == "mine"
        assert steps(run) == [0, 1, 2]

    def test_all_logged_models_are_seen_however_many(self, sent: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        ledger = ledger_of(sent)
        from mlflow.tracking import MlflowClient

        real = MlflowClient.search_logged_models
        monkeypatch.setattr(
            MlflowClient,
            "search_logged_models",
            lambda self, *arguments, **named: real(self, *arguments, **{**named, "max_results": 1}),
        )
        models = TrackedModels(
            sent, client_of(sent), str(ledger.run_id), str(ledger.experiment_id), ledger.outbox, lambda _: None
        )
        assert len(models._models()) == 2


class TestWhatIsGone:
    @staticmethod
    def obey(sentence: str, command: str, tmp_path: Path) -> None:
        """Do what a sentence says."""
        words = next(part for part in sentence.split("  ") if command in part).split()
        name, _, uri = words[0].partition("=")
        assert name == "MLFLOW_TRACKING_URI"
        environment = {**os.environ, name: uri}
        done = subprocess.run(
            [sys.executable, "-m", *words[1:]],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def test_a_deleted_experiment_is_named_and_the_remedy_works(
        self, sent: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        client_of(sent).delete_experiment(ledger_of(sent).experiment_id)
        said = send(sent, monkeypatch)
        assert "the experiment rlhf-flow is deleted there: restore it with" in said[0]
        assert said[-1].startswith("MLflow has not taken the end of the run: the experiment rlhf-flow is deleted")
        assert not any("nothing is lost" in sentence for sentence in said)
        self.obey(said[-1], "experiments restore", tmp_path)
        assert send(sent, monkeypatch) == []
        assert the_run(sent).info.status == "FINISHED"

    def test_so_is_one_that_was_deleted_before_the_run_began(
        self, run: RunFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client = client_of(run)
        client.delete_experiment(client.create_experiment("rlhf-flow"))
        said = send(run, monkeypatch)
        assert said[-1].startswith("MLflow has not taken 3 of 3 iterations: the experiment rlhf-flow is deleted there")
        assert "new runs may also name another tracking.experiment" in said[-1]

    def test_a_deleted_run_is_named_and_the_remedy_works(
        self, sent: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        client_of(sent).delete_run(ledger_of(sent).run_id)
        said = send(sent, monkeypatch)
        assert "is deleted there: restore it with" in said[-1]
        assert not any("nothing is lost" in sentence for sentence in said)
        self.obey(said[-1], "runs restore", tmp_path)
        assert send(sent, monkeypatch) == []

    def test_a_run_that_is_deleted_while_it_is_sent_is_named_too(
        self, run: RunFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tasks.tracking import tracker as tracking

        real = tracking.log_metrics

        def delete_first(client: Any, run_id: str, *rest: Any) -> None:
            client_of(run).delete_run(run_id)
            real(client, run_id, *rest)

        monkeypatch.setattr(tracking, "log_metrics", delete_first)
        monkeypatch.setattr("tasks.tracking.outbox.LAST_TRIES", 2)
        with monkeypatch.context() as patched:
            patched.setattr("tracked_runs.tracking.log_metrics", delete_first)
            said = send(run, monkeypatch)
        assert said[-1].startswith("MLflow has not taken 3 of 3 iterations: ")
        assert "nothing is lost" not in said[-1]

    def test_a_run_that_was_removed_for_good_is_named_and_the_remedy_works(
        self, sent: RunFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with sqlite3.connect(sent.path.parent / "mlflow.db") as database:
            database.execute("pragma foreign_keys = off")
            database.execute("delete from runs")
        database.close()
        said = send(sent, monkeypatch)
        assert f"has no run {ledger_of(sent).run_id}: it was removed for good" in said[-1]
        assert (
            f"remove {sent.path}/mlflow.json, and `rlhf resume {sent.path}` sends everything to a new run" in said[-1]
        )
        (sent.path / "mlflow.json").unlink()
        assert send(sent, monkeypatch) == []
        assert steps(sent) == [0, 1, 2]

    def test_a_renamed_experiment_is_followed(self, sent: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        client, experiment_id = client_of(sent), ledger_of(sent).experiment_id
        client.rename_experiment(experiment_id, "summer of rewards")
        add_checkpoint(sent, 1)
        assert send(sent, monkeypatch) == []
        assert client.get_experiment_by_name("rlhf-flow") is None
        assert the_run(sent).info.experiment_id == experiment_id
        assert len(versions(sent)) == 3

    def test_an_error_that_stays_is_not_called_an_outage(self, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import ErrorCode
        from mlflow.tracking import MlflowClient

        def refuse(*_: Any, **__: Any) -> None:
            raise MlflowException("no such endpoint", error_code=ErrorCode.Value("ENDPOINT_NOT_FOUND"))

        monkeypatch.setattr(MlflowClient, "create_logged_model", refuse)
        said = send(run, monkeypatch)
        assert said[-1] == (
            "MLflow has not taken the end of the run: it refuses (no such endpoint): "
            f"`rlhf resume {run.path}` tries again once that is put right; the run folder has everything"
        )


class TestMoving:
    def test_a_moved_folder_of_runs_takes_its_store_along(
        self, sent: RunFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = sent.path.parent
        new = old.with_name("moved")
        old.rename(new)
        run = RunFolder.open(new / "run")
        add_checkpoint(run, 1)
        said = send(run, monkeypatch)
        assert said == [f"{new}/mlflow.db was in {old}: its places of files there are now those beside it"]
        assert not old.exists(), "nothing is written to the old place"
        found = the_run(run)
        assert found.info.artifact_uri.startswith((new / "mlartifacts").as_uri())
        assert found.data.tags["rlhf.run_dir"] == str(new / "run")
        names = {item.path for item in client_of(run).list_artifacts(found.info.run_id)}
        assert names >= {"config.yaml", "report.png", "view.html"}
        assert len(versions(run)) == 3
        assert send(run, monkeypatch) == [], "told once"

    def test_a_copied_folder_of_runs_leaves_the_first_one_alone(
        self, sent: RunFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = sent.path.parent
        new = Path(shutil.copytree(old, old.with_name("copy")))

        def content() -> dict[str, bytes]:
            return {
                str(p): p.read_bytes() for p in sorted(old.rglob("*")) if p.is_file() and p.name != ".mlflow.db.lock"
            }

        before = content()
        (new / "run" / "report.png").write_bytes(b"another")
        send(RunFolder.open(new / "run"), monkeypatch)
        assert content() == before
        assert [path.read_bytes() for path in new.glob("mlartifacts/*/artifacts/report.png")] == [b"another"]
        send(sent, monkeypatch)
        assert steps(sent) == [0, 1, 2]

    def test_a_run_copied_beside_the_first_gets_a_run_of_its_own(
        self, sent: RunFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        second = RunFolder.open(Path(shutil.copytree(sent.path, sent.path.with_name("second"))))
        assert send(second, monkeypatch) == []
        assert ledger_of(second).run_id != ledger_of(sent).run_id
        assert (steps(sent), steps(second)) == ([0, 1, 2], [0, 1, 2])

    def test_a_run_that_is_moved_away_from_its_store_begins_in_another(
        self, sent: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, empty_store: Path
    ) -> None:
        (tmp_path / "other").mkdir()
        shutil.copy(empty_store, tmp_path / "other" / "mlflow.db")
        moved = sent.path.rename(tmp_path / "other" / "run")
        assert send(RunFolder.open(moved), monkeypatch) == []
        assert steps(RunFolder.open(moved)) == [0, 1, 2]

    def test_files_that_were_elsewhere_on_purpose_stay_there(
        self, run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        place = (tmp_path / "big" / "mlartifacts").as_uri()
        client_of(run).create_experiment("rlhf-flow", artifact_location=place)
        assert send(run, monkeypatch) == []
        assert send(run, monkeypatch) == []
        assert the_run(run).info.artifact_uri.startswith(place)

    def test_a_renamed_run_is_the_same_run(self, sent: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        renamed = RunFolder.open(sent.path.rename(sent.path.with_name("better-name")))
        assert send(renamed, monkeypatch) == []
        assert steps(renamed) == [0, 1, 2]
        assert len(versions(renamed)) == 2
        assert the_run(renamed).data.tags["rlhf.run_dir"] == str(renamed.path)

    def test_a_relative_store_is_made_absolute_once(
        self, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from made_runs import made_run

        from tasks.tracking.store import tracking_uri

        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        run = made_run(tmp_path / "runs" / "run", [0.0], changes=["tracking.uri=sqlite:///my.db"])
        monkeypatch.chdir(tmp_path)
        assert tracking_uri(RunFolder.open(run.path)) == f"sqlite:///{tmp_path}/here/my.db"
        assert json.loads((run.path / "run.json").read_bytes())["config"]["tracking"]["uri"].startswith("sqlite:////")

    def test_a_configured_store_that_was_moved_with_the_runs_is_found_beside_them(
        self, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from made_runs import made_run

        home = tmp_path / "home"
        home.mkdir()
        shutil.copy(empty_store, home / "my.db")
        run = made_run(
            home / "run", [0.0], changes=[f"tracking.uri=sqlite:///{home}/my.db", "tracking.trace_every=null"]
        )
        (run.path / "report.png").write_bytes(b"png")
        (run.path / "view.html").write_text("<p>")
        send(run, monkeypatch)
        home.rename(tmp_path / "moved")
        send(RunFolder.open(tmp_path / "moved" / "run"), monkeypatch)
        assert not home.exists()
