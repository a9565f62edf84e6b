"""``rlhf check --hardware``: a plan for somewhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
from llama_folders import llama_tree
from ruamel.yaml import YAML

from flows.cli import main


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "seven.yaml"
    YAML(typ="safe").dump(llama_tree(tmp_path, "7B"), path)
    return path


def asked(config: Path, *arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        main(["check", "--config", str(config), *arguments])
    return end.value.code


def test_a_plan_that_does_not_fit_says_what_would(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    assert asked(config, "--hardware", "1xH200", "--hardware", "4x8xh100") == 0
    said = capsys.readouterr().out
    assert "Forecast for 1xH200: 1 x NVIDIA H200 SXM, 141 GB" in said
    assert "Forecast for 4x8xH100: 4 nodes of 8 x NVIDIA H100 SXM, 80 GB" in said
    assert "would not fit: generate needs" in said
    assert "it would with --set " in said
    assert "held-out error of seconds: " in said
    assert "H100 has never been measured" in said
    assert "several devices have never been measured" in said
    assert not (config.parent / "runs").exists()


def test_one_that_fits(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = ["--set", "policy.lora.rank=16", "--set", "policy.critic.kind=shared", "--set", "generation.batch_size=32"]
    assert asked(config, "--hardware", "H200", *lora) == 0
    said = capsys.readouterr().out
    assert "fits: " in said
    assert "never been measured" not in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--hardware", "8xB9000"], "--hardware '8xB9000' is not known"),
        (["--hardware", "1xH200", "--set", "prompts.max_len=null"], "set prompts.max_len"),
        (
            ["--hardware", "1xH200", "--set", "policy.model=nowhere/at/all"],
            "policy.model 'nowhere/at/all' is not a folder",
        ),
    ],
)
def test_a_mistake_is_one_sentence(
    config: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(config, *arguments) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert len(told.strip().splitlines()) == 1
