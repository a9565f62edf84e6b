"""Value rules at the door of an artifact: each stage's own, and never in the way of healthy numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rlhf_core.contracts.artifacts import (
    artifact_path,
    commit_stage,
    conform,
    encode_table,
    read_artifact,
    read_manifest,
)
from rlhf_core.contracts.durable import write_file
from rlhf_core.contracts.errors import IntegrityError, NumericalError
from rlhf_core.contracts.stage_graph import SCHEMAS, STAGES
from rlhf_core.contracts.values import RULES, not_finite, wrong_values

HEALTHY: dict[str, dict[str, list[Any]]] = {
    "sample_prompts": {
        "prompt_id": [4, 9],
        "prompt_text": ["a", "b"],
        "messages": [[], [{"role": "user", "content": "b"}]],
        "prompt_tokens": [[0], [3, 4]],
        "num_truncated": [0, 2],
        "columns": ["{}", "{}"],
    },
    "generate": {
        "sample_id": ["i0-p4-s0", "i0-p9-s0"],
        "prompt_id": [4, 9],
        "sample_index": [0, 0],
        "response_text": ["", "b"],
        "response_tokens": [[1], [0, 1]],
        "logprobs": [[-0.0], [-3.0, 1e-7]],
        "entropies": [[0.0], [0.5, -1e-7]],
        "values": [[-2.0], [1e-45, 0.0]],
        "support_tokens": [[1], [0, 1, 1]],
        "support_lens": [[1], [2, 1]],
        "finish_reason": ["eos", "length"],
    },
    "score_rewards": {
        "sample_id": ["a", "b"],
        "components": [[{"name": "r", "score": 1.0}], [{"name": "r", "score": -1e30}]],
        "score": [1.0, -1e30],
    },
    "reference_logprobs": {"sample_id": ["a", "b"], "ref_logprobs": [[-1.0], [-2.0, -99999.0]]},
    "shape_rewards": {
        "sample_id": ["a", "b"],
        **{name: [0.5, -0.5] for name in ("score", "score_normalized", "score_clipped", "score_shaped", "kl")},
        "k3": [0.0, 2.0],
        "rlhf_reward": [0.0, -7.0],
        **{name: [[-0.5], [0.5, 1.0]] for name in ("token_kl", "rewards", "advantages", "returns")},
    },
    "ppo_update": {
        "step": [0, 1],
        "epoch": [0, 0],
        "minibatch": [0, 1],
        "num_samples": [1, 1],
        "num_tokens": [2, 3],
        **{name: [0.5, 0.25] for name in ("loss", "policy_loss", "value_loss", "entropy", "ref_k3", "approx_kl")},
        **{name: [0.0, 1.0] for name in ("clip_fraction", "value_clip_fraction", "ratio_mean", "max_abs_log_ratio")},
        **{name: [0.5, 0.25] for name in ("grad_norm", "critic_grad_norm", "learning_rate")},
        "skipped": [False, False],
    },
}


def healthy(stage: str, **changes: list[Any]) -> pa.Table:
    values = HEALTHY[stage] | changes
    return conform(pa.table({f.name: pa.array(values[f.name], f.type) for f in SCHEMAS[stage]}), stage)


@pytest.mark.parametrize("stage", STAGES)
def test_healthy_values_and_an_empty_table_pass(stage: str) -> None:
    assert set(RULES) == set(STAGES)
    assert wrong_values(healthy(stage), stage) is None
    assert wrong_values(SCHEMAS[stage].empty_table(), stage) is None
    whole = pa.concat_tables([healthy(stage).slice(0, 1), healthy(stage).slice(1, 1)])
    assert wrong_values(whole, stage) is None  # also in chunks and slices


def float_columns() -> list[tuple[str, str]]:
    return [
        (stage, f.name)
        for stage, schema in SCHEMAS.items()
        for f in schema
        if "float" in str(f.type) and "struct" not in str(f.type)
    ]


@pytest.mark.parametrize(("stage", "column"), float_columns())
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_float_column_is_finite(stage: str, column: str, value: float) -> None:
    values = [list(v) if isinstance(v, list) else v for v in HEALTHY[stage][column]]
    if isinstance(values[1], list):
        values[1][-1] = value
    else:
        values[1] = value
    wrong = wrong_values(healthy(stage, **{column: values}), stage)
    assert wrong is not None
    assert f"{value:g} in the column {column} of 1 of 2 rows" in wrong


@pytest.mark.parametrize(
    ("stage", "changes", "words"),
    [
        ("sample_prompts", {"prompt_id": [4, 4]}, "1 prompt_ids more than once (4)"),
        (
            "sample_prompts",
            {"prompt_tokens": [[], [1]]},
            "empty list in the column prompt_tokens of 1 of 2 rows (prompt_id 4)",
        ),
        (
            "sample_prompts",
            {"prompt_tokens": [[1], [1, -1]]},
            "-1 in the column prompt_tokens of 1 of 2 rows (prompt_id 9)",
        ),
        ("generate", {"sample_id": ["", "b"]}, "no sample_id in 1 of 2 rows"),
        ("generate", {"logprobs": [[-1.0], [-1.0]]}, "another length than response_tokens in the column logprobs"),
        (
            "generate",
            {"logprobs": [[0.01], [-1.0, -1.0]]},
            "0.01 in the column logprobs of 1 of 2 rows (sample_id i0-p4-s0)",
        ),
        ("generate", {"logprobs": [[-1e7], [-1.0, -1.0]]}, "-1e+07 in the column logprobs"),
        ("generate", {"entropies": [[-0.01], [1.0, 1.0]]}, "-0.01 in the column entropies"),
        ("generate", {"values": [[1.0], []]}, "another length than response_tokens in the column values"),
        (
            "generate",
            {"support_tokens": [[1], [0, 1]]},
            "number of support_tokens than support_lens adds up to in 1 of 2",
        ),
        ("generate", {"support_lens": [[1], [3, 0]]}, "0 in the column support_lens"),
        ("score_rewards", {"components": [[], [{"name": "r", "score": 1.0}]]}, "empty list in the column components"),
        (
            "score_rewards",
            {"components": [[{"name": "r", "score": math.nan}], [{"name": "r", "score": 1.0}]]},
            "nan in the column components.score of 1 of 2 rows (sample_id a)",
        ),
        ("reference_logprobs", {"ref_logprobs": [[0.5], [-1.0]]}, "0.5 in the column ref_logprobs"),
        ("shape_rewards", {"k3": [-0.5, 1.0]}, "-0.5 in the column k3"),
        ("shape_rewards", {"returns": [[], [1.0, 1.0]]}, "another length than token_kl in the column returns"),
        ("ppo_update", {"step": [1, 0]}, "steps that are not 0, 1, 2"),
        ("ppo_update", {"num_tokens": [2, 0]}, "0 in the column num_tokens of 1 of 2 rows (step 1)"),
        ("ppo_update", {"clip_fraction": [0.0, 1.5]}, "1.5 in the column clip_fraction"),
    ],
)
def test_what_no_stage_may_write_is_named(stage: str, changes: dict[str, list[Any]], words: str) -> None:
    wrong = wrong_values(healthy(stage, **changes), stage)
    assert wrong is not None
    assert words in wrong


def test_lists_that_no_row_has_are_no_mistake() -> None:
    empty: dict[str, list[Any]] = {name: [[], []] for name in ("values", "support_tokens", "support_lens")}
    assert wrong_values(healthy("generate", **empty), "generate") is None
    assert wrong_values(healthy("shape_rewards", returns=[[], []]), "shape_rewards") is None


def test_a_skipped_step_keeps_what_it_was_skipped_for_and_no_other_does() -> None:
    loss: dict[str, list[Any]] = {"loss": [0.5, math.nan], "grad_norm": [math.inf, 0.5]}
    assert wrong_values(healthy("ppo_update", **loss, skipped=[True, True]), "ppo_update") is None
    wrong = wrong_values(healthy("ppo_update", **loss, skipped=[True, False]), "ppo_update")
    assert wrong == "nan in the column loss of 1 of 2 rows (step 1)"
    assert wrong_values(healthy("ppo_update", num_tokens=[0, 1], skipped=[True, False]), "ppo_update") is not None


def test_numbers_that_are_not_finite_are_named() -> None:
    assert not_finite({"a": 1.0, "b": math.nan, "c": -math.inf}) == ["nan as the metric b", "-inf as the metric c"]


FACTS: dict[str, Any] = {"key": "0", "inputs": {}, "seed": 1, "identity": "1", "metrics": {}, "state": {}, "timing": {}}


def test_a_commit_of_a_wrong_value_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(
        NumericalError, match="score_rewards of iteration 3 has computed nan in the column score of 1 of 2"
    ):
        commit_stage(tmp_path, "score_rewards", 3, healthy("score_rewards", score=[1.0, math.nan]), **FACTS)
    assert not list(tmp_path.iterdir())


def test_a_wrong_value_under_a_right_digest_is_not_read(tmp_path: Path) -> None:
    manifest = commit_stage(tmp_path, "score_rewards", 3, healthy("score_rewards"), **FACTS)
    assert read_manifest(tmp_path, "score_rewards", 3) == manifest
    for table, words in (
        (healthy("score_rewards", score=[1.0, math.nan]), "holds nan in the column score of 1 of 2 rows"),
        (healthy("score_rewards").slice(0, 1), "holds 1 rows where 2 were committed"),
    ):
        sha256 = write_file(tmp_path / artifact_path(3, "score_rewards"), encode_table(table, {}))
        ref = type(manifest.artifact)("score_rewards", 3, manifest.artifact.path, sha256, 2)
        with pytest.raises(IntegrityError, match=f"{words}.*rlhf resume .*computes it again"):
            read_artifact(tmp_path, ref)
