"""A path that is no run: what it is, and which runs a person may have meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.run_folder import RunFolder


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ("runs/reviews", "runs/reviews-2", "alone/first", *(f"many/r{i}" for i in range(7))):
        Path(run).mkdir(parents=True)
        Path(run, "run.json").touch()
    Path("runs/reviews/checkpoints/000010").mkdir(parents=True)
    Path("empty").mkdir()
    Path("other/data").mkdir(parents=True)
    Path("notes.txt").touch()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("runs/reviewz", "there is no such folder; did you mean runs/reviews?"),
        ("alone/zzz", "there is no such folder; beside it: the run alone/first"),
        ("none/zzz", "there is no such folder"),
        ("empty/zzz", "there is no such folder"),
        ("notes.txt", "it is a file"),
        ("runs/reviews/run.json", "it is a file; it is in the run runs/reviews"),
        (
            "runs/reviews/checkpoints/000010",
            "it has no run.json; it is in the run runs/reviews",
        ),
        ("empty", "it has no run.json"),
        ("other", "it has no run.json"),
        ("runs", "it has no run.json; it holds the runs runs/reviews, runs/reviews-2: name one of them"),
        ("alone", "it has no run.json; it holds the run alone/first: name one of them"),
        (
            "many",
            "it has no run.json; it holds the runs many/r0, many/r1, many/r2, many/r3, many/r4 and 2 more: name one",
        ),
    ],
)
def test_what_it_is(path: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        RunFolder.open(Path(path))
    assert str(caught.value).startswith(f"{path} is not a run folder: {said}")
    assert str(caught.value).endswith(said) or "more: name one" in said


def test_a_folder_above_the_folder_of_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it holds the runs .*alone/first, .*many/r0.* and 5 more: name one of them"):
        RunFolder.open(tmp_path)
