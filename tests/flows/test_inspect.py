"""`rlhf inspect`, as a person at the terminal, a script and another program see it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from damage import finished_run
from tiny_world import Tiny

from flows.cli import EXIT_MISTAKE, main
from flows.console import Console
from rlhf_core.tables import open_run
from rlhf_core.verification.run import verify_run

Answer = tuple[int, str, str]


@pytest.fixture(scope="module")
def run_dir(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tiny, tmp_path_factory.mktemp("inspected") / "run")


@pytest.fixture
def inspect(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Answer]:
    monkeypatch.setattr("flows.commands.looking.console", Console(width=150))

    def call(*options: Any, run: Path = run_dir) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["inspect", str(run), *map(str, options)])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


def scores(run_dir: Path, iteration: int) -> dict[str, float]:
    table = open_run(run_dir).samples([iteration]).arrow()
    return dict(zip(table["sample_id"].to_pylist(), table["score"].to_pylist(), strict=True))


def test_samples_are_listed_the_best_first(inspect: Callable[..., Answer], run_dir: Path) -> None:
    code, out, _ = inspect("--by", "score", "--iteration", 0, "--limit", 3)
    best = sorted(scores(run_dir, 0).items(), key=lambda item: (-item[1], item[0]))[:3]
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if line.strip().startswith("i000000-p")] == [
        i for i, _ in best
    ]
    assert f"--sample {best[0][0]}" in out
    assert f"3 of {len(scores(run_dir, 0))} rows" in out


def test_json_has_every_row_and_nothing_else(inspect: Callable[..., Answer], run_dir: Path) -> None:
    _, out, _ = inspect("--json")
    found = json.loads(out)
    assert [row["iteration"] for row in found["rows"]] == list(range(found["finished"]))
    assert found["standing"] == "finished"
    _, out, _ = inspect("--samples", "--iterations", "all", "--json")
    assert len(json.loads(out)["rows"]) == sum(len(scores(run_dir, i)) for i in range(found["finished"]))
    sample = next(iter(scores(run_dir, 1)))
    _, out, _ = inspect("--sample", sample, "--json")
    tokens = open_run(run_dir).tokens([1]).arrow().filter(equal("sample_id", sample))
    assert [row["advantage"] for row in json.loads(out)["rows"]] == tokens["advantage"].to_pylist()


def equal(name: str, value: str) -> Any:
    import pyarrow.compute as pc

    return pc.field(name) == value


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl", "arrow"])
def test_a_file_holds_what_the_run_holds(
    ending: str, inspect: Callable[..., Answer], run_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"worst.{ending}"
    code, out, _ = inspect("--by", "kl", "--iterations", "all", "--to", path)
    read = {
        "parquet": pd.read_parquet,
        "csv": pd.read_csv,
        "jsonl": lambda p: pd.read_json(p, lines=True, precise_float=True),
        "arrow": pd.read_feather,
    }
    frame = read[ending](path)
    table = open_run(run_dir).samples().arrow()
    assert code == 0
    assert out.startswith(f"{table.num_rows} rows of iterations 0 to 2, {table.num_columns + 1} columns: ")
    assert list(frame["kl"]) == sorted(frame["kl"], reverse=True)
    assert sorted(frame["sample_id"]) == sorted(table["sample_id"].to_pylist())
    first = table.filter(equal("sample_id", frame["sample_id"][0])).to_pylist()[0]["advantages"]
    told = frame["advantages"][0]
    assert (json.loads(told) if ending == "csv" else list(told)) == pytest.approx(first, abs=0)


def test_histograms_of_what_was_chosen(inspect: Callable[..., Answer], run_dir: Path) -> None:
    code, out, _ = inspect("--histograms", "--iterations", "all")
    assert code == 0
    assert "responses of" in out
    assert "advantage, of a token" in out
    _, out, _ = inspect("--histograms", "--finish", "length", "--iteration", 0, "--json")
    counted = sum(row["count"] for row in json.loads(out)["rows"] if row["quantity"] == "score")
    cut = open_run(run_dir).samples([0]).pandas()["finish_reason"].eq("length").sum()
    assert counted == cut > 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--by", "beauty"], "--by beauty is not something to order by; choose score, kl, k3, reward, length, change"),
        (["--samples", "--iteration", "99"], "shape_rewards of iteration 99 is not committed in"),
        (["--iteration", "99"], "--iteration 99 is not in"),
        (["--stage", "generation"], "--stage generation is not a stage; stages: sample_prompts, generate"),
        (["--stage", "generate", "--histograms"], "--stage and --histograms ask for different tables; choose one"),
        (["--iterations", "all"], "--iterations goes with --samples or --histograms, instead of --iteration"),
        (["--samples", "--iterations", "0,9-7"], "--iterations '0,9-7' has the range 9-7, which runs backwards"),
        (["--sample", "7"], "--sample '7' is not a sample id; they look like i000007-p000123-s0"),
        (["--sample", "i000001-p999999-s0"], "is not in 02_rollouts.arrow of iteration 1"),
        (["--to", "table.xlsx"], "--to table.xlsx ends in no format that can be written; choose .parquet, .csv"),
        (["--histograms", "--contains", "no such text"], "no response of iteration"),
    ],
)
def test_a_mistake_gets_one_sentence(options: list[str], sentence: str, inspect: Callable[..., Answer]) -> None:
    code, out, err = inspect(*options)
    assert code == EXIT_MISTAKE
    assert sentence in err
    assert len(err.splitlines()) == 1
    assert out == ""


def test_nothing_is_written_into_the_run(inspect: Callable[..., Answer], run_dir: Path) -> None:
    code, _, err = inspect("--to", run_dir / "scores.csv")
    assert code == EXIT_MISTAKE
    assert "is inside the run" in err
    assert not verify_run(run_dir).damage


def test_no_run_and_no_response_yet(inspect: Callable[..., Answer], tmp_path: Path) -> None:
    code, _, err = inspect(run=tmp_path)
    assert (code, err.strip()) == (EXIT_MISTAKE, f"error: {tmp_path} is not a run folder: it has no run.json")
