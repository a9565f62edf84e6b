"""The examples run, and their assertions can fail."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
ONE = EXAMPLES / "one_iteration.py"


def module(text: str, name: str, folder: Path) -> ModuleType:
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_it_is_short() -> None:
    assert len(ONE.read_text(encoding="utf-8").splitlines()) <= 120


def test_one_iteration_runs_from_an_empty_folder(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, ONE, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    score, gain, before, after = map(float, re.findall(r"\d\.\d+", done.stdout))
    assert 0 < score < 4
    assert gain > 0
    assert after < before


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("scores.score_B - state.kl_coef * experience.kl_B", "scores.score_B + 0.01"),
        ("config.shaping.gae_lambda**t", "0.5**t"),
        ("(1 - 0.2 * 64 / config.kl.horizon)", "(1 + 0.2 * 64 / config.kl.horizon)"),
        ("gain > 0", "gain < 0"),
    ],
)
def test_another_formula_fails(right: str, wrong: str, tmp_path: Path) -> None:
    text = ONE.read_text(encoding="utf-8")
    assert text.count(right) == 1
    changed = module(text.replace(right, wrong), "changed", tmp_path)
    with torch.random.fork_rng(), pytest.raises(AssertionError):
        changed.one_iteration(changed.tiny_model(tmp_path))
