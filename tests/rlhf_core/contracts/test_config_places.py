"""Relative paths of a config: its own folder, then the working folder; what is found is absolute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.contracts.config_io import build_config, config_digest, flat_params, load_config
from rlhf_core.contracts.config_places import naming_places
from rlhf_core.contracts.errors import UserError

TREE: dict[str, Any] = {
    "prompts": {"source": "prompts.csv"},
    "policy": {"model": "models/sft", "adapter": "adapter"},
    "reference": {"model": "./models/sft", "adapter": "adapter"},
    "reward": {
        "components": [
            {"model": "models/reward", "tokenizer": "models/sft", "chat_template": "template.jinja"},
            {"kind": "function", "function": "mine:score", "params": {"model": "models/sft"}},
        ]
    },
}
MADE = ("prompts.csv", "template.jinja", "mine.py", "models/sft/x", "models/reward/x", "adapter/x", "team/__init__.py",
        "team/polite.py", "lib/inner.py", "org/name/x")  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two folders: ``exp`` of the config, ``work`` in which it is read."""
    for folder in ("exp", "work"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def read(place: Path, tree: dict[str, Any], *overrides: str) -> dict[str, Any]:
    path = place / "exp" / "config.yaml"
    path.write_text(json.dumps(tree))
    return flat_params(load_config(Path("../exp/config.yaml"), overrides))


@pytest.mark.parametrize("folders", [["exp"], ["work"], ["exp", "work"]])
def test_every_place_is_found_in_either_folder(place: Path, folders: list[str]) -> None:
    for folder in folders:
        make(place / folder, *MADE)
    found, where = read(place, TREE), place / folders[0]
    assert found["prompts.source"] == str(where / "prompts.csv")
    assert found["policy.model"] == found["reference.model"] == str(where / "models/sft")
    assert found["policy.adapter"] == found["reference.adapter"] == str(where / "adapter")
    assert found["reward.components.0.model"] == str(where / "models/reward")
    assert found["reward.components.0.tokenizer"] == str(where / "models/sft")
    assert found["reward.components.0.chat_template"] == str(where / "template.jinja")
    assert found["reward.components.1.function"] == "mine:score"
    assert found["reward.components.1.folder"] == str(where)
    assert found["reward.components.1.params.model"] == "models/sft"


def test_what_is_nowhere_stays_as_it_is(place: Path) -> None:
    found = read(place, TREE)
    assert found["policy.model"] == "models/sft", "it may be the id of a model of the hub"
    assert found["reference.model"] == "./models/sft"
    assert found["reward.components.1.folder"] is None


@pytest.mark.parametrize(
    ("field", "value", "becomes"),
    [
        ("policy.model", "org/name", "EXP/org/name"),  # a folder of that name is there: it is meant
        ("policy.model", "org/other", "org/other"),
        ("policy.model", "prompts.csv", "prompts.csv"),  # a file is no model
        ("policy.model", "/models/sft", "/models/sft"),
        ("policy.model", "", ""),
        ("prompts.source", "../exp/prompts.csv", "EXP/prompts.csv"),
        ("prompts.source", "s3://bucket/x", "s3://bucket/x"),
        ("prompts.source", "~/prompts.csv", "~/prompts.csv"),
        ("prompts.source", "models", "EXP/models"),
        ("prompts.column", "models", "models"),
        ("policy.pad_token", "adapter", "adapter"),
        ("reward.components.0.chat_template", "{{ messages }}", "{{ messages }}"),
        ("reward.components.0.chat_template", "models", "models"),
    ],
)
def test_what_a_relative_path_is(place: Path, field: str, value: str, becomes: str) -> None:
    make(place / "exp", *MADE)
    tree: Any = json.loads(json.dumps(TREE))
    *path, last = field.split(".")
    node = tree
    for part in path:
        node = node[int(part)] if part.isdecimal() else node[part]
    node[last] = value
    assert read(place, tree)[field] == becomes.replace("EXP", str(place / "exp"))


@pytest.mark.parametrize(
    ("function", "becomes", "folder"),
    [
        ("mine:score", "mine:score", "exp"),
        ("team:score", "team:score", "exp"),
        ("team.polite:score", "team.polite:score", "exp"),
        ("team.none:score", "team.none:score", None),
        ("lib.inner:score", "lib.inner:score", "exp"),
        ("none:score", "none:score", None),
        ("length", "length", None),
        ("mine.py:score", "mine:score", "exp"),
        ("./mine.py:score", "mine:score", "exp"),
        ("../exp/mine.py:score", "mine:score", "exp"),
        ("lib/inner.py:score", "inner:score", "exp/lib"),
        ("team/polite.py:score", "team.polite:score", "exp"),
        ("team/__init__.py:score", "team:score", "exp"),
        ("none.py:score", "none.py:score", None),
        ("mine.py", "mine.py", None),
    ],
)
def test_a_function_by_its_module_or_its_file(place: Path, function: str, becomes: str, folder: str | None) -> None:
    make(place / "exp", *MADE)
    found = read(place, {"reward": {"components": [{"kind": "function", "function": function}]}})
    assert found["reward.components.0.function"] == becomes
    assert found["reward.components.0.folder"] == (None if folder is None else str(place / folder))


def test_a_path_of_an_override_is_of_the_working_folder_first(place: Path) -> None:
    make(place / "exp", "a.csv", "b.csv")
    make(place / "work", "a.csv")
    assert read(place, {"prompts": {"source": "a.csv"}})["prompts.source"] == str(place / "exp/a.csv")
    assert read(place, {}, "prompts.source=a.csv")["prompts.source"] == str(place / "work/a.csv")
    assert read(place, {}, "prompts.source=b.csv")["prompts.source"] == str(place / "exp/b.csv")


def test_the_folder_of_a_function_is_no_part_of_the_identity(place: Path) -> None:
    tree = {"reward": {"components": [{"kind": "function", "function": "mine:score"}]}}
    one = build_config(tree, ["reward.components.0.folder=/a"])
    assert config_digest(one) == config_digest(build_config(tree))
    with pytest.raises(UserError, match=r"^reward\.components\.0\.folder: the folder 'a' is no absolute path"):
        build_config(tree, ["reward.components.0.folder=a"])
    make(place / "exp", "lib/inner.py")
    assert read(place, tree, "reward.components.0.folder=lib")["reward.components.0.folder"] == str(place / "exp/lib")


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (
            "prompts.source 'none.csv' does not exist",
            "; looked for in EXP (the config's folder) and in WORK (the working",
        ),
        (
            "policy.model 'models/sft' is neither …",
            "; looked for in EXP (the config's folder) and in WORK (the working",
        ),
        ("policy.model '/none' is not a folder here", ""),
        ("policy.model 'here' has no weights", ""),
        ("prompts.column 'none' is not in prompts.source 'x.csv'", ""),
        ("policy.model is not set", ""),
    ],
)
def test_a_message_says_where_was_looked(place: Path, problem: str, said: str) -> None:
    make(place / "exp", "here/x")
    with pytest.raises(UserError) as caught, naming_places(place / "exp" / "config.yaml"):
        raise UserError(problem)
    (sentence,) = caught.value.problems
    wanted = said.replace("EXP", str(place / "exp")).replace("WORK", str(place / "work"))
    assert sentence.startswith(problem + wanted)
    assert (sentence == problem) == (not said)


def test_a_module_that_is_nowhere(place: Path) -> None:
    with pytest.raises(UserError) as caught, naming_places(place / "exp" / "config.yaml"):
        raise UserError("f 'no:f': there is no module no, neither installed nor in the working folder")
    assert str(caught.value) == (
        f"f 'no:f': there is no module no, neither installed nor in {place / 'exp'} (the config's folder) nor in "
        f"{place / 'work'} (the working folder)"
    )
