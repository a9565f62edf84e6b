"""`rlhf compare`, as a person at the terminal sees it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from made_runs import made_evaluation, made_run

from flows import cli

Answer = tuple[int, str, str]
UP = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made_run(Path("low"), UP)
    high = made_run(Path("high[red]$x^2"), [2 * score for score in UP], changes=["kl.target=8", "seed=1"])
    made_evaluation(high, "held-out", score=1.9, kl=2.0)


@pytest.fixture
def rlhf(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    def call(*arguments: str, width: int = 120) -> Answer:
        monkeypatch.setattr("flows.commands.looking.console", cli.Console(width=width))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


def test_tables_and_curves(rlhf: Callable[..., Answer], runs: None) -> None:
    code, out, err = rlhf("compare", "low", "high[red]$x^2", "--last", "2")
    assert (code, err) == (0, "")
    assert re.search(r"kl\.target +2\.0 +8\.0", out)
    assert re.search(r"score +4\.500 ± 0\.707 +9\.000 ± 1\.414", out)
    assert re.search(r"evaluated: of the attainable +0\.70 ± 0\.20", out)
    assert re.search(r"low +▁▂▂▃▄▅", out), "both scores on one scale"
    assert re.search(r"high\[red\]\$x\^2 +▁▂▄▅▇█", out)
    assert "Score against KL" in out
    assert "attainable" in out.splitlines()[-2]


def test_a_narrow_terminal_gets_the_rest_of_the_runs_below(rlhf: Callable[..., Answer], runs: None) -> None:
    code, out, _ = rlhf("compare", "low", "high[red]$x^2", width=60)
    assert code == 0
    assert len(re.findall(r"^ *best score", out, re.MULTILINE)) == 2
    assert max(map(len, out.splitlines())) <= 60


def test_json_and_nothing_else(rlhf: Callable[..., Answer], runs: None) -> None:
    code, out, _ = rlhf("compare", "low", "high[red]$x^2", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["runs"][1]["evaluation"]["share_of_attainable"]["mean"] == 0.7


def test_out_is_a_picture_or_a_page(rlhf: Callable[..., Answer], runs: None) -> None:
    for name, begin in (("a/compared.png", b"\x89PNG\r\n"), ("compared.html", b"<!doctype html>")):
        code, out, _ = rlhf("compare", "low", "high[red]$x^2", "--out", name)
        assert (code, out.splitlines()[-1]) == (0, f"written: {name}")
        assert Path(name).read_bytes().startswith(begin)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["low", "high[red]$x^2", "--out", "x.pdf"], "--out x.pdf ends in .pdf; name a FILE.png or a FILE.html"),
        (["low", "high[red]$x^2", "--out", "x"], "--out x ends in nothing; name a FILE.png or a FILE.html"),
        (["low"], "compare takes two runs or more, and was given one; `rlhf inspect low` looks into one run"),
        (["low", "low", "--out", "x.html"], "low is the same run as low: name each run once"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    rlhf: Callable[..., Answer], runs: None, arguments: list[str], said: str
) -> None:
    before = set(Path().iterdir())
    assert rlhf("compare", *arguments) == (2, "", f"error: {said}\n")
    assert set(Path().iterdir()) == before
