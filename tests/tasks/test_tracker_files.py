"""Files that go to a tracker: an upload that nobody refused, and that is not there, is sent again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.tracking.files import NotArrivedError, send_file, send_model, send_table, send_text


@pytest.fixture
def client(tmp_path: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")


@pytest.fixture
def run_id(client: Any, tmp_path: Path) -> str:
    experiment = client.create_experiment("files", artifact_location=(tmp_path / "artifacts").as_uri())
    return str(client.create_run(experiment).info.run_id)


def swallowing(monkeypatch: pytest.MonkeyPatch, call: str, times: int) -> list[str]:
    """The first uploads are answered and lost."""
    from mlflow.tracking import MlflowClient

    real, lost = getattr(MlflowClient, call), list[str]()

    def swallow(*arguments: Any, **named: Any) -> Any:
        if len(lost) < times:
            lost.append(call)
            return None
        return real(*arguments, **named)

    monkeypatch.setattr(MlflowClient, call, swallow)
    return lost


def test_a_swallowed_file_is_sent_again(
    client: Any, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = swallowing(monkeypatch, "log_artifact", 3)
    (tmp_path / "figure.png").write_bytes(b"123")
    send_file(client, run_id, tmp_path / "figure.png", "some/where")
    assert len(lost) == 3
    assert (tmp_path / "artifacts" / run_id / "artifacts/some/where/figure.png").read_bytes() == b"123"


def test_an_older_file_of_another_size_does_not_count(
    client: Any, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_text(client, run_id, "old", "notes.txt")
    swallowing(monkeypatch, "log_artifact", 99)
    send_text(client, run_id, "old", "notes.txt")
    with pytest.raises(NotArrivedError, match=r"notes\.txt: sent 4 times"):
        send_text(client, run_id, "newer", "notes.txt")


def test_a_swallowed_model_is_sent_again_with_its_folders(
    client: Any, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = swallowing(monkeypatch, "log_model_artifacts", 1)
    folder = tmp_path / "policy"
    (folder / "chat").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "chat" / "template.jinja").write_text("hello")
    experiment = client.get_run(run_id).info.experiment_id
    model = client.create_logged_model(experiment, name="policy", source_run_id=run_id)
    send_model(client, model.model_id, folder)
    assert lost
    there = {path.name: path.read_text() for path in (tmp_path / "artifacts").rglob("*") if path.is_file()}
    assert there["config.json"] == "{}"
    assert there["template.jinja"] == "hello"


def test_a_table_is_listed_once_and_replaced(client: Any, run_id: str, tmp_path: Path) -> None:
    for score in (1.0, 2.0):
        send_table(client, run_id, [{"prompt": "a", "score": score}], "tables/samples.json")
    file = tmp_path / "artifacts" / run_id / "artifacts/tables/samples.json"
    assert json.loads(file.read_text()) == {"columns": ["prompt", "score"], "data": [["a", 2.0]]}
    listed = json.loads(client.get_run(run_id).data.tags["mlflow.loggedArtifacts"])
    assert listed == [{"path": "tables/samples.json", "type": "table"}]
