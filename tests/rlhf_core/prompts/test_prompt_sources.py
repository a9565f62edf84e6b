"""Prompts of every kind of source, and the sentence of everything that is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_core.contracts.config import PromptsConfig
from rlhf_core.contracts.config_io import digest_json
from rlhf_core.contracts.errors import UserError
from rlhf_core.prompts.sources import PromptSet, load_prompt_set

TEXTS = ["Why is the sky blue?", "  2 + 2 =\n", 'Say "ça va, 你好"\r\n🙂', "NA", "42", "null"]
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "And\nnow?"},
    ],
]


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


def write_ipc_file(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(list(rows))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def write_ipc_stream(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(list(rows))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_saved(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    import datasets

    datasets.Dataset.from_list(list(rows)).save_to_disk(path)


def write_saved_dict(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    import datasets

    other = datasets.Dataset.from_list([{"prompt": "not this one"}])
    datasets.DatasetDict({"test": other, "train": datasets.Dataset.from_list(list(rows))}).save_to_disk(path)


def write_folder_of_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.mkdir()
    write_jsonl(path / "train.jsonl", rows)
    write_jsonl(path / "test.jsonl", rows[-1:])


def write_folder_of_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.mkdir()
    write_parquet(path / "train-00000-of-00002.parquet", rows[:1])
    write_parquet(path / "train-00001-of-00002.parquet", rows[1:])


Write = Callable[[Path, Sequence[dict[str, Any]]], None]
CSV: dict[str, Write] = {"p.csv": write_csv}
NESTED: dict[str, Write] = {
    "p.jsonl": write_jsonl,
    "p.NDJSON": write_jsonl,
    "p.json": write_json,
    "p.parquet": write_parquet,
    "p.arrow": write_ipc_file,
    "p.feather": write_ipc_file,
    "p.ipc": write_ipc_stream,
    "saved": write_saved,
    "saved_dict": write_saved_dict,
    "folder_of_jsonl": write_folder_of_jsonl,
    "folder_of_parquet": write_folder_of_parquet,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` caches below tmp_path and never asks the network."""
    from datasets import config
    from huggingface_hub import constants

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def load(source: Path | str, **knobs: Any) -> PromptSet:
    return load_prompt_set(PromptsConfig(source=str(source), **knobs))


def problems(source: Path | str, **knobs: Any) -> list[str]:
    """The sentences of the refusal, with the path of the source shortened to its name."""
    with pytest.raises(UserError) as caught:
        load(source, **knobs)
    folder = f"{source.parent}/" if isinstance(source, Path) else ""
    return [problem.replace(folder, "") for problem in caught.value.problems]


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("name", [*CSV, *NESTED])
def test_texts_of_every_kind_of_source(tmp_path: Path, name: str) -> None:
    (CSV | NESTED)[name](tmp_path / name, [{"id": str(i), "prompt": text} for i, text in enumerate(TEXTS)])

    found = load(tmp_path / name)

    assert found == PromptSet(TEXTS, digest_json(TEXTS), num_duplicates=0, columns=[{}] * len(TEXTS))


@pytest.mark.parametrize("name", list(NESTED))
def test_chats_of_every_kind_of_source(tmp_path: Path, name: str) -> None:
    more = [[m | {"name": None, "weight": 1} for m in chat] for chat in CHATS]
    NESTED[name](tmp_path / name, [{"messages": chat} for chat in more])

    found = load(tmp_path / name, column="messages")

    assert found == PromptSet(CHATS, digest_json(CHATS), num_duplicates=0, columns=[{}] * len(CHATS))


@pytest.mark.parametrize("name", ["p.jsonl", "folder_of_jsonl"])
def test_texts_and_chats_in_one_column(tmp_path: Path, name: str) -> None:
    NESTED[name](tmp_path / name, [{"prompt": "Hi"}, {"prompt": CHATS[0]}])

    assert list(load(tmp_path / name).entries) == ["Hi", CHATS[0]]


def test_digest_is_of_content_and_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x"}, {"prompt": "y"}])
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": "y"}, {"prompt": "x"}])
    write_jsonl(tmp_path / "c.jsonl", [{"prompt": "x"}, {"prompt": "y", "other": 1}])

    a, b, c = (load(tmp_path / name).digest for name in ("a.jsonl", "b.jsonl", "c.jsonl"))

    assert a == c != b
    # printf '["x","y"]' | sha256sum
    assert a == "01f650e85c95620160b40ed22626dca932e9f700ffe599be060da184dd4d7822"


