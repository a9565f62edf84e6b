"""The artifacts are plain Arrow: each tool of the documentation opens each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_core.contracts.artifacts import commit_stage
from rlhf_core.contracts.stage_graph import FILE_STEMS, SCHEMAS


@pytest.fixture(scope="module", params=FILE_STEMS)
def artifact(request: pytest.FixtureRequest, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One artifact of each stage, by the stages themselves."""
    from iteration import Bench

    from rlhf_core.contracts.config_io import build_config

    bench = Bench.of(
        build_config(
            {
                "prompts": {"source": str(tiny.prompts), "batch_size": 8},
                "policy": {"model": str(tiny.policy)},
                "reward": {"components": [{"kind": "model", "model": str(tiny.reward)}]},
                "generation": {"max_new_tokens": 4, "top_k": 5},
                "device": "cpu",
                "num_threads": 1,
            }
        )
    )
    prompts, rollouts, experience = bench.until_experience()
    tables = {
        "sample_prompts": prompts.to_table,
        "generate": rollouts.to_table,
        "score_rewards": bench.scores(prompts, rollouts).batch.to_table,
        "reference_logprobs": bench.ref_logprobs(prompts, rollouts).batch.to_table,
        "shape_rewards": experience.to_table,
        "ppo_update": bench.update(prompts, rollouts, experience).batch.to_table,
    }
    run_dir = tmp_path_factory.mktemp("run")
    manifest = commit_stage(
        run_dir, request.param, 0, tables[request.param](), key="k", inputs={}, seed=0, identity="i",
        metrics={}, state={}, timing={},
    )  # fmt: skip
    assert manifest.artifact.rows == (4 if request.param == "ppo_update" else 8)
    return run_dir / manifest.artifact.path


def columns_of(path: Path) -> list[str]:
    stage = next(stage for stage, stem in FILE_STEMS.items() if stem == path.stem)
    return list(SCHEMAS[stage].names)


def test_polars(artifact: Path) -> None:
    import polars

    assert polars.read_ipc(artifact).columns == columns_of(artifact)
    assert polars.scan_ipc(artifact).collect().height in (8, 4)


def test_duckdb(artifact: Path) -> None:
    import duckdb
    import pyarrow.dataset

    rows = pyarrow.dataset.dataset(artifact, format="ipc")
    found = duckdb.connect().register("artifact", rows).sql("select * from artifact")
    assert found.columns == columns_of(artifact)
    assert len(found.fetchall()) in (8, 4)


def test_pandas(artifact: Path) -> None:
    import pandas

    frame = pandas.read_feather(artifact)
    assert list(frame.columns) == columns_of(artifact)
    assert len(frame) in (8, 4)


def test_datasets(artifact: Path, tmp_path: Path) -> None:
    import datasets

    loaded = datasets.load_dataset("arrow", data_files=str(artifact), split="train", cache_dir=str(tmp_path))
    assert loaded.column_names == columns_of(artifact)
    assert len(loaded) in (8, 4)
