"""A table as a file for another program, in the format that the file's name asks for."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pyarrow as pa

from rlhf_core.contracts.durable import write_file
from rlhf_core.contracts.errors import UserError

_FORMULAS: Final = re.compile(r"\s*[=+\-@＝＋－＠]|[\t\r\n]")
"""How a cell begins that a spreadsheet computes."""


def _parquet(table: pa.Table, sink: io.BytesIO) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table, sink, compression="zstd")


def _arrow(table: pa.Table, sink: io.BytesIO) -> None:
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _csv(table: pa.Table, sink: io.BytesIO) -> None:
    import pyarrow.csv

    for at, field in enumerate(table.schema):
        if pa.types.is_nested(field.type):  # which CSV has no words for
            texts = [json.dumps(value, ensure_ascii=False) for value in table[field.name].to_pylist()]
            table = table.set_column(at, field.name, pa.array(texts, pa.string()))
        elif pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            texts = [_no_formula(text) for text in table[field.name].to_pylist()]
            table = table.set_column(at, field.name, pa.array(texts, field.type))
    table = table.rename_columns([str(_no_formula(name)) for name in table.column_names])
    pyarrow.csv.write_csv(table, sink)


def _no_formula(text: str | None) -> str | None:
    """A text that a spreadsheet would compute, behind an apostrophe, which makes it text there (OWASP: CSV injection).

    Numbers are numbers and stay as they are; a text that looks like a number, ``-1``, gets the apostrophe too.
    """
    return f"'{text}" if text and _FORMULAS.match(text) else text


def _json_lines(table: pa.Table, sink: io.BytesIO) -> None:
    for row in table.to_pylist():
        sink.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


FORMATS: Final[dict[str, Callable[[pa.Table, io.BytesIO], None]]] = {
    ".parquet": _parquet,
    ".csv": _csv,
    ".jsonl": _json_lines,
    ".arrow": _arrow,
}
"""Ending of a file's name -> what writes it."""


def check_target(path: Path, run_dir: Path) -> None:
    """Raise UserError unless a table can be written there: a known ending, no folder, and outside the run."""
    if path.suffix not in FORMATS:
        raise UserError(f"--to {path} ends in no format that can be written; choose {', '.join(FORMATS)}")
    if path.is_dir():
        raise UserError(f"--to {path} is a folder; name a file")
    if path.resolve().is_relative_to(run_dir.resolve()):
        raise UserError(f"--to {path} is inside the run, which holds only what the run wrote; choose a place outside")


def export_table(table: pa.Table, path: Path) -> None:
    """Write a table as Parquet, CSV (lists as JSON, formulas as text), JSON lines or Arrow, all of it or nothing."""
    sink = io.BytesIO()
    FORMATS[path.suffix](table, sink)
    write_file(path, sink.getvalue())
