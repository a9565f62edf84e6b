"""Dataset columns that are carried along for reward functions."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_core.contracts.config import PromptsConfig
from rlhf_core.contracts.config_io import digest_json
from rlhf_core.contracts.errors import UserError
from rlhf_core.prompts.sources import PromptSet, load_prompt_set

ROWS: list[dict[str, Any]] = [
    {"level": 1, "prompt": "p", "meta": {"of": ["a", "b"]}, "id": "x"},
    {"level": 2, "prompt": "q", "meta": {"of": []}, "id": "y"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        path.write_text("\n".join(",".join(map(str, row)) for row in [rows[0], *(r.values() for r in rows)]))
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)


def load(path: Path, **knobs: Any) -> PromptSet:
    return load_prompt_set(PromptsConfig(source=str(path), **knobs))


def problems(path: Path, **knobs: Any) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        load(path, **knobs)
    return tuple(problem.replace(f"{path.parent}/", "") for problem in caught.value.problems)


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet", "folder"])
def test_columns_stand_beside_their_prompts(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, ROWS)
    found = load(tmp_path / name, columns=["meta", "level"])
    assert found.entries == ["p", "q"]
    assert found.columns == [{"meta": {"of": ["a", "b"]}, "level": 1}, {"meta": {"of": []}, "level": 2}]


def test_of_a_csv_they_are_texts_and_the_prompt_need_not_come_first(tmp_path: Path) -> None:
    write(tmp_path / "p.csv", [{"level": row["level"], "prompt": row["prompt"]} for row in ROWS])
    found = load(tmp_path / "p.csv", columns=["level"])
    assert found.entries == ["p", "q"]
    assert found.columns == [{"level": "1"}, {"level": "2"}]


def test_the_prompts_own_column_can_be_one_of_them(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", ROWS)
    assert load(tmp_path / "p.jsonl", columns=["prompt"]).columns == [{"prompt": "p"}, {"prompt": "q"}]


def test_null_and_a_key_left_out_are_none(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", [{"prompt": "p", "answer": None}, {"prompt": "q"}, {"prompt": "r", "answer": 3}])
    assert load(tmp_path / "p.jsonl", columns=["answer"]).columns == [{"answer": None}, {"answer": None}, {"answer": 3}]


def test_of_preferences_a_repeated_prompt_keeps_those_of_its_first_row(tmp_path: Path) -> None:
    pairs = [("A:x", "A:y", 1), ("B:x", "B:y", 2), ("A:v", "A:w", 3)]
    write(tmp_path / "p.jsonl", [{"rejected": r, "level": n, "chosen": c} for c, r, n in pairs])
    found = load(tmp_path / "p.jsonl", from_preferences=True, columns=["level"])
    assert (found.entries, found.columns, found.num_duplicates) == (["A:", "B:"], [{"level": 1}, {"level": 2}], 1)


def test_the_digest_knows_them_and_without_them_is_as_ever(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", ROWS)
    write(tmp_path / "q.jsonl", [ROWS[0], {**ROWS[1], "level": 3}])
    assert load(tmp_path / "p.jsonl").digest == load(tmp_path / "q.jsonl").digest == digest_json(["p", "q"])
    digests = {load(tmp_path / name, columns=["level"]).digest for name in ("p.jsonl", "q.jsonl")}
    assert len(digests | {digest_json(["p", "q"])}) == 3


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet", "folder"])
def test_a_column_that_is_not_there(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, ROWS)
    assert problems(tmp_path / name, columns=["level", "answer"]) == (
        f"prompts.columns names 'answer', which is not in prompts.source '{name}', whose columns are: "
        "level, prompt, meta, id",
    )


def test_a_cell_that_json_does_not_have(tmp_path: Path) -> None:
    day = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    write(
        tmp_path / "p.parquet",
        [{"prompt": "p", "when": None, "x": 1.0}, {"prompt": "q", "when": day, "x": float("nan")}],
    )
    tail = (
        ", which JSON does not have; prompts.columns takes texts, finite numbers, booleans, null, "
        "and lists and objects of them"
    )
    (sentence,) = problems(tmp_path / "p.parquet", columns=["when"])
    assert sentence.startswith("prompts.source 'p.parquet', row 1 (from 0): when is datetime.datetime(2026, 1, 2,")
    assert sentence.endswith(tail)
    assert problems(tmp_path / "p.parquet", columns=["x"]) == (
        f"prompts.source 'p.parquet', row 1 (from 0): x is nan{tail}",
    )
