"""A dataset folder holds its own files, or it is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rlhf_core.contracts.errors import UserError
from rlhf_core.prompts.foreign import check_dataset_folder

CARD = "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files: {}\n---\n# Prompts\n"


@pytest.mark.parametrize("files", ["data/*.jsonl", "[a.jsonl, b.jsonl]", "[{split: train, path: a.jsonl}]"])
def test_files_of_the_folder_are_taken(tmp_path: Path, files: str) -> None:
    (tmp_path / "README.md").write_text(CARD.format(files))
    check_dataset_folder(tmp_path, "prompts.source 'x'")


@pytest.mark.parametrize(
    "files", ["https://host/a.jsonl", "../a.jsonl", "/etc/*", "[{split: train, path: zip://a::b}]"]
)
@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_files_elsewhere_are_refused(tmp_path: Path, files: str, card: str) -> None:
    text = CARD.format(files)
    (tmp_path / card).write_text(text if card == "README.md" else text.split("---\n")[1])
    with pytest.raises(UserError, match=r"prompts.source 'x' lists in its .* which is not in the folder"):
        check_dataset_folder(tmp_path, "prompts.source 'x'")


@pytest.mark.parametrize("name", ["../a.arrow", "/a.arrow", "..", 3])
def test_a_saved_dataset_names_its_own_files(tmp_path: Path, name: object) -> None:
    (tmp_path / "train").mkdir()
    state = tmp_path / "train" / "state.json"
    state.write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    check_dataset_folder(tmp_path, "prompts.source 'x'")
    state.write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(UserError, match=r"names in its state.json the file"):
        check_dataset_folder(tmp_path, "prompts.source 'x'")


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"holds a.jsonl, which is no file but a pipe"):
        check_dataset_folder(tmp_path, "prompts.source 'x'")
