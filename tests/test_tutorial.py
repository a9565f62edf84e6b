"""The tutorial does what it says: its commands and examples are run in their order, with fewer iterations."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "tutorials" / "your-models.md"
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
SHORTER = {
    "num_iterations=20": "num_iterations=2",
    "--iterations 40": "--iterations 3",
    "--num-prompts 8": "--num-prompts 2 --samples 2",
}


def shorter(text: str) -> str:
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    return text


@pytest.mark.slow
def test_a_person_who_has_only_the_tutorial_gets_there(tmp_path: Path) -> None:
    """From the model on; what is installed is installed."""
    root = str(PAGE.parents[2])
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": root, "BROWSER": "true"}
    said: list[str] = []
    for language, text in ((language, shorter(text)) for language, text in BLOCKS[1:]):
        command = ["bash", "-e", "-c", text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        said.append(done.stdout)
    _built, prompts, checked, trained, looked, answer, further = said
    assert [json.loads(line)["prompt"][0]["role"] for line in prompts.splitlines()] == ["user", "user"]
    assert "no problem found" in checked
    assert "iteration    1" in trained
    assert "sentence" in looked, "what was asked"
    assert len(answer.split()) >= 3, "a sentence of the trained model"
    assert not {"<|im_start|>", "<|im_end|>"} & set(answer.split()), "no special tokens"
    assert "iteration    2" in further
    assert (tmp_path / "runs" / "first" / "view.html").is_file()
    assert list((tmp_path / "runs" / "first" / "evaluations").iterdir())


def test_each_shortened_number_stands_in_the_page() -> None:
    text = "".join(text for _, text in BLOCKS)
    assert [long for long in SHORTER if long not in text] == []


def test_it_begins_with_the_installation_and_ends_with_what_comes_next() -> None:
    assert "pip install" in BLOCKS[0][1]
    assert "rlhf resume" in BLOCKS[-1][1]
    assert any("AutoModelForCausalLM" in text and "generate" in text for _, text in BLOCKS)
