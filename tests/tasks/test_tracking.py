"""MLflow on an sqlite store: everything arrives once, also after a stop; training never waits for it."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.run_folder import RunFolder


def tree(tiny: Any, **tracking: Any) -> dict[str, Any]:
    return {
        "num_iterations": 3,
        "device": "cpu",
        "num_threads": 1,
        "prompts": {"source": str(tiny.prompts), "batch_size": 8},
        "policy": {"model": str(tiny.policy), "critic": {"kind": "shared"}},
        "reward": {"components": [{"kind": "model", "model": str(tiny.reward)}]},
        "generation": {"max_new_tokens": 4},
        "ppo": {"num_ppo_epochs": 1, "num_minibatches": 1},
        "checkpoint": {"every": 2},
        "tracking": tracking,
    }


@pytest.fixture(scope="module")
def tracked(tiny: Any, tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> Path:
    """A finished run, logged to ``mlflow.db`` beside it."""
    from flows.ppo import train

    run_dir = tmp_path_factory.mktemp("tracked") / "run-a"
    train(build_config(tree(tiny)), str(run_dir))
    return run_dir


def client_of(run_dir: Path) -> tuple[Any, Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("rlhf-flow")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def test_each_iteration_is_one_step_of_each_metric(tracked: Path) -> None:
    client, run = client_of(tracked)
    names = ("objective/kl", "objective/scores", "kl/beta", "episode", "time/generate_s", "policy/approxkl_avg", "lr")
    for name in names:
        history = client.get_metric_history(run.info.run_id, name)
        assert [metric.step for metric in history] == [0, 1, 2], name
    shaped = RunFolder.open(tracked).manifest("shape_rewards", 1)
    assert shaped is not None
    logged = client.get_metric_history(run.info.run_id, "objective/scores")[1].value
    assert logged == pytest.approx(shaped.metrics["objective/scores"])


def test_params_config_dataset_and_links_are_there(tracked: Path) -> None:
    client, run = client_of(tracked)
    assert run.data.params["kl.coef"] == "0.15"
    assert run.data.params["reward.components.0.kind"] == "model"
    assert run.data.tags["prefect.flow_run_id"]
    assert run.data.tags["rlhf.run_dir"] == str(tracked)
    assert run.info.status == "FINISHED"
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "prompts.jsonl"
    assert {tag.key: tag.value for tag in dataset.tags} == {"mlflow.data.context": "training"}
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert artifacts >= {"config.yaml", "identity.json", "report.png", "samples.json", "view.html"}


def test_the_pages_say_what_it_is_and_what_came_out(tracked: Path) -> None:
    client, run = client_of(tracked)
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("Finished: **3 of 3** iterations")
    assert f"rlhf compare {tracked} OTHER_RUN" in note
    assert (
        run.data.tags["rlhf.model.policy"].partition(" sha256:")[2]
        == (RunFolder.open(tracked).identity["models"]["policy"][:16])
    )
    experiment = client.get_experiment(run.info.experiment_id)
    assert "Runs of **rlhf-flow**" in experiment.tags["mlflow.note.content"]
    (result,) = client.get_metric_history(run.info.run_id, "achieved/score")
    scores = [metric.value for metric in client.get_metric_history(run.info.run_id, "objective/scores")]
    assert (result.step, result.value) == (0, pytest.approx(sum(scores) / 3, rel=1e-3)), "four digits, drawn as a bar"
    assert run.data.metrics["system/process_memory_megabytes"] > 50
    (version, *_) = client.search_model_versions("name = 'rlhf-policy'")
    assert "of 3 iterations: score" in version.description
    assert version.tags["rlhf.model.policy"] == run.data.tags["rlhf.model.policy"]


def test_a_persons_description_stays(tracked: Path, tmp_path: Path) -> None:
    from tasks.tracking import tracker as tracking

    folder = shutil.copytree(tracked.parent, tmp_path / "copy")
    client, run = client_of(folder / "run-a")
    client.set_tag(run.info.run_id, "mlflow.note.content", "mine")
    with tracking.Tracker(RunFolder.open(folder / "run-a"), {}):
        pass
    _, again = client_of(folder / "run-a")
    assert again.data.tags["mlflow.note.content"] == "mine"
    assert len(client.get_metric_history(run.info.run_id, "achieved/score")) == 1, "sent once"


def test_a_checkpoint_from_the_registry_generates_text(tracked: Path, tmp_path: Path) -> None:
    import mlflow
    from transformers import AutoModelForCausalLM, AutoTokenizer

    client, _ = client_of(tracked)
    versions = client.search_model_versions("name = 'rlhf-policy'")
    assert sorted(int(version.tags["rlhf.iteration"]) for version in versions) == [2, 3]
    assert client.get_model_version_by_alias("rlhf-policy", "best").version in {v.version for v in versions}
    mlflow.set_tracking_uri(f"sqlite:///{tracked.parent / 'mlflow.db'}")
    folder = mlflow.artifacts.download_artifacts("models:/rlhf-policy@newest", dst_path=str(tmp_path))
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The film", return_tensors="pt").input_ids
    assert len(tokenizer.decode(model.generate(prompt, max_new_tokens=8)[0])) > len("The film")


def test_a_resumed_run_goes_on_in_the_same_tracker_run_and_sends_nothing_twice(tracked: Path, tmp_path: Path) -> None:
    from flows.ppo import resume

    folder = shutil.copytree(tracked.parent, tmp_path / "copy")
    run_dir = folder / "run-a"
    (run_dir / "iterations/000002/06_update.json").unlink()
    shutil.rmtree(run_dir / "checkpoints/000003")
    resume(str(run_dir))
    client, run = client_of(run_dir)
    for name in ("objective/kl", "episode", "val/ratio"):
        assert [m.step for m in client.get_metric_history(run.info.run_id, name)] == [0, 1, 2], name
    versions = client.search_model_versions("name = 'rlhf-policy'")
    assert sorted(int(version.tags["rlhf.iteration"]) for version in versions) == [2, 3]


def test_a_tracker_that_is_down_never_stops_training_and_gets_the_rest_later(
    tiny: Any, tmp_path: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.ppo import resume, train
    from tasks.tracking import tracker as tracking

    warnings: list[str] = []
    monkeypatch.setattr(tracking.logger, "warning", lambda text, *values: warnings.append(text % values))
    run_dir = tmp_path / "run-b"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    train(build_config(tree(tiny)), str(run_dir))
    assert RunFolder.open(run_dir).num_finished() == 3
    assert any("MLflow did not take" in warning for warning in warnings)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    resume(str(run_dir))
    client, run = client_of(run_dir)
    assert [m.step for m in client.get_metric_history(run.info.run_id, "objective/kl")] == [0, 1, 2]


def test_numbers_that_are_not_finite_are_dropped_and_counted(
    tracked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.tracking import tracker as tracking
    from tasks.tracking.outbox import Ledger

    sent: dict[str, float] = {}

    class Client:
        def log_batch(self, run_id: str, metrics: list[Any]) -> None:
            sent.update({metric.key: metric.value for metric in metrics})

    sender = object.__new__(tracking._Sender)
    run_dir = shutil.copytree(tracked, tmp_path / "run")
    sender.run, sender.client, sender.run_id, sender.next = RunFolder.open(run_dir), Client(), "r", 0
    sender.ledger, no_models = Ledger.of(run_dir), SimpleNamespace(send_new=lambda: None, ids={})
    monkeypatch.setattr(sender, "models", no_models, raising=False)
    monkeypatch.setattr(sender, "traces", SimpleNamespace(send_due=lambda *_: None), raising=False)
    monkeypatch.setattr(
        "tasks.tracking.metrics.iteration_metrics", lambda run, i: {"a": 1.0, "b": float("inf"), "c": float("nan")}
    )
    sender.send_up_to(1)
    assert sent == {"a": 1.0, "guard/dropped_metrics": 2.0}


class TestAnAnswerThatIsLost:
    """A request is carried out, and its client is told otherwise: at each place of the conversation."""

    @pytest.fixture
    def fresh(self, tracked: Path, tmp_path: Path, empty_store: Path) -> Path:
        """A finished run of which no tracker knows anything."""
        run_dir = shutil.copytree(tracked, tmp_path / "run")
        (run_dir / "mlflow.json").unlink()
        shutil.copy(empty_store, tmp_path / "mlflow.db")
        return run_dir

    @staticmethod
    def once_each(run_dir: Path) -> None:
        """Raise AssertionError unless everything is there, once."""
        client, run = client_of(run_dir)
        with sqlite3.connect(run_dir.parent / "mlflow.db") as database:
            counts = database.execute("select key, step, count(*) from metrics group by 1, 2").fetchall()
        assert {count for _, _, count in counts} == {1}
        assert {step for key, step, _ in counts if key == "episode"} == {0, 1, 2}
        assert {step for key, step, _ in counts if key.startswith("achieved/")} == {0}
        assert {step for key, step, _ in counts if key == "checkpoint/value"} == {2, 3}
        versions = client.search_model_versions("name = 'rlhf-policy'")
        assert sorted(int(version.tags["rlhf.iteration"]) for version in versions) == [2, 3]
        models = client.search_logged_models([run.info.experiment_id])
        assert sorted(model.name for model in models) == ["run-000002", "run-000003"]
        there = {model.model_id for model in models}
        assert sorted(o.step for o in run.outputs.model_outputs if o.model_id in there) == [2, 3]
        assert {tag for tag in run.data.tags if tag.startswith("rlhf.model.")}
        assert run.data.tags["mlflow.note.content"].startswith("Finished: ")
        assert len(run.inputs.dataset_inputs) == 1
        assert run.info.status == "FINISHED"
        assert run.data.params["kl.coef"] == "0.15"

    def test_is_asked_for_again_and_nothing_is_there_twice(self, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from mlflow.tracking import MlflowClient

        from tasks.tracking import outbox
        from tasks.tracking import tracker as tracking

        calls = (
            "create_experiment", "create_run", "log_batch", "log_inputs", "create_logged_model",
            "log_model_artifacts", "finalize_logged_model", "log_outputs", "log_metric", "set_tag",
            "set_experiment_tag", "create_registered_model", "create_model_version",
            "set_registered_model_alias", "log_artifact", "set_terminated",
        )  # fmt: skip
        lost: list[str] = []

        def losing(call: str, real: Any) -> Any:
            def lose(*arguments: Any, **named: Any) -> Any:
                answer = real(*arguments, **named)
                if call not in lost:
                    lost.append(call)
                    raise ConnectionError("no answer")
                return answer

            return lose

        for call in calls:
            monkeypatch.setattr(MlflowClient, call, losing(call, getattr(MlflowClient, call)))
        monkeypatch.setattr(outbox, "LAST_TRIES", len(calls))
        with tracking.Tracker(RunFolder.open(fresh), {}):
            pass
        assert set(lost) == set(calls)
        self.once_each(fresh)

    def test_a_batch_that_is_taken_after_the_next_try_is_there_once(
        self, fresh: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mlflow.tracking import MlflowClient

        from tasks.tracking import tracker as tracking

        real, late = MlflowClient.log_batch, []

        def delay(client: Any, run_id: str, **named: Any) -> Any:
            if named.get("metrics") and not late:
                late.append((client, run_id, named))
                raise TimeoutError("no answer")
            return real(client, run_id, **named)

        monkeypatch.setattr(MlflowClient, "log_batch", delay)
        with tracking.Tracker(RunFolder.open(fresh), {}):
            pass
        ((client, run_id, named),) = late
        real(client, run_id, **named)
        self.once_each(fresh)

    def test_what_a_request_creates_after_it_was_given_up_is_removed(
        self, fresh: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mlflow.tracking import MlflowClient

        from tasks.tracking import tracker as tracking

        for name in ("create_run", "create_logged_model", "create_model_version"):
            real = getattr(MlflowClient, name)

            def twice(*arguments: Any, real: Any = real, **named: Any) -> Any:
                real(*arguments, **named)
                return real(*arguments, **named)

            monkeypatch.setattr(MlflowClient, name, twice)
        with tracking.Tracker(RunFolder.open(fresh), {}):
            pass
        self.once_each(fresh)

    def test_a_model_whose_checkpoint_is_gone_before_it_is_registered_is_removed(
        self, fresh: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mlflow.tracking import MlflowClient

        from tasks.tracking import tracker as tracking

        run, real = RunFolder.open(fresh), MlflowClient.create_model_version
        older, _ = run.checkpoints()

        def lose_and_forget(*arguments: Any, **named: Any) -> Any:
            if named["tags"]["rlhf.iteration"] == str(older):
                shutil.rmtree(run.checkpoint_path(older), ignore_errors=True)
                raise ConnectionError("no answer")
            return real(*arguments, **named)

        monkeypatch.setattr(MlflowClient, "create_model_version", lose_and_forget)
        with tracking.Tracker(run, {}):
            pass
        client, found = client_of(fresh)
        assert [model.name for model in client.search_logged_models([found.info.experiment_id])] == ["run-000003"]
        assert [output.step for output in found.outputs.model_outputs] == [3]

    def test_a_sender_that_died_in_between_leaves_what_the_next_needs(
        self, fresh: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tasks.tracking import tracker as tracking
        from tasks.tracking.outbox import Ledger

        run = RunFolder.open(fresh)
        real = tracking.log_metrics

        def die(*arguments: Any) -> None:
            real(*arguments)
            raise SystemExit

        monkeypatch.setattr(tracking, "log_metrics", die)
        with pytest.raises(SystemExit):
            tracking._Sender(run, {}).send_up_to(2)
        assert Ledger.of(fresh).sending is not None
        monkeypatch.setattr(tracking, "log_metrics", real)
        with tracking.Tracker(run, {}):
            pass
        self.once_each(fresh)


def test_a_table_that_is_sent_again_does_not_grow(tracked: Path) -> None:
    import mlflow

    from rlhf_core.inspection import before_and_after
    from tasks.tracking import tracker as tracking

    run = RunFolder.open(tracked)
    with tracking.Tracker(run, {}):
        pass
    mlflow.set_tracking_uri(f"sqlite:///{tracked.parent / 'mlflow.db'}")
    client, found = client_of(tracked)
    table = client.load_table(found.info.experiment_id, "samples.json", [found.info.run_id])
    samples = before_and_after(run)
    assert table["prompt"].tolist() == [row["prompt"] for row in samples]
    assert list(table.columns) == list(samples[0])


def test_what_the_user_has_set_for_mlflow_stays(monkeypatch: pytest.MonkeyPatch, tracked: Path) -> None:
    from tasks.tracking import tracker as tracking

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    tracking.connect(RunFolder.open(tracked))
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"


def test_the_address_of_the_tracker_is_shown_without_the_password(
    tracked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.tracking import tracker as tracking

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@h:5000")
    run = RunFolder.open(tracked)
    assert tracking.tracking_uri(run) == "http://me:secret@h:5000"
    assert tracking.shown_tracking_uri(run) == tracking.Tracker(run, {}).uri == "http://h:5000"


def test_a_run_that_is_extended_goes_on_in_its_tracker_run(tracked: Path, tmp_path: Path) -> None:
    from flows.ppo import resume

    run_dir = shutil.copytree(tracked.parent, tmp_path / "copy") / "run-a"
    before = json.loads((run_dir / "before_after.json").read_text())["samples"]
    resume(str(run_dir), num_iterations=5)
    client, run = client_of(run_dir)
    after = json.loads((run_dir / "before_after.json").read_text())["samples"]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "objective/kl")] == [0, 1, 2, 3, 4]
    assert run.info.status == "FINISHED"
    assert run.data.tags["rlhf.extension.000003"].startswith("num_iterations: 3 -> 5, given on ")
    assert run.data.tags["mlflow.note.content"].startswith("Finished: **5 of 5** iterations")
    first, last = sorted(client.get_metric_history(run.info.run_id, "achieved/score"), key=lambda m: m.timestamp)
    assert run.data.metrics["achieved/score"] == last.value != first.value
    versions = {int(v.tags["rlhf.iteration"]): v.version for v in client.search_model_versions("name = 'rlhf-policy'")}
    assert {3, 4, 5} <= versions.keys()
    assert client.get_model_version_by_alias("rlhf-policy", "newest").version == versions[5]
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "samples.json", str(tmp_path))).read_text())
    column = table["columns"].index("after")
    assert [row[column] for row in table["data"]] == [sample["after"] for sample in after]
    assert after != before


def test_what_an_alias_of_the_registry_names_is_not_cleaned(tracked: Path, tmp_path: Path) -> None:
    from rlhf_core.cleaning import Wanted
    from tasks.lifecycle.cleaning import clean, plan_cleaning

    folder = Path(shutil.copytree(tracked.parent, tmp_path / "copy"))
    client, _ = client_of(folder / "run-a")
    plan = plan_cleaning(folder, Wanted(keep=0))
    ((run, why),) = plan.spared
    assert run.name == "run-a"
    assert "rlhf-policy@newest" in why
    for alias in client.get_registered_model("rlhf-policy").aliases:
        client.delete_registered_model_alias("rlhf-policy", alias)
    assert clean(plan_cleaning(folder, Wanted(keep=0))) == []
    assert not (folder / "run-a").exists()
    assert (folder / "mlflow.db").is_file()
