"""A run as tables: what is joined is what the stages wrote, and nothing is read that was not asked for."""

from __future__ import annotations

from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from damage import finished_run
from tiny_world import Tiny

from rlhf_core.contracts.artifacts import read_artifact
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.tables import SAMPLES, TOKENS, UPDATES, RunTables, explode, open_run


@pytest.fixture(scope="module")
def tables(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> RunTables:
    return open_run(finished_run(tiny, tmp_path_factory.mktemp("tables") / "run"))


def stage_rows(run: RunFolder, stage: str, iteration: int) -> dict[Any, dict[str, Any]]:
    manifest = run.manifests(iteration)[stage]
    rows = read_artifact(run.path, manifest.artifact).to_pylist()
    return {row.get("sample_id", row.get("prompt_id")): row for row in rows}


def test_a_sample_has_what_each_stage_wrote_of_it(tables: RunTables) -> None:
    table = tables.samples().arrow()
    assert table.schema.equals(SAMPLES)
    assert table["iteration"].unique().to_pylist() == list(range(tables.run.num_finished()))
    for row in table.to_pylist():
        iteration = row.pop("iteration")
        assert row.pop("num_tokens") == len(row["response_tokens"])
        for stage in ("generate", "score_rewards", "reference_logprobs", "shape_rewards"):
            written = stage_rows(tables.run, stage, iteration)[row["sample_id"]]
            assert {k: written[k] for k in row.keys() & written.keys()} == {
                k: row[k] for k in row.keys() & written.keys()
            }
        prompt = stage_rows(tables.run, "sample_prompts", iteration)[row["prompt_id"]]
        assert (row["prompt_text"], row["columns"]) == (prompt["prompt_text"], prompt["columns"])


def test_tokens_are_the_lists_of_the_samples_one_after_another(tables: RunTables) -> None:
    tokens = tables.tokens([1]).arrow()
    assert tokens.schema.equals(TOKENS)
    rows = tokens.to_pylist()
    for sample in tables.samples([1]).arrow().to_pylist():
        own = [row for row in rows if row["sample_id"] == sample["sample_id"]]
        assert [row["position"] for row in own] == list(range(sample["num_tokens"]))
        assert [row["token_id"] for row in own] == sample["response_tokens"]
        assert [row["advantage"] for row in own] == sample["advantages"]
        assert [row["return"] for row in own] == sample["returns"]


def test_values_and_returns_are_null_without_a_critic(tables: RunTables) -> None:
    samples = tables.samples([0]).arrow()
    for name in ("values", "returns"):
        kind, at = SAMPLES.field(name).type, samples.schema.get_field_index(name)
        samples = samples.set_column(at, SAMPLES.field(name), pa.array([[]] * samples.num_rows, kind))
    tokens = explode(samples)
    assert tokens["value"].null_count == tokens["return"].null_count == tokens.num_rows > 0
    assert tokens["reward"].null_count == 0


def test_updates_and_iterations(tables: RunTables) -> None:
    updates = tables.updates().arrow()
    assert updates.schema.equals(UPDATES)
    assert updates["step"].to_pylist()[:2] == [0, 1]
    metrics = tables.iterations().pandas()
    assert list(metrics["iteration"]) == list(range(tables.run.num_finished()))
    of = tables.run.manifests(1)["shape_rewards"].metrics["objective/kl"]
    assert metrics["objective/kl"].tolist()[1] == of


def test_polars_reads_only_the_iterations_it_needs(tables: RunTables, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    samples = RunTables._samples

    def watched(self: RunTables, iteration: int) -> pa.Table:
        read.append(iteration)
        return samples(self, iteration)

    monkeypatch.setattr(RunTables, "_samples", watched)
    lazy = tables.samples().polars()
    assert read == []
    few = lazy.select("sample_id", "score").head(2).collect()
    assert read == [0]
    assert few.columns == ["sample_id", "score"]
    highest = lazy.filter(pl.col("score") > 0).select(pl.col("score").max(), pl.len()).collect()
    expected = [s for s in tables.samples().arrow()["score"].to_pylist() if s > 0]
    assert highest.row(0) == (max(expected), len(expected))


def test_every_library_gets_the_same_rows(tables: RunTables) -> None:
    table = tables.samples()
    ids = table.arrow()["sample_id"].to_pylist()
    assert list(table.pandas()["sample_id"]) == ids
    assert table.dataset()["sample_id"][:] == ids
    assert table.polars().collect()["sample_id"].to_list() == ids


def test_an_iteration_that_is_not_there_is_named(tables: RunTables) -> None:
    with pytest.raises(UserError, match=r"shape_rewards of iteration 99 is not committed in .*; the newest is \d+"):
        tables.samples([99])
