"""`rlhf runs` and `rlhf clean`, as a person at the terminal and a script see them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import flip
from made_runs import made_run

from flows.cli import Console, main
from flows.commands.options import EXIT_INCOMPLETE, EXIT_MISTAKE
from rlhf_core.contracts.run_folder import RunFolder

Answer = tuple[int, str, str]
DAY = 86_400


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for days, name in enumerate(("new", "x[b]", "old")):
        run = made_run(Path("runs") / name, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0][: 6 - days], is_reported=days == 0)
        for path in run.path.rglob("*"):
            written = 1.7e9 - days * 40 * DAY
            os.utime(path, (written, written))
    return Path("runs")


@pytest.fixture
def rlhf(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    def call(*arguments: str) -> Answer:
        monkeypatch.setattr("flows.commands.keeping.console", Console(width=80))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


def test_runs_of_the_usual_folder(rlhf: Callable[..., Answer], runs: Path) -> None:
    code, out, err = rlhf("runs")
    assert (code, err) == (0, "")
    names = [line.split()[0] for line in out.splitlines() if "/6" in line]
    assert names == ["new", "x[b]", "old"]
    assert "1 finished" in out
    assert "2 stopped" in out


def test_a_damaged_run_is_told_below(rlhf: Callable[..., Answer], runs: Path) -> None:
    flip(runs / "old" / "run.json")
    code, out, _ = rlhf("runs")
    assert code == 0
    assert "\nold: runs/old/run.json is damaged" in out


def test_json_and_nothing_else(rlhf: Callable[..., Answer], runs: Path) -> None:
    _, out, _ = rlhf("runs", "--json")
    assert [run["name"] for run in json.loads(out)["runs"]] == ["new", "x[b]", "old"]
    _, out, _ = rlhf("clean", "--older-than", "1d", "--json")
    told = json.loads(out)
    assert (told["is_done"], len(told["removals"]), told["problems"]) == (False, 3, [])
    assert all(removal["part"] == "run" and removal["bytes"] > 0 for removal in told["removals"])


def test_an_empty_folder_and_none(rlhf: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert rlhf("runs") == (EXIT_MISTAKE, "", "error: runs is not there; name a folder of runs\n")
    (tmp_path / "runs").mkdir()
    assert rlhf("runs")[:2] == (0, "no run in runs; `rlhf train --config FILE` makes one\n")
    assert rlhf("clean", "--keep", "0")[1] == "nothing to remove\n"


def test_nothing_goes_without_yes(rlhf: Callable[..., Answer], runs: Path) -> None:
    before = sorted(runs.rglob("*"))
    code, out, _ = rlhf("clean", "--keep", "1")
    assert code == 0
    assert out.splitlines()[-1] == "nothing was removed: the same with --yes removes this"
    assert "x[b]" in out
    assert sorted(runs.rglob("*")) == before


def test_with_yes_what_was_shown_goes(rlhf: Callable[..., Answer], runs: Path) -> None:
    code, out, _ = rlhf("clean", "--state", "stopped", "--older-than", "1d", "--yes")
    assert (code, out.splitlines()[-1]) == (0, "removed: 2 of 2")
    assert [path.name for path in runs.iterdir()] == ["new"]


def test_what_cannot_go_is_told_and_the_exit_code_says_so(
    rlhf: Callable[..., Answer], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_core.run_list.RunFolder.is_locked", lambda _: False)  # it begins between plan and removal
    with RunFolder.open(runs / "old").locked():
        code, out, _ = rlhf("clean", "--state", "stopped", "--yes")
    assert code == EXIT_INCOMPLETE
    assert "not removed: another process is working on runs/old" in out
    assert "removed: 1 of 2" in out
    assert sorted(path.name for path in runs.iterdir()) == ["new", "old"]


def test_mistakes_are_sentences(rlhf: Callable[..., Answer], runs: Path) -> None:
    code, out, err = rlhf("clean", "--older-than", "3", "--state", "running", "--yes")
    assert (code, out, len(err.splitlines())) == (EXIT_MISTAKE, "", 2)
    code, _, err = rlhf("clean", "--yes")
    assert (code, err.partition(":")[0]) == (EXIT_MISTAKE, "error")
    assert "nothing says which runs" in err
    assert len(list(runs.iterdir())) == 3