def test_repeated_prompts_stay_without_preferences(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "x"}, {"prompt": "x"}])

    assert load(tmp_path / "p.jsonl") == PromptSet(["x", "x"], digest_json(["x", "x"]), 0, [{}, {}])


def test_jsonl_may_have_empty_lines_a_byte_order_mark_and_line_separators(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", '\ufeff{"prompt": "a\u2028b"}\r\n\r\n  \n{"prompt": "c"}')

    assert list(load(path).entries) == ["a\u2028b", "c"]


def test_csv_may_have_empty_lines_a_byte_order_mark_and_long_cells(tmp_path: Path) -> None:
    long = "x" * 200_000
    path = written(tmp_path / "p.csv", f'\ufeffprompt,id\r\n\r\n"a\r\nb",1\r\n{long},2\r\n')
    limit = csv.field_size_limit(12_345)

    assert list(load(path).entries) == ["a\r\nb", long]
    assert csv.field_size_limit(limit) == 12_345


def test_json_may_have_a_byte_order_mark(tmp_path: Path) -> None:
    assert list(load(written(tmp_path / "p.json", '\ufeff[{"prompt": "x"}]')).entries) == ["x"]


def test_a_folder_named_key_value_adds_no_column(tmp_path: Path) -> None:
    path = tmp_path / "prompt=x" / "p.parquet"
    path.parent.mkdir()
    write_parquet(path, [{"text": "a"}])

    assert list(load(path, column="text").entries) == ["a"]
    assert "prompts.column 'prompt' is not in" in problems(path)[0]


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "x"}])

    assert list(load("~/p.jsonl").entries) == ["x"]


def test_a_relative_folder_named_like_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder_of_jsonl(tmp_path / "json", [{"prompt": "x"}])
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "a file that nobody named"}])
    monkeypatch.chdir(tmp_path)

    assert list(load("json").entries) == ["x"]


def test_splits(tmp_path: Path) -> None:
    write_saved_dict(tmp_path / "saved", [{"prompt": "x"}])
    write_folder_of_jsonl(tmp_path / "folder", [{"prompt": "x"}, {"prompt": "y"}])

    assert list(load(tmp_path / "saved", split="test").entries) == ["not this one"]
    assert list(load(tmp_path / "folder", split="test").entries) == ["y"]
    assert list(load(tmp_path / "folder", split="train[1:]").entries) == ["y"]


