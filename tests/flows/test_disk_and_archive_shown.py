"""What the command line shows of the archive and of disk use."""

from __future__ import annotations

import io
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from old_iterations import commit_iteration

from flows.cli import main
from flows.console import Console
from flows.displays.plan import show_plan
from rlhf_core.contracts.compaction import remove_archived, write_segment
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.identity import identity_digest
from rlhf_core.preflight import preflight

IDENTITY = {"num_threads": 1}
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def archived(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> Path:
    """A run of two iterations, the first of them in the archive."""
    run = RunFolder.create(tmp_path / "run", tiny_config(), IDENTITY)
    for iteration in range(2):
        commit_iteration(run.path, iteration, identity=identity_digest(IDENTITY))
    write_segment(run.path, 0, 0)
    remove_archived(run.path, 0)
    return run.path


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exited:
        main(list(arguments))
    assert exited.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_inspect_shows_an_archived_iteration(archived: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "inspect", str(archived), "--iteration", "0")
    assert "archive/0" in text, "shortened in the middle"
    assert "objective/scores" in text


def test_inspect_shows_the_rows_of_an_archived_stage(archived: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "inspect", str(archived), "--iteration", "0", "--stage", "generate")
    assert "generate, iteration 0" in text
    assert "i000000-p000002-s0" in text


@pytest.mark.parametrize(("free", "words"), [(10**12, "no problem found"), (10**5, "warning: the run may take")])
def test_check_compares_the_disk_use_with_the_free_space(
    free: int, words: str, tiny_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage(2 * free, free, free))
    config = tiny_config(["num_iterations=40", "artifacts.keep_iterations=4"])
    console = Console(width=200, file=io.StringIO(), record=True)
    show_plan(console, config, preflight(config), tmp_path / "run")
    text = console.export_text()
    assert words in text
    assert ("artifacts.keep_iterations" in text) == (free == 10**5)
    assert "8 iterations x 0.0" in text
    assert "32 in the archive x 0.0" in text
