"""`rlhf verify`, and what `rlhf resume` says of damage, as a person at the terminal sees it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import finished_run, flip, remove
from tiny_world import Tiny
from torture.runs import fingerprint

from flows import cli
from flows.calling import without_prefect
from rlhf_core.contracts.records import write_record
from rlhf_core.contracts.run_folder import RunFolder
from tasks.session.session import open_session

SCORES = "iterations/000001/03_scores.arrow"
Answer = tuple[int, str, str]


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tiny, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    open_session.cache_clear()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "run", symlinks=True)
    return Path("run")


@pytest.fixture
def rlhf(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """A command line without a server -> its exit code, what it printed, and its errors."""
    for room in ("cli", "commands.looking", "commands.training"):
        monkeypatch.setattr(f"flows.{room}.console", cli.Console(width=160))

    def watch_run(run_dir: Path, *_: Any) -> None:
        from flows.ppo import iterate

        iterate(str(run_dir))

    monkeypatch.setattr("flows.commands.training.watch_run", watch_run)

    def call(*arguments: str) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended, without_prefect():
            cli.main(arguments)
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


def test_a_whole_run(rlhf: Callable[..., Answer], run_dir: Path) -> None:
    code, out, err = rlhf("verify", "run")
    assert (code, err) == (0, "")
    first, last = out.splitlines()
    assert first.startswith("run: 3 of 3 iterations finished, 2 checkpoints; read ")
    assert last == "whole"


def test_damage_is_a_table_and_a_last_line(rlhf: Callable[..., Answer], run_dir: Path) -> None:
    flip(run_dir / SCORES)
    remove(run_dir / "checkpoints/000002/state.json")
    code, out, _ = rlhf("verify", "run")
    assert code == 2
    assert out.splitlines()[-1] == "2 damaged, 2 recoverable by  rlhf resume run --repair"
    assert "iterations/000001/03_scores.arrow" in out
    assert "damaged" in out
    assert "missing" in out
    assert "`rlhf resume run --repair` rebuilds the" in out


def test_json_and_nothing_else(rlhf: Callable[..., Answer], run_dir: Path) -> None:
    flip(run_dir / SCORES)
    code, out, _ = rlhf("verify", "run", "--json")
    told = json.loads(out)
    assert code == 2
    assert [finding["path"] for finding in told["findings"]] == [SCORES]
    flip(run_dir / SCORES)
    assert rlhf("verify", "run", "--json")[0] == 0


def test_brackets_in_a_name_are_printed_as_they_are(rlhf: Callable[..., Answer], run_dir: Path) -> None:
    (run_dir / "[red]x[bold]").touch()
    code, out, _ = rlhf("verify", "run")
    assert code == 0
    assert "[red]x[bold]" in out


def test_resume_refuses_then_repairs_and_goes_on(rlhf: Callable[..., Answer], run_dir: Path, finished: Path) -> None:
    flip(run_dir / SCORES)
    remove(run_dir / "before_after.json")
    code, _, err = rlhf("resume", "run")
    assert code == 2
    first, finding, last = err.splitlines()
    assert first == "error: run is damaged, and was not resumed:"
    assert finding.startswith(f"  {SCORES} (damaged): sha256 ")
    assert last == "error: 2 damaged, 1 recoverable by  rlhf resume run --repair, 1 recoverable by  rlhf resume run"
    code, out, err = rlhf("resume", "run", "--repair")
    assert (code, out.splitlines()[0]) == (0, "iterations/000001: computed again: 03_scores.arrow")
    assert fingerprint(run_dir) == fingerprint(finished)


def test_repair_of_a_whole_run_says_so(rlhf: Callable[..., Answer], run_dir: Path) -> None:
    code, out, _ = rlhf("resume", "run", "--repair")
    assert (code, out.splitlines()[0]) == (0, "nothing to repair")


def test_inspect_says_whether_anybody_works_on_it(rlhf: Callable[..., Answer], run_dir: Path) -> None:
    def last() -> str:
        return rlhf("inspect", "run")[1].splitlines()[-1]

    assert last() == "finished"
    with RunFolder.open(run_dir).locked():
        assert last() == "a process is working on it, in iteration 3 of 3"
    remove(run_dir / "before_after.json")
    assert last() == "stopped before its report: nobody works on it; finish it with  rlhf resume run"
    remove(run_dir / "iterations/000002")
    assert last() == "stopped in iteration 2 of 3: nobody works on it; continue with  rlhf resume run"
    write_record(run_dir / "guards.json", {"tripped": {}, "accepted": {}, "stopped": "kl_ceiling: too high"})
    assert last() == "stopped by a guard after 2 iterations: kl_ceiling: too high"