def test_saved_dataset_with_a_selection_and_a_format(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list([{"prompt": text, "n": 1} for text in "abc"]).select([2, 0])
    data.with_format("numpy", columns=["n"]).save_to_disk(tmp_path / "saved")

    assert list(load(tmp_path / "saved").entries) == ["c", "a"]


def test_hub_dataset_gets_source_subset_and_split_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[tuple[Any, ...]] = []

    def fake(*args: Any, **kwargs: Any) -> datasets.Dataset:
        calls.append((args, kwargs))
        return datasets.Dataset.from_list([{"prompt": "x"}])

    monkeypatch.setattr(datasets, "load_dataset", fake)

    found = load("someone/prompts", subset="easy", split="test")

    assert list(found.entries) == ["x"]
    assert calls == [(("someone/prompts", "easy"), {"split": "test"})]


# What is refused


def test_no_source() -> None:
    assert problems(" ") == [
        "prompts.source is not set; name a file (.jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet, "
        ".arrow, .feather, .ipc), a `datasets` folder or a dataset of the hub"
    ]


@pytest.mark.parametrize("source", ["./data", "/data", "~/data", "~nobody/data", "data.JSONL", "a/b/c", "a/b.csv"])
def test_path_that_does_not_exist(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    assert problems(source) == [f"prompts.source {source!r} does not exist"]


def test_path_that_no_file_system_takes() -> None:
    assert problems("a" * 5000) == [f"prompts.source '{'a' * 58}… cannot be looked up: File name too long"]


@pytest.mark.parametrize("source", ["someone/nothing", "nothing"])
def test_hub_dataset_that_cannot_be_loaded(source: str) -> None:
    [problem] = problems(source, subset="easy")

    assert problem.startswith(
        f"prompts.source {source!r} is neither a file nor a folder here, and could not be loaded from the "
        "hub (prompts.subset 'easy', prompts.split 'train'): "
    )
    assert source in problem[60:]


def test_reader_of_datasets_is_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a file that nobody named"}])

    assert problems("json") == [
        "prompts.source 'json' is the name of a reader of `datasets`, not of a dataset; name a file, a "
        "folder or a dataset of the hub"
    ]


@pytest.mark.parametrize("name", ["p.pdf", "p", "p.csv.old"])
def test_unknown_suffix(tmp_path: Path, name: str) -> None:
    assert problems(written(tmp_path / name, "x")) == [
        f"prompts.source '{name}' is a file of an unknown kind; accepted are .jsonl, .ndjson, .json, .csv, "
        ".tsv, .txt, .parquet, .arrow, .feather, .ipc"
    ]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("p.json", '{"prompt": "x"}', "cannot be read: a JSON file holds a list of objects, this one a dict"),
        (
            "p.json",
            '{"prompt": "x"}\n{"prompt": "y"}',
            "cannot be read: Extra data: line 2 column 1 (char 16); a file of one object a line is named ",
        ),
        ("p.json", "", "cannot be read: Expecting value: line 1 column 1 (char 0)"),
        ("p.json", b"\xff", "is not UTF-8 text: 'utf-8' codec can't decode byte 0xff in position 0: "),
        ("p.json", "[" * 100_000, "cannot be read: maximum recursion depth exceeded"),
        ("p.csv", b"prompt\n\xff\n", "is not UTF-8 text: 'utf-8' codec can't decode byte 0xff in position "),
        (
            "p.csv",
            'prompt\na\n"b\nc\n',
            "cannot be read: the row that begins on line 3 is not CSV: unexpected end",
        ),
        ("p.parquet", "PAR1, no more", "cannot be read: Parquet magic bytes not found in footer"),
        ("p.parquet", "", "cannot be read: Parquet file size is 0 bytes"),
        ("p.arrow", "no Arrow", "cannot be read: "),
        ("p.arrow", "ARROW1", "cannot be read: File is too small: 6"),
    ],
)
def test_file_that_is_not_what_its_suffix_says(tmp_path: Path, name: str, content: str | bytes, sentence: str) -> None:
    [problem] = problems(written(tmp_path / name, content))

    assert problem.startswith(f"prompts.source '{name}' {sentence}")


@pytest.mark.parametrize("name", ["p.parquet", "p.arrow", "p.ipc"])
def test_arrow_text_that_is_not_utf8(tmp_path: Path, name: str) -> None:
    NESTED[name](tmp_path / name, [{"prompt": "a marked text"}])
    written(tmp_path / name, (tmp_path / name).read_bytes().replace(b"a marked", b"a \xffarked"))

    [problem] = problems(tmp_path / name)

    assert "not UTF-8 text" in problem or "Invalid UTF8" in problem


