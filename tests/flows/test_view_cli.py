"""`rlhf view` as a person at the terminal sees it: a page and its path, or one sentence and no page."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import finished_run, flip, remove
from tiny_world import Tiny

from flows import cli
from rlhf_core.contracts.run_folder import RunFolder

Answer = tuple[int, str, str]


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tiny, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "run", symlinks=True)
    Path("run/view.html").unlink()
    return Path("run")


@pytest.fixture
def rlhf(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """A command line -> its exit code, what it printed, and its errors."""
    monkeypatch.setattr("flows.commands.looking.console", cli.Console(width=160))

    def call(*arguments: str) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


def test_it_writes_a_page_and_says_where(rlhf: Callable[..., Answer], run_dir: Path) -> None:
    code, out, err = rlhf("view", "run")
    assert (code, err) == (0, "")
    told, path = out.splitlines()
    assert told.startswith("24 responses of iterations 0, 1, 2; ")
    assert path == "run/view.html"
    assert (run_dir / "view.html").read_bytes().startswith(b"<!doctype html>")


def test_its_options(rlhf: Callable[..., Answer], run_dir: Path) -> None:
    code, out, _ = rlhf("view", "run", "--iterations", "1-last", "--limit", "2", "--out", "pages/[red]mine.html")
    assert code == 0
    assert out.splitlines()[0].startswith("4 of 16 responses of iterations 1, 2; ")
    assert out.splitlines()[1] == "pages/[red]mine.html"
    assert Path("pages/[red]mine.html").is_file()
    assert not (run_dir / "view.html").exists()


def test_it_works_while_the_run_is_going(rlhf: Callable[..., Answer], run_dir: Path) -> None:
    remove(run_dir / "before_after.json")
    remove(run_dir / "iterations/000002/06_update.json")
    with RunFolder.open(run_dir).locked():
        code, out, _ = rlhf("view", "run", "--iterations", "all")
    assert code == 0
    assert "iterations 0, 1;" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "nowhere is not a run folder: there is no such folder"),
        (("run", "--iterations", "3"), "--iterations '3' names iteration 3, which is not finished; the newest is 2"),
        (("run", "--iterations", "ten"), "--iterations 'ten' has 'ten', which is no iteration; write numbers"),
        (("run", "--iterations", "2-1"), "--iterations '2-1' has the range 2-1, which runs backwards"),
        (("run", "--out", "run"), "--out run is a folder; name a file, as in run/view.html"),
        (("run", "--out", "folder.html"), "--out folder.html is a folder; name a file, as in folder.html/view.html"),
        (("run", "--out", "run/run.json"), "--out run/run.json does not end in .html; name a page, as in run/run.html"),
        (("run", "--out", "run/run.json/x.html"), "run/run.json is a file, not a folder"),
    ],
)
def test_a_mistake_is_one_sentence(
    rlhf: Callable[..., Answer], run_dir: Path, arguments: tuple[str, ...], said: str
) -> None:
    Path("folder.html").mkdir()
    before = sorted(Path().rglob("*"))
    code, out, err = rlhf("view", *arguments)
    assert (code, out) == (2, "")
    (sentence,) = err.splitlines()
    assert sentence.startswith("error: ")
    assert said in sentence
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("limit", ["0", "-1", "many"])
def test_a_limit_is_a_number_of_responses(rlhf: Callable[..., Answer], run_dir: Path, limit: str) -> None:
    code, _, err = rlhf("view", "run", "--limit", limit)
    assert code == 2
    assert "--limit" in err
    assert not (run_dir / "view.html").exists()


def test_a_run_without_an_iteration_and_a_damaged_one(rlhf: Callable[..., Answer], run_dir: Path) -> None:
    flip(run_dir / "iterations/000001/03_scores.arrow")
    code, _, err = rlhf("view", "run")
    assert code == 2
    assert "03_scores.arrow is damaged" in err
    assert not (run_dir / "view.html").exists()
    remove(run_dir / "iterations")
    assert rlhf("view", "run")[0::2] == (2, "error: run has no finished iteration yet; a page needs one\n")
