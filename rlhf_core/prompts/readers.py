"""Rows of a file: one function a kind of file, all of the same form.

A reader gets the path and a function that chooses columns from those there are, and returns these columns as
lists of plain Python values. What cannot be read is a ``UserError`` that names ``prompts.source``.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_core.contracts.bounds import at_most, check_is_full, for_file
from rlhf_core.contracts.config import PromptsConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.prompts.remarks import counted
from rlhf_core.prompts.text_files import delimiter_of, kind_of, lines_of, open_utf8

MAX_PROBLEMS = 10
MAX_REASON = 300
MAX_ROWS = 1 << 24
"""Prompts that a run may choose from."""
MAX_CSV_CELL = 2**31 - 1

Choose = Callable[[Sequence[str]], Sequence[str]]
"""From the columns there are to the columns that are read; raises UserError."""


@dataclass(frozen=True)
class Rows:
    """Some columns of a source, all of one length.

    Example: ``Rows({"prompt": ["Hi", "Ho"]}, lines=[1, 3])``
    """

    columns: Mapping[str, Sequence[Any]]
    lines: Sequence[int] | None = None
    """Line of the file each row begins on, from 1; None where a row is not a line."""
    notes: Sequence[str] = ()
    """What was found about the file, in the words that follow "the file: "."""

    def place(self, index: int) -> str:
        """Where a row stands, as a message says it."""
        return f"row {index} (from 0)" if self.lines is None else f"line {self.lines[index]}"


def read_file(config: PromptsConfig, path: Path, choose: Choose) -> Rows:
    """Read a JSONL, JSON, CSV, TSV, text, Parquet or Arrow file; one of texts may be compressed by gzip.

    Args:
        config: for its messages; and its column, which is what the lines of a .txt file are.
        path: the file; its suffix tells the kind.
        choose: picks the columns to read.
    Returns: the chosen columns; no columns at all if a JSON or CSV file has no rows.
    Raises:
        UserError: an unknown suffix, or a file that is not what its suffix says; every bad line is named.
    """
    refuse_subset(config, "a file")
    refuse_split(config, "a file")
    kind, named = kind_of(path), f"prompts.source {config.source!r}"
    reader = TEXT_READERS.get(kind)
    table_reader = TABLE_READERS.get(path.suffix.lower())
    if reader is None and table_reader is None:
        packed = path.suffix.lower() in PACKED or (kind in TABLE_READERS and kind != path.suffix.lower())
        raise UserError(
            f"{named} is a file of an unknown kind; accepted are {', '.join(FILE_READERS)}"
            f"{'; unpack it first' * packed}{'; export the sheet as CSV' * (kind in SHEETS)}"
        )
    notes: list[str] = []
    size = 0
    try:
        size = check_is_full(path)
        with at_most(for_file(size)):
            if reader is None:
                return table_reader(path, choose) if table_reader else Rows({})
            if kind == ".txt":
                reader = functools.partial(_read_lines, column=config.column)
            with open_utf8(path, notes) as file:
                rows = reader(file, choose)
        return replace(rows, notes=[*notes, *rows.notes])
    except MemoryError:  # Arrow's as well
        raise UserError(
            f"{named} cannot be read: its {size} bytes would take more than {for_file(size) >> 30} GiB of memory, or "
            "more than is free; take an intact file, or fewer rows"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{named} is not UTF-8 text: {error}; save it as UTF-8") from None
    except (pa.ArrowException, OSError, ValueError, RecursionError, EOFError, zlib.error) as error:
        raise UserError(f"{named} cannot be read: {reason(error)}") from None
    except BadLinesError as error:
        raise first_problems([f"{named}, {line}" for line in error.lines]) from None


def check_num_rows(number: int) -> None:
    """Raise ValueError for more rows than are held in memory: some columns take no room in a file."""
    if number > MAX_ROWS:
        raise ValueError(f"it has {number} rows; at most {MAX_ROWS} are read")


def first_problems(problems: Sequence[str]) -> UserError:
    """One error of the first problems, which says how many more there are."""
    hidden = len(problems) - MAX_PROBLEMS
    rest = [f"… and {hidden} more problems in prompts.source"] if hidden > 0 else []
    return UserError(*problems[:MAX_PROBLEMS], *rest)


def reason(error: BaseException) -> str:
    """Why it failed, in one line: the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_REASON else f"{text[: MAX_REASON - 1]}…"


