"""MLflow on an sqlite store: everything arrives once, also after a stop; training never waits for it."""

from __future__ import annotations

import shutil
from pathlib import Path
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
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert artifacts >= {"config.yaml", "identity.json", "report.png", "samples.json"}


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
    from tasks import tracking

    warnings: list[str] = []
    monkeypatch.setattr(tracking.logger, "warning", lambda text, *values: warnings.append(text % values))
    run_dir = tmp_path / "run-b"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    train(build_config(tree(tiny)), str(run_dir))
    assert RunFolder.open(run_dir).num_finished() == 3
    assert any("MLflow did not take iteration" in warning for warning in warnings)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    resume(str(run_dir))
    client, run = client_of(run_dir)
    assert [m.step for m in client.get_metric_history(run.info.run_id, "objective/kl")] == [0, 1, 2]


def test_numbers_that_are_not_finite_are_dropped_and_counted(tracked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks import tracking

    sent: dict[str, float] = {}

    class Client:
        def log_batch(self, run_id: str, metrics: list[Any]) -> None:
            sent.update({metric.key: metric.value for metric in metrics})

    sender = object.__new__(tracking._Sender)
    sender.run, sender.client, sender.run_id, sender.next = RunFolder.open(tracked), Client(), "r", 0
    sender.models = dict.fromkeys(sender.run.checkpoints(), "1")
    monkeypatch.setattr(tracking, "iteration_metrics", lambda run, i: {"a": 1.0, "b": float("inf"), "c": float("nan")})
    sender.send_up_to(1)
    assert sent == {"a": 1.0, "guard/dropped_metrics": 2.0}
