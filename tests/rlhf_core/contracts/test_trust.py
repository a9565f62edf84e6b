"""What a config starts, imports and contacts; and that a record's values wait until a person has named them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from strangers import nothing_is_accepted

from rlhf_core.contracts.accepted import VARIABLE, accepted_keys
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.run_places import run_around
from rlhf_core.contracts.trust import (
    accept_config,
    accept_overrides,
    accept_values,
    check_door,
    check_place,
    check_recorded,
    program,
    recorded,
    refused,
    uses,
)

EVERYTHING: dict[str, Any] = {
    "generation": {"engine": "vllm", "vllm": {"python": "/opt/vllm/bin/python"}},
    "reward": {
        "components": [
            {"kind": "function", "function": "team.rewards:score", "folder": "/code", "params": {"weight": 2}},
            {"kind": "function", "function": "length"},
            {"kind": "http", "url": "http://h:8000/score", "token_env": "REWARD_TOKEN"},
            {"kind": "model", "model": "a"},
        ],
        "allowed_hosts": ["h:8000"],
    },
    "tracking": {"uri": "http://tracker:5000", "artifact_location": "s3://bucket/prefix"},
    "execution": {
        "engine": "ray", "num_shards": 2, "ray": {"address": "head:6379"},
        "update": {"launcher": "torchrun", "nnodes": 2, "endpoint": "node0:29500"},
    },
}  # fmt: skip
VALUES = [
    "/opt/vllm/bin/python", "/code/team.rewards:score", "http://h:8000/score", "http://tracker:5000",
    "s3://bucket/prefix", "head:6379", "node0:29500",
]  # fmt: skip
RUN = Path("/somebody/run")


@pytest.fixture(autouse=True)
def nobody_has_said_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_is_accepted(monkeypatch, tmp_path / "state")


def everything(*changes: str) -> RunConfig:
    return build_config(EVERYTHING, changes)


def test_everything_that_a_config_starts_imports_and_contacts_is_refused_at_once() -> None:
    assert [use.value for use in uses(everything())] == VALUES
    with pytest.raises(UserError) as told:
        check_recorded(everything(), RUN)
    for value, sentence in zip(VALUES, told.value.problems, strict=True):
        assert repr(value) in sentence
        assert f"{RUN} names it, and you have not; if you trust it, add --trust {value}" in sentence
    assert "the token in $REWARD_TOKEN" in str(told.value)
    assert '{"weight": 2}' in str(told.value)


def test_what_is_switched_off_or_of_this_machine_is_nothing() -> None:
    assert uses(RunConfig()) == []
    off = ["tracking.enabled=false", "generation.engine=own", "execution.engine=local", "reward={components: []}"]
    assert uses(everything(*off, "execution.update={}")) == []
    assert uses(build_config({"execution": {"engine": "ray", "num_shards": 2, "ray": {"address": "auto"}}})) == []


def test_a_person_names_values_one_by_one() -> None:
    for taken, value in enumerate(VALUES):
        assert len(refused(everything(), RUN)) == len(VALUES) - taken
        accept_values([value], everything(), RUN)
    check_recorded(everything(), RUN)
    with pytest.raises(UserError, match=r"--trust '/bin/sh' is nothing that /somebody/run names; it names /opt/vllm"):
        accept_values(["/bin/sh"], everything(), RUN)


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("generation.vllm.python=/opt/other/python", "/opt/other/python"),
        ("reward.components.0.params={path: /etc/passwd}", "/code/team.rewards:score"),
        ("reward.components.0.function=team.rewards:other", "/code/team.rewards:other"),
        ("reward.components.0.folder=/elsewhere", "/elsewhere/team.rewards:score"),
        ("reward.components.2.token_env=AWS_SECRET_ACCESS_KEY", "http://h:8000/score"),
        ("tracking.uri=http://elsewhere:5000", "http://elsewhere:5000"),
        ("tracking.artifact_location=s3://elsewhere", "s3://elsewhere"),
        ("execution.ray.address=elsewhere:6379", "elsewhere:6379"),
        ("execution.update.endpoint=elsewhere:29500", "elsewhere:29500"),
    ],
)
def test_another_value_is_another_thing(change: str, value: str) -> None:
    accept_config(everything())
    assert refused(everything(), RUN) == []
    assert [use.value for use in refused(everything(change), RUN)] == [value]


def test_later_commands_of_this_user_and_processes_that_are_started_know(monkeypatch: pytest.MonkeyPatch) -> None:
    accept_config(everything())
    inherited = os.environ[VARIABLE]
    monkeypatch.delenv(VARIABLE)
    assert refused(everything(), RUN) == [], "of the file"
    monkeypatch.setenv("XDG_STATE_HOME", "/nowhere")
    assert len(refused(everything(), RUN)) == len(VALUES)
    monkeypatch.setenv(VARIABLE, inherited)
    assert refused(everything(), RUN) == []
    monkeypatch.setenv(VARIABLE, json.dumps(VALUES))
    assert refused(everything(), RUN) == [], "as an operator writes it"
    for damaged in ("", "{", "3", '["a", 3, null]', '"http"'):
        monkeypatch.setenv(VARIABLE, damaged)
        assert len(refused(everything(), RUN)) == len(VALUES)


@pytest.mark.parametrize("mode", [0o622, 0o606])
def test_a_file_that_others_can_write_to_does_not_count(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept_config(everything())
    monkeypatch.delenv(VARIABLE)
    file = tmp_path / "state" / "rlhf-flow" / "accepted.jsonl"
    assert file.stat().st_mode & 0o777 == 0o600
    assert accepted_keys()
    file.chmod(mode)
    assert accepted_keys() == set()


def test_the_environment_names_a_tracker_and_a_cluster_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert {"http://tracker:5000", "head:6379"}.isdisjoint(use.value for use in refused(everything(), RUN))


@pytest.mark.parametrize(
    ("typed", "accepted"),
    [
        (["generation.vllm.python=/opt/vllm/bin/python"], {"/opt/vllm/bin/python"}),
        (["generation.engine=vllm"], set[str]()),
        (["generation.temperature=0.5", "reward.components.0.weight=2"], set[str]()),
        (["reward.components.0.function=team.rewards:score"], set[str]()),  # in the stranger's folder
        (["reward.components.0={…}"], {"/code/team.rewards:score"}),
        (["reward.components.2.url=http://h:8000/score"], set[str]()),  # with the stranger's choice of a token
        (["tracking.uri=http://tracker:5000", "tracking.enabled=true"], {"http://tracker:5000"}),
    ],
)
def test_an_override_accepts_what_it_names_itself(typed: list[str], accepted: set[str]) -> None:
    accept_overrides(typed, everything())
    assert {use.value for use in uses(everything())} - {use.value for use in refused(everything(), RUN)} == accepted


def test_doors_are_closed_for_what_a_record_names_alone() -> None:
    (named, *_) = uses(everything())
    check_door(named)  # a person's own config
    recorded(everything(), RUN)
    with pytest.raises(UserError, match="would be started: /somebody/run names it"):
        check_door(named)
    check_door(program("/opt/mine/python"))
    accept_values(["/opt/vllm/bin/python"], everything(), RUN)
    check_door(named)


class TestRunFolders:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        (tmp_path / "run" / "iterations").mkdir(parents=True)
        (tmp_path / "run" / "run.json").write_text("{}")
        (tmp_path / "run" / "bin").mkdir()
        (tmp_path / "run" / "bin" / "python").write_text("")
        return tmp_path / "run"

    def test_a_file_in_it_is_found_by_any_of_its_names(self, run: Path, tmp_path: Path) -> None:
        inside = run / "bin" / "python"
        (tmp_path / "link").symlink_to(inside)
        (tmp_path / "to the link").symlink_to("link")
        (tmp_path / "folder").symlink_to(run / "bin")
        (run / "bin" / "out").symlink_to("/usr/bin/env")
        (tmp_path / "a" / "loop").parent.mkdir()
        (tmp_path / "a" / "loop").symlink_to("loop")
        for name in (inside, tmp_path / "link", tmp_path / "to the link", tmp_path / "folder" / "python", run):
            assert run_around(name) == run, name
        assert run_around(run / "bin" / "out") == run, "its environment is there, though the file is not"
        assert run_around(run / "absent" / "file") == run
        for name in (tmp_path / "bin", tmp_path, Path("/usr/bin/env"), tmp_path / "a" / "loop"):
            assert run_around(name) is None, name

    def test_a_folder_with_a_file_of_that_name_alone_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "run.json").write_text("{}")
        assert run_around(tmp_path / "python") is None
        assert run_around(tmp_path / "python", tmp_path) == tmp_path, "but it is where a run of it is asked for"

    def test_its_code_is_refused_whoever_has_named_it(self, run: Path) -> None:
        config = build_config(EVERYTHING, [f"generation.vllm.python={run}/bin/python"])
        accept_config(config)
        with pytest.raises(UserError, match="inside the run folder, which holds data and no code"):
            check_recorded(config, run, ["program"])
        with pytest.raises(UserError, match="inside the run folder"):
            check_place(run / "bin" / "python", "generation.vllm.python")
        recorded(config, run)
        with pytest.raises(UserError, match="inside the run folder"):
            check_door(program(f"{run}/bin/python"))

    def test_a_relative_interpreter_is_one_of_the_working_folder(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(run)
        config = build_config(EVERYTHING, ["generation.vllm.python=bin/python"])
        assert config.generation.vllm.interpreter == f"{run}/bin/python"


def test_a_function_without_a_folder_is_that_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_config({"reward": {"components": [{"kind": "function", "function": "mine:score"}]}})
    accept_config(config)
    assert refused(config, RUN) == []
    (tmp_path / "mine.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert [use.value for use in refused(config, RUN)] == [f"{tmp_path}/mine:score"], "another file would be imported"