def refuse_subset(config: PromptsConfig, kind: str) -> None:
    """Raise UserError if a subset is asked of a source that would ignore it in silence."""
    if config.subset is not None:
        raise UserError(
            f"prompts.subset is {config.subset!r}, but prompts.source {config.source!r} is {kind}, which has "
            "no subsets; leave prompts.subset out"
        )


def refuse_split(config: PromptsConfig, kind: str) -> None:
    """Likewise for a split; the default is as good as none."""
    if config.split != PromptsConfig.model_fields["split"].default:
        raise UserError(
            f"prompts.split is {config.split!r}, but prompts.source {config.source!r} is {kind}; "
            "leave prompts.split out"
        )


class BadLinesError(Exception):
    """Lines that are not what the file's kind demands, all of them."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__(lines)
        self.lines = lines


def _read_jsonl(file: IO[bytes], choose: Choose) -> Rows:
    objects: list[dict[str, Any]] = []
    lines: list[int] = []
    bad: list[str] = []
    for number, line in lines_of(file):
        if not line.strip():
            continue
        if not objects and not bad and line.strip() in (b"[", b"{"):
            raise ValueError("it holds JSON over several lines; a file of one JSON list is named .json")
        try:
            objects.append(_object(_parse(line)))
            lines.append(number)
        except (ValueError, RecursionError) as error:
            bad.append(f"line {number} {_json_fault(error)}")
    if bad:
        raise BadLinesError(bad)
    return _rows_of_objects(objects, choose, lines)


def _read_json(file: IO[bytes], choose: Choose) -> Rows:
    try:
        value = _parse(file.read())
    except json.JSONDecodeError as error:
        hint = "; a file of one object a line is named .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{error}{hint}") from None
    notes: list[str] = []
    if isinstance(value, dict):
        value, notes = _only_list(cast("dict[str, object]", value))
    if not isinstance(value, list):
        raise ValueError(f"a JSON file holds a list of objects, this one a {type(value).__name__}")
    objects: list[dict[str, Any]] = []
    bad: list[str] = []
    for index, item in enumerate(cast("list[object]", value)):
        try:
            objects.append(_object(item))
        except ValueError as error:
            bad.append(f"row {index} (from 0) {error}")
    if bad:
        raise BadLinesError(bad)
    return replace(_rows_of_objects(objects, choose), notes=notes)


def _only_list(value: Mapping[str, object]) -> tuple[object, list[str]]:
    """The one list of objects that an object holds, as ``{"version": 1, "data": [...]}``."""
    lists = [key for key, inner in value.items() if isinstance(inner, list) and _all_objects(cast("list[Any]", inner))]
    if len(lists) == 1:
        return value[lists[0]], [f"the rows are the list under {lists[0]!r}"]
    hint = f"; it has several, under {', '.join(map(repr, lists))}" if lists else ""
    if value and all(isinstance(inner, dict | list) for inner in value.values()) and not lists:
        hint = "; it is written column by column: write one object a row (pandas: orient='records')"
    raise ValueError(f"a JSON file holds a list of objects, this one a dict{hint}")


def _all_objects(items: Sequence[Any]) -> bool:
    return bool(items) and all(isinstance(item, dict) for item in items)


def _read_lines(file: IO[bytes], choose: Choose, *, column: str) -> Rows:
    """One prompt a line."""
    found = [(number, line.decode("utf-8")) for number, line in lines_of(file)]
    full = [(number, line) for number, line in found if line.strip()]
    if full and full[0][1].lstrip().startswith("{") and _is_object(full[0][1]):
        raise ValueError(f"line {full[0][0]} is a JSON object; a file of one object a line is named .jsonl")
    choose([column])
    empty = f" and {counted(len(found) - len(full), 'empty line')} left out" * (len(full) < len(found))
    return Rows(
        {column: [line for _, line in full]} if full else {},
        [number for number, _ in full],
        [f"each line of a .txt file is a prompt: {counted(len(full), 'prompt')}{empty}"],
    )


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_csv(file: IO[bytes], choose: Choose, *, usual: str = ",") -> Rows:
    """Python's reader, not Arrow's: strict, it refuses a quote that never closes, and it counts lines."""
    text = file.read().decode("utf-8")
    delimiter, skipped = delimiter_of(text, usual)
    limit = csv.field_size_limit(MAX_CSV_CELL)
    try:
        rows = _rows_of_csv(text[skipped:], delimiter, choose)
    finally:
        csv.field_size_limit(limit)
    lines = rows.lines and [line + bool(skipped) for line in rows.lines]
    notes = [f"its cells are separated by {delimiter!r}"] * (delimiter != usual)
    return replace(rows, lines=lines, notes=notes)


def _rows_of_csv(text: str, delimiter: str, choose: Choose) -> Rows:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    cells: list[list[str]] = []
    lines: list[int] = []
    start = 1
    try:
        for row in reader:
            if row:  # an empty line is no row
                cells.append(row)
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"the row that begins on line {start} is not CSV: {error}") from None
    names, cells, lines = (cells or [[]])[0], cells[1:], lines[1:]
    pairs = zip(lines, cells, strict=True)
    bad = [f"line {n} has {len(row)} cells, the header {len(names)}" for n, row in pairs if len(row) != len(names)]
    if bad:
        raise BadLinesError(bad)
    wanted = choose(names) if cells else []
    return Rows({name: [row[i] for row in cells] for i, name in enumerate(names) if name in wanted}, lines)


def _read_parquet(path: Path, choose: Choose) -> Rows:
    with pq.ParquetFile(path, pre_buffer=False) as file:
        check_num_rows(file.metadata.num_rows)
        return _rows_of_table(file.read(columns=list(choose(file.schema_arrow.names)), use_threads=False))


def _read_arrow(path: Path, choose: Choose) -> Rows:
    """The IPC file format, or the stream format that the cache of `datasets` is written in."""
    with pa.OSFile(str(path)) as file:
        is_file_format = file.read(6) == b"ARROW1"
        file.seek(0)
        alone = pa.ipc.IpcReadOptions(use_threads=False)  # one that cannot begin ends the process
        reader = (pa.ipc.open_file if is_file_format else pa.ipc.open_stream)(file, options=alone)
        table = reader.read_all().select(list(choose(reader.schema.names)))
        check_num_rows(table.num_rows)
    table.validate(full=True)
    return _rows_of_table(table)


TEXT_READERS: dict[str, Callable[[IO[bytes], Choose], Rows]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": functools.partial(_read_csv, usual="\t"),
    ".txt": functools.partial(_read_lines, column="prompt"),
}
TABLE_READERS: dict[str, Callable[[Path, Choose], Rows]] = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".feather": _read_arrow,
    ".ipc": _read_arrow,
}
FILE_READERS = (*TEXT_READERS, *TABLE_READERS)
"""Suffixes of the files that are read; those of texts may end with .gz."""
PACKED = (".zip", ".bz2", ".xz", ".zst", ".lz4", ".tar", ".tgz", ".7z", ".gz")
SHEETS = (".xlsx", ".xls", ".ods")


def _rows_of_table(table: pa.Table) -> Rows:
    return Rows({name: table.column(name).to_pylist() for name in table.column_names})


def _rows_of_objects(objects: Sequence[Mapping[str, Any]], choose: Choose, lines: Sequence[int] | None = None) -> Rows:
    names = list(dict.fromkeys(name for item in objects for name in item))
    wanted = choose(names) if objects else []
    return Rows({name: [item.get(name) for item in objects] for name in wanted}, lines)


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}; a JSON object is needed")
    return cast("dict[str, Any]", value)


def _parse(data: bytes) -> object:
    return _DECODER.decode(data.decode("utf-8"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("has a key twice in one object")
    return table


def _refuse(token: str) -> None:
    raise ValueError(f"holds {token}, which is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse, object_pairs_hook=_unique)


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON: {error.msg} (column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 text (byte {error.start}); save the file as UTF-8"
    return "is nested too deep" if isinstance(error, RecursionError) else str(error)