def test_arrow_file_with_impossible_values(tmp_path: Path) -> None:
    offsets, text = pa.array([0, 3, 1], pa.int32()).buffers()[1], pa.py_buffer(b"abc")
    column = pa.Array.from_buffers(pa.string(), 2, [None, offsets, text])
    table = pa.table({"prompt": column})
    with pa.OSFile(str(tmp_path / "p.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)

    [problem] = problems(tmp_path / "p.arrow")

    assert problem.startswith("prompts.source 'p.arrow' cannot be read: Column 0: ")


def test_bad_lines_are_all_named(tmp_path: Path) -> None:
    lines = [
        b'{"prompt": "fine"}',
        b'{"prompt": }',
        b'["x"]',
        b"",
        b'{"prompt": NaN}',
        b'{"prompt": "x", "prompt": "y"}',
        b'{"prompt": "\xff"}',
        b"[" * 100_000,
    ]

    assert problems(written(tmp_path / "p.jsonl", b"\n".join(lines))) == [
        "prompts.source 'p.jsonl', line 2 is not JSON: Expecting value (column 12)",
        "prompts.source 'p.jsonl', line 3 holds a list; a JSON object is needed",
        "prompts.source 'p.jsonl', line 5 holds NaN, which is not JSON",
        "prompts.source 'p.jsonl', line 6 has a key twice in one object",
        "prompts.source 'p.jsonl', line 7 is not UTF-8 text (byte 12); save the file as UTF-8",
        "prompts.source 'p.jsonl', line 8 is nested too deep",
    ]
    assert problems(written(tmp_path / "p.json", '[{"prompt": "x"}, 1]')) == [
        "prompts.source 'p.json', row 1 (from 0) holds a int; a JSON object is needed"
    ]
    assert problems(written(tmp_path / "p.csv", 'prompt,n\n"a\nb",1\nc\n\nd,2,3\n')) == [
        "prompts.source 'p.csv', line 4 has 1 cells, the header 2",
        "prompts.source 'p.csv', line 6 has 3 cells, the header 2",
    ]


def test_ten_problems_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": ""}] * 1000)
    found = problems(tmp_path / "p.jsonl")

    assert [p.split(":")[0] for p in found[:10]] == [f"prompts.source 'p.jsonl', line {n}" for n in range(1, 11)]
    assert found[10:] == ["… and 990 more problems in prompts.source"]

    write_jsonl(tmp_path / "p.jsonl", [{"prompt": ""}] * 10)
    assert len(problems(tmp_path / "p.jsonl")) == 10


USER = {"role": "user", "content": "Hi"}
BAD_ENTRIES: list[tuple[Any, str]] = [
    (None, "prompt is null or missing; a text or a list of {role, content} messages is needed"),
    (7, "prompt is 7, a int; a text or a list of {role, content} messages is needed"),
    ("", "prompt is ''; a prompt must not be empty"),
    (" \n\u2003", "prompt is ' \\n\\u2003'; a prompt must not be white space only"),
    ([], "prompt is []; a prompt must not be empty"),
    (
        USER,
        f"prompt is {USER}, a dict; a text or a list of {{role, content}} messages is needed; "
        "put the message into a list",
    ),
    (["Hi"], "prompt[0] is 'Hi'; a message is {role, content}, both of them texts"),
    (
        [USER, {"speaker": "human", "text": "Hi"}],
        "prompt[1] is {'speaker': 'human', 'text': 'Hi'}; a message is {role, content}, both of them texts",
    ),
    (
        [{"role": "", "content": "Hi"}],
        "prompt[0] is {'role': '', 'content': 'Hi'}; a message is {role, content}, both of them texts",
    ),
    (
        [{"role": "user", "content": None}],
        "prompt[0] is {'role': 'user', 'content': None}; a message is {role, content}, both of them texts",
    ),
    (
        [{"role": "user", "content": ["x" * 100]}],
        "prompt[0] is {'role': 'user', 'content': ['xxxxxxxxxxxxxxxxxxxxxxxxxxxxx…; a message is "
        "{role, content}, both of them texts",
    ),
    (
        [USER, {"role": "assistant", "content": "Hello"}],
        "prompt ends with the assistant message 'Hello'; the policy writes the answer, so leave it out, "
        "or set prompts.last_answer: cut",
    ),
    ([{"role": "user", "content": " "}], "prompt ends with a message whose content is ' '; it needs text"),
    ("a\ud83d", "prompt is no Unicode text: half a surrogate pair at character 1"),
    (
        [{"role": "user", "content": "\udc00"}],
        "prompt[0] is no Unicode text: half a surrogate pair at character 0",
    ),
]


@pytest.mark.parametrize(("value", "sentence"), BAD_ENTRIES)
def test_row_without_a_prompt_is_named(tmp_path: Path, value: Any, sentence: str) -> None:
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "x"}, {"prompt": value}])

    assert problems(tmp_path / "p.jsonl") == [f"prompts.source 'p.jsonl', line 2: {sentence}"]


def test_rows_are_counted_by_what_the_source_has(tmp_path: Path) -> None:
    jsonl = written(tmp_path / "p.jsonl", '{"other": "y"}\n{"prompt": "x"}\n')
    assert problems(jsonl)[0].startswith("prompts.source 'p.jsonl', line 1: prompt is null or missing;")
    jsonl = written(tmp_path / "p.jsonl", '\n{"prompt": "x"}\n\n{"other": "y"}\n')
    assert problems(jsonl)[0].startswith("prompts.source 'p.jsonl', line 4: prompt is null or missing;")

    table = written(tmp_path / "p.csv", 'id,prompt\n1,"a\nb"\n\n2,\n')
    assert problems(table) == ["prompts.source 'p.csv', line 5: prompt is ''; a prompt must not be empty"]

    for name in ("p.json", "p.parquet", "p.arrow", "saved", "folder_of_parquet"):
        NESTED[name](tmp_path / name, [{"prompt": "x"}, {"prompt": ""}])
        assert problems(tmp_path / name) == [
            f"prompts.source '{name}', row 1 (from 0): prompt is ''; a prompt must not be empty"
        ]


