"""What the tracker's pages say in words, and that a person's own words stay."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_runs import made_run

from rlhf_core.contracts.config import PromptsConfig
from rlhf_core.contracts.records import write_record
from tasks.tracking.notes import (
    EXPERIMENT_NOTE,
    NOTE,
    created_tags,
    introduce_experiment,
    leave_note,
    prompts_dataset,
    run_note,
    version_note,
)
from tasks.tracking.view import VIEW_TAG

UP = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


class Client:
    """Tags of one run and one experiment; a call may be lost."""

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}
        self.fails = ""

    def get_run(self, run_id: str) -> Any:
        return SimpleNamespace(data=SimpleNamespace(tags=dict(self.tags)))

    def get_experiment(self, experiment_id: str) -> Any:
        return SimpleNamespace(tags=dict(self.tags))

    def set_tag(self, run_id: str, name: str, text: str) -> None:
        if name == self.fails:
            raise ConnectionError("no answer")
        self.tags[name] = text

    set_experiment_tag = set_tag


def test_the_note_says_what_what_came_out_and_what_to_do(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", UP, [0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    note = run_note(run, {"flow_run_url": "http://me:secret@h:4200/runs/flow-run/1"})
    headline = "Finished: **6 of 6** iterations of 8 responses: score 1.00 → **4.00** at **2.00** nats of KL."
    assert note.splitlines()[0] == headline
    assert "Policy `a-policy`, rewarded by `reward0`, against the reference `a-policy`; prompts of `p.jsonl`" in note
    assert "held at 2 nats by `log_pi`" in note
    assert "| score | 1.000 | 4.000 | +3.000 |" in note, "means of three iterations"
    assert f"rlhf resume {run.path}" in note
    assert note.endswith("[Prefect flow run](http://h:4200/runs/flow-run/1)")


def test_a_run_that_goes_on_or_was_stopped_is_not_called_finished(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", [], is_reported=False)
    assert run_note(run, {}).startswith("Begun; when this was written it had finished **0 of 6** iterations")
    write_record(run.path / "guards.json", {"tripped": {}, "accepted": {}, "stopped": "kl_ceiling: `9`\n| too high"})
    assert run_note(run, {}).startswith("Stopped by a guard (`kl_ceiling: '9' | too high`) after **0 of 6**")


def test_a_version_says_how_good_it_was(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", UP)
    assert version_note(run, 2) == (
        "run after 2 of 6 iterations: score 0.500 at 0.25 nats (means of its last 2 iterations)."
    )


def test_tags_name_the_models_with_their_digests(tmp_path: Path) -> None:
    tags = created_tags(
        made_run(tmp_path / "run", [], identity={"models": {"policy": "a-policy", "reward0": "d" * 64}})
    )
    assert tags["rlhf.model.policy"] == "a-policy", "a hub id is its own digest"
    assert tags["rlhf.model.reward0"] == f"a-reward sha256:{'d' * 16}"
    assert tags["rlhf.run_dir"] == str(tmp_path / "run")


class TestLeaving:
    def test_our_note_is_replaced_by_a_newer_one(self) -> None:
        client = Client()
        for note in ("first", "second", "second", "third"):
            leave_note(client, "r", note)
            assert client.tags[NOTE] == note

    def test_what_a_person_has_written_stays(self) -> None:
        client = Client()
        leave_note(client, "r", "ours")
        client.tags[NOTE] = "ours, and a remark"
        leave_note(client, "r", "ours, newer")
        assert client.tags[NOTE] == "ours, and a remark"

    def test_a_note_that_did_not_arrive_does_not_make_the_old_one_a_persons(self) -> None:
        client = Client()
        leave_note(client, "r", "first")
        client.fails = NOTE
        with pytest.raises(ConnectionError):
            leave_note(client, "r", "second")
        client.fails = ""
        leave_note(client, "r", "third")
        assert client.tags[NOTE] == "third"

    def test_an_experiment_is_introduced_once(self) -> None:
        client = Client()
        introduce_experiment(client, "1")
        assert client.tags[NOTE] == EXPERIMENT_NOTE.replace("EXPERIMENT_ID", "1")
        assert "metrics.`achieved/score`" in json.loads(client.tags[VIEW_TAG])["selectedColumns"]
        assert len(client.tags[VIEW_TAG]) < 5000, "MLflow takes no more"
        client.tags[NOTE] = "mine"
        introduce_experiment(client, "1")
        assert client.tags[NOTE] == "mine"


def test_where_prompts_come_from(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.touch()
    local = prompts_dataset(PromptsConfig(source=str(file), columns=["answer"]), "a" * 64)
    assert (local["name"], local["digest"], local["source_type"]) == ("p.jsonl", "a" * 16, "local")
    assert json.loads(local["source"]) == {"uri": str(file)}
    assert [column["name"] for column in json.loads(local["schema"])["mlflow_colspec"]] == ["prompt", "answer"]
    hub = prompts_dataset(PromptsConfig(source="some/where", subset="c"), "a" * 64)
    assert json.loads(hub["source"]) == {"path": "some/where", "config_name": "c", "split": "train"}
    assert hub["source_type"] == "hugging_face"
