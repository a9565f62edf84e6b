"""Tables for other programs: a spreadsheet computes nothing of a CSV file, and its numbers are numbers."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pytest

from rlhf_core.export import export_table

FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "  =1", "=cmd|'/C calc'!A0", "＝1", "\n=2"]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_text_behind_an_apostrophe(text: str, tmp_path: Path) -> None:
    export_table(pa.table({text: [text], "n": [-1.5], "list": [[-1, 2]]}), tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        names, row = list(csv.reader(file))
    assert names == [f"'{text}", "n", "list"]
    assert row == [f"'{text}", "-1.5", "[-1, 2]"]


def test_other_cells_stay(tmp_path: Path) -> None:
    texts = ["good", "a=b", "'quoted'", "1 - 2"]
    export_table(pa.table({"text": texts, "n": [1, -2, 3, 4]}), tmp_path / "a.csv")
    back = pyarrow.csv.read_csv(tmp_path / "a.csv")
    assert back["n"].to_pylist() == [1, -2, 3, 4]
    assert back["text"].to_pylist() == ["good", "a=b", "'quoted'", "1 - 2"]


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "arrow"])
def test_other_formats_hold_the_text_itself(ending: str, tmp_path: Path) -> None:
    import json

    import pyarrow.feather as feather
    import pyarrow.parquet as pq

    path = tmp_path / f"a.{ending}"
    export_table(pa.table({"x": FORMULAS}), path)
    read = {
        "jsonl": lambda: [json.loads(line)["x"] for line in path.read_text().splitlines()],
        "parquet": lambda: list(pq.read_table(path)["x"].to_pylist()),
        "arrow": lambda: list(feather.read_table(path)["x"].to_pylist()),
    }
    assert read[ending]() == FORMULAS