@pytest.mark.parametrize("name", [*CSV, *NESTED])
def test_missing_column(tmp_path: Path, name: str) -> None:
    rows = [{"id": "1", "text": "x"}] * 2
    (CSV | NESTED)[name](tmp_path / name, rows)

    assert problems(tmp_path / name) == [
        f"prompts.column 'prompt' is not in prompts.source '{name}', whose columns are: id, text; "
        "did you mean prompts.column: text?"
    ]
    assert problems(tmp_path / name, from_preferences=True) == [
        f"prompts.column 'prompt' is not in prompts.source '{name}', whose columns are: id, text; "
        "prompts.from_preferences needs that column, or both chosen and rejected; did you mean prompts.column: text?"
    ]


def test_missing_column_of_preferences(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "p.jsonl", [{"chosen": "a b", "rejected": "a c"}])

    assert problems(tmp_path / "p.jsonl") == [
        "prompts.column 'prompt' is not in prompts.source 'p.jsonl', whose columns are: chosen, rejected; "
        "to take the shared beginning of chosen and rejected, set prompts.from_preferences: true"
    ]


def test_column_that_stands_twice(tmp_path: Path) -> None:
    path = tmp_path / "p.arrow"
    table = pa.table([["x"], ["y"]], names=["prompt", "prompt"])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)

    assert problems(path) == ["prompts.source 'p.arrow' has the column 'prompt' more than once"]
    assert problems(written(tmp_path / "p.csv", "prompt,prompt\nx,y\n")) == [
        "prompts.source 'p.csv' has the column 'prompt' more than once"
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.jsonl", ""), ("p.jsonl", "\n\n"), ("p.json", "[]"), ("p.csv", ""), ("p.csv", "prompt\n")],
)
def test_file_without_rows(tmp_path: Path, name: str, content: str) -> None:
    assert problems(written(tmp_path / name, content)) == [
        f"prompts.source '{name}' holds no rows; at least one prompt is needed"
    ]


def test_table_without_rows(tmp_path: Path) -> None:
    empty = pa.table({"prompt": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "p.parquet")

    assert problems(tmp_path / "p.parquet") == [
        "prompts.source 'p.parquet' holds no rows; at least one prompt is needed"
    ]


def test_folder_that_datasets_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    [problem] = problems(tmp_path / "empty")
    assert problem.startswith(
        "prompts.source 'empty' is a folder that `datasets` cannot read (prompts.split 'train'): "
    )
    assert "doesn't contain any data files" in problem

    write_folder_of_jsonl(tmp_path / "folder", [{"prompt": "x"}])
    assert problems(tmp_path / "folder", split="dev") == [
        "prompts.source 'folder' is a folder that `datasets` cannot read (prompts.split 'dev'): "
        "Unknown split \"dev\". Should be one of ['train', 'test']."
    ]
    written(tmp_path / "folder" / "train.jsonl", '{"prompt": "x"}\n{"prompt":')
    assert "JSON parse error" in problems(tmp_path / "folder")[0]


def test_saved_datasets_that_cannot_be_read(tmp_path: Path) -> None:
    write_saved_dict(tmp_path / "saved_dict", [{"prompt": "x"}])
    assert problems(tmp_path / "saved_dict", split="dev") == [
        "prompts.split is 'dev', but prompts.source 'saved_dict' has the splits test, train"
    ]

    write_saved(tmp_path / "saved", [{"prompt": "x" * 1000}])
    [data] = (tmp_path / "saved").glob("*.arrow")
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    assert problems(tmp_path / "saved")[0].startswith("prompts.source 'saved' ")


def test_knobs_that_a_source_would_ignore(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "x"}])
    write_saved(tmp_path / "saved", [{"prompt": "x"}])

    assert problems(tmp_path / "p.jsonl", subset="easy") == [
        "prompts.subset is 'easy', but prompts.source 'p.jsonl' is a file, which has no subsets; "
        "leave prompts.subset out"
    ]
    assert problems(tmp_path / "p.jsonl", split="test") == [
        "prompts.split is 'test', but prompts.source 'p.jsonl' is a file; leave prompts.split out"
    ]
    assert problems(tmp_path / "saved", subset="easy")[0].endswith("leave prompts.subset out")
    assert problems(tmp_path / "saved", split="test") == [
        "prompts.split is 'test', but prompts.source 'saved' is a saved dataset of one split; leave prompts.split out"
    ]


def test_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "x"}])

    def refuse(*_: Any, **__: Any) -> None:  # root may read everything, so chmod would not do
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)

    assert problems(tmp_path / "p.jsonl") == ["prompts.source 'p.jsonl' cannot be read: [Errno 13] Permission denied"]
