"""The README's Python examples do what they say: each block is run, on a small run."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from damage import finished_run
from tiny_world import Tiny

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
ELSEWHERE = "mlflow.set_tracking_uri"
"""Marks the block that needs a registered policy: tests/tasks/test_tracking.py loads one from the registry."""


@pytest.fixture(scope="module")
def run_dir(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tiny, tmp_path_factory.mktemp("readme") / "run")


@pytest.mark.parametrize("block", [block for block in BLOCKS if ELSEWHERE not in block])
def test_an_example_runs(block: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").symlink_to(run_dir)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that the examples show
        exec(compile(block, str(README), "exec"), names)


def test_there_are_examples_to_run() -> None:
    assert len(BLOCKS) >= 4
    assert sum(ELSEWHERE in block for block in BLOCKS) == 1
