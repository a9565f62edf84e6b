"""Small prompt files as people bring them, each with the outcome that is right, stated by hand."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Brought:
    """A file, and what it should become: ``entries`` with ``notes``, or one refusal that holds ``refused``."""

    name: str
    data: bytes
    entries: Sequence[Any] = ()
    notes: Sequence[str] = ()
    """A part of each note, in order."""
    refused: str = ""
    knobs: dict[str, Any] = field(default_factory=dict)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def lines(*rows: Any) -> bytes:
    """JSONL of objects; a row that is none is a cell of the column prompt."""
    objects = [row if isinstance(row, dict) and "role" not in row else {"prompt": row} for row in rows]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in objects).encode()


def texts(data: str) -> bytes:
    return data.encode()


def parquet(**columns: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


ASKED = [[user("Is it far?")], [user("Is it near?")]]
AS_JSON = [json.dumps(chat) for chat in ASKED]
CELLS = [cell.replace('"', '""') for cell in AS_JSON]
READ_AS_CHATS = "2 texts of prompt are chats written as JSON, and read as chats"
SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
        {"from": "observation", "value": "42"},
        {"from": "human", "value": "And?"},
    ]
}

CHAT_TEXTS = [
    Brought("json.jsonl", lines(*AS_JSON), ASKED, [READ_AS_CHATS]),
    Brought("json.csv", texts(f'prompt,n\n"{CELLS[0]}",1\n"{CELLS[1]}",2\n'), ASKED, [READ_AS_CHATS]),
    Brought("json.tsv", texts(f'prompt\tn\n"{CELLS[0]}"\t1\n"{CELLS[1]}"\t2\n'), ASKED, [READ_AS_CHATS]),
    Brought("json.parquet", parquet(prompt=AS_JSON), ASKED, [READ_AS_CHATS]),
    Brought("json.txt", texts("\n".join(AS_JSON)), ASKED, ["each line of a .txt file is a prompt", READ_AS_CHATS]),
    Brought("indented.jsonl", lines(json.dumps(ASKED[0], indent=2)), ASKED[:1], ["1 text of prompt are chats"]),
    Brought(
        "sharegpt_text.csv",
        texts('prompt\n"[{""from"": ""human"", ""value"": ""Hi""}]"\n'),
        [[user("Hi")]],
        ["written as JSON", "1 prompt has messages of 'human', which are read as of 'user'"],
    ),
    Brought(
        "wrapped.jsonl", lines(json.dumps({"messages": ASKED[0]})), ASKED[:1], ["1 text of prompt are chats written"]
    ),
    Brought(
        "some.jsonl",
        lines("Is it far?", AS_JSON[1], "Is it new?"),
        refused='holds in prompt 1 chat written as JSON (line 2: \'[{"role": "user", "content": "Is it near?"}]\') '
        "among 2 texts (line 1: 'Is it far?'); make all of them chats or none. The smaller part: line 2",
    ),
    Brought("python.csv", texts(f'prompt\n"{ASKED[0]}"\n'), refused="1 of 1 text that are chats in Python's notation"),
    Brought("python.jsonl", lines(str(ASKED[0]), "Is it near?"), refused="1 of 2 texts that are chats in Python's"),
    Brought(
        "numpy.csv",
        texts("prompt\n\"[{'content': 'Hi', 'role': 'user'}\n {'content': 'Ho', 'role': 'assistant'}]\"\n"),
        refused="write them as JSON: json.dumps(messages)",
    ),
    Brought("cut.jsonl", lines(AS_JSON[0][:-4]), refused="begin as a chat in JSON does, but are not JSON"),
    Brought("one.csv", texts('prompt\n"{""role"": ""user"", ""content"": ""Hi""}"\n'), refused="put the message into"),
    Brought("list.jsonl", lines("[1, 2] is a list", '{"a": 1}', "[]"), ["[1, 2] is a list", '{"a": 1}', "[]"]),
    Brought("asks.jsonl", lines(f"{AS_JSON[0]} is which format?"), [f"{AS_JSON[0]} is which format?"]),
    Brought(
        "pairs.csv",
        texts(
            "chosen,rejected\n"
            '"[{""role"":""user"",""content"":""Hi""},{""role"":""assistant"",""content"":""a""}]",'
            '"[{""role"":""user"",""content"":""Hi""},{""role"":""assistant"",""content"":""b""}]"\n'
        ),
        [[user("Hi")]],
        ["1 text of chosen", "1 text of rejected", "prompts are what chosen and rejected share"],
        knobs={"from_preferences": True},
    ),
]

LAYOUTS = [
    Brought(
        "sharegpt.jsonl",
        lines(SHAREGPT),
        [
            [
                {"role": "system", "content": "Be brief."},
                user("Hi"),
                answer("Hello"),
                {"role": "tool", "content": "42"},
                user("And?"),
            ]
        ],
        ["'human', which are read as of 'user'", "'gpt', which are read as of 'assistant'", "'observation'"],
        knobs={"column": "conversations"},
    ),
    Brought(
        "from_usual_roles.jsonl",
        lines([{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Ho"}, {"from": "user", "value": "?"}]),
        [[user("Hi"), answer("Ho"), user("?")]],
    ),
    Brought("mixed_keys.jsonl", lines([{"role": "user", "value": "Hi"}]), [[user("Hi")]]),
    Brought(
        "capitals.jsonl", lines([{"role": "User", "content": "Hi"}]), [[user("Hi")]], ["'User', which are read as"]
    ),
    Brought("unknown_from.jsonl", lines([{"from": "narrator", "value": "Hi"}]), refused="prompt[0] is from 'narrator'"),
    Brought("call.jsonl", lines([{"from": "function_call", "value": "{}"}]), refused="is from 'function_call'"),
    Brought(
        "sharegpt_answered.jsonl",
        lines({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}),
        refused="ends with the assistant message 'Hello'",
        knobs={"column": "conversations"},
    ),
    Brought(
        "sharegpt_cut.jsonl",
        lines({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}),
        [[user("Hi")]],
        ["read as of 'user'", "read as of 'assistant'", "1 prompt ends with the assistant's answer, which is cut off"],
        knobs={"column": "conversations", "last_answer": "cut"},
    ),
    Brought("nothing_left.jsonl", lines([answer("Hello")]), refused="must not be empty", knobs={"last_answer": "cut"}),
    Brought(
        "parts.jsonl",
        lines([{"role": "user", "content": [{"type": "text", "text": "Is it"}, {"type": "text", "text": " far?"}]}]),
        ASKED[:1],
        ["1 prompt holds content in parts, whose texts are joined without a separator"],
    ),
    Brought(
        "image.jsonl",
        lines([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]),
        refused="holds a part of the type 'image'",
    ),
    Brought(
        "developer.jsonl",
        lines([{"role": "developer", "content": "Be brief."}, user("Hi")]),
        [[{"role": "developer", "content": "Be brief."}, user("Hi")]],
        ["the role 'developer', which goes to the chat template as it stands"],
    ),
    Brought(
        "by_columns.jsonl",
        lines({"messages": {"role": ["user", "assistant", "user"], "content": ["Hi", "Ho", "And?"]}}),
        [[user("Hi"), answer("Ho"), user("And?")]],
        knobs={"column": "messages"},
    ),
    Brought("wrapped.jsonl", lines({"input": {"messages": ASKED[0]}}), ASKED[:1], knobs={"column": "input"}),
    Brought(
        "system_only.jsonl",
        lines([{"role": "system", "content": "Be brief."}]),
        [[{"role": "system", "content": "Be brief."}]],
        ["1 prompt has no message of the user"],
    ),
    Brought(
        "dolly.jsonl",
        lines({"instruction": "Sum up.", "context": "Long.", "system": "Be brief."}),
        ["Sum up."],
        ["the column 'context' beside it", "the column 'system' beside it"],
        knobs={"column": "instruction"},
    ),
    Brought("message.jsonl", lines({"prompt": user("Hi")}), refused="put the message into a list"),
    Brought("null.jsonl", lines([{"role": "assistant", "content": None}, user("Hi")]), refused="both of them texts"),
    Brought(
        "calls.jsonl",
        lines([user("2+2?"), {"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}, user("And?")]),
        refused="prompt[1] has tool_calls, which is not passed to chat templates",
    ),
    Brought("no_calls.jsonl", lines([{**user("Hi"), "tool_calls": [], "name": None}]), [[user("Hi")]]),
    Brought(
        "keys.jsonl",
        lines([user("2+2?"), {"role": "tool", "content": "4", "tool_call_id": "x"}]),
        [[user("2+2?"), {"role": "tool", "content": "4"}]],
        ["1 prompt has messages with the key 'tool_call_id', which is not used"],
    ),
    Brought(
        "input_ids.jsonl", lines({"input_ids": [3, 4]}), refused="a list of token ids", knobs={"column": "input_ids"}
    ),
    Brought("strings.jsonl", lines(["Hi", "Ho"]), refused="prompt[0] is 'Hi'; a message is {role, content}"),
    Brought(
        "alpaca.jsonl",
        lines({"instruction": "Sort it.", "input": "3 1 2", "output": "1 2 3"}),
        ["Sort it."],
        ["the column 'input' beside it is not part of the prompt, and is not used"],
        knobs={"column": "instruction"},
    ),
    Brought(
        "mixed.jsonl", lines("Hi", ASKED[0]), ["Hi", ASKED[0]], ["1 prompt are texts (line 1) and 1 chats (line 2)"]
    ),
    Brought("invisible.jsonl", lines("\u200b\ufeff"), refused="must have a character that can be seen"),
    Brought(
        "struct.parquet",
        parquet(prompt=pa.array([[{**user("Is it far?"), "name": None}], [{**user("Is it near?"), "name": None}]])),
        ASKED,
    ),
    Brought(
        "both_keys.parquet",
        parquet(prompt=pa.array([[{"role": None, "content": None, "from": "human", "value": "Is it far?"}]])),
        ASKED[:1],
        ["'human'"],
    ),
]

CAFE = "Is the café far?"
ONE = json.dumps({"prompt": CAFE}, ensure_ascii=False)
TWO = f"{ONE}\n{ONE.replace('far', 'near')}\n"
BOTH = [CAFE, CAFE.replace("far", "near")]
FILES = [
    Brought("utf16.jsonl", TWO.encode("utf-16"), BOTH, ["its byte order mark says UTF-16"]),
    Brought("utf16.csv", f"prompt\n{CAFE}\n".encode("utf-16"), [CAFE], ["its byte order mark says UTF-16"]),
    Brought("utf16_unmarked.jsonl", TWO.encode("utf-16-le"), refused="looks like UTF-16 without a byte order mark"),
    Brought("cp1252.jsonl", ONE.encode("cp1252"), refused="line 1 is not UTF-8 text (byte 22); save the file as UTF-8"),
    Brought("cp1252.csv", f"prompt\n{CAFE}\n".encode("cp1252"), refused="save it as UTF-8"),
    Brought("bom_crlf.jsonl", ("\ufeff" + TWO.replace("\n", "\r\n")).encode(), BOTH),
    Brought("cr.jsonl", TWO.replace("\n", "\r").encode(), BOTH),
    Brought("cr.csv", f"prompt\r{BOTH[0]}\r{BOTH[1]}\r".encode(), BOTH),
    Brought("u2028.jsonl", lines("a\u2028b\u0085c"), ["a\u2028b\u0085c"], ["1 prompt holds control characters"]),
    Brought("u2028.txt", texts("a\u2028b\nc"), ["a\u2028b", "c"], ["2 prompts"]),
    Brought(
        "nul.jsonl", b'{"prompt": "a\\u0000b"}\n', ["a\0b"], ["1 prompt holds control characters (line 1: 'a\\x00b')"]
    ),
    Brought("p.jsonl.gz", gzip.compress(TWO.encode()), BOTH),
    Brought("p.csv.gz", gzip.compress(f"prompt\n{CAFE}\n".encode()), [CAFE]),
    Brought("cut.jsonl.gz", gzip.compress(TWO.encode())[:-12], refused="cannot be read: Compressed file ended before"),
    Brought("no.jsonl.gz", b"x" * 40, refused="cannot be read: Not a gzipped file"),
    Brought("p.jsonl.zst", b"x", refused="unpack it first"),
    Brought("p.parquet.gz", b"x", refused="unpack it first"),
    Brought("p.xlsx", b"x", refused="export the sheet as CSV"),
    Brought(
        "semicolon.csv", texts("prompt;n\nIs it far, or near?;1\n"), ["Is it far, or near?"], ["are separated by ';'"]
    ),
    Brought("tab.csv", texts("n\tprompt\n1\tIs it far, or near?\n"), ["Is it far, or near?"], [r"separated by '\t'"]),
    Brought("sep.csv", texts("sep=;\r\nprompt;n\r\nHi;1\r\n"), ["Hi"], ["separated by ';'"]),
    Brought("p.tsv", texts('prompt\tn\n"Is it ""far""?"\t1\n'), ['Is it "far"?']),
    Brought("comma.tsv", texts("prompt,n\nHi,1\n"), ["Hi"], ["separated by ','"]),
    Brought("lone.csv", texts("prompt\nIs it far; or near?\n"), ["Is it far; or near?"]),
    Brought(
        "p.txt",
        texts("\ufeffIs it far?\r\n\r\n  Is it near?\r\n"),
        ["Is it far?", "  Is it near?"],
        ["each line of a .txt file is a prompt: 2 prompts and 1 empty line left out", "begins with white space"],
    ),
    Brought("any_column.txt", texts("Hi\n"), ["Hi"], ["each line"], knobs={"column": "text"}),
    Brought("jsonl.txt", texts('{"prompt": "Hi"}\n'), refused="line 1 is a JSON object"),
    Brought("empty.txt", texts("\n\n"), refused="holds no rows"),
    Brought("columns.txt", texts("Hi\n"), refused="prompts.columns names 'answer'", knobs={"columns": ["answer"]}),
    Brought("data.json", texts('{"version": 1, "data": [{"prompt": "Hi"}]}'), ["Hi"], ["the list under 'data'"]),
    Brought("lists.json", texts('{"a": [{"prompt": "x"}], "b": [{"prompt": "y"}]}'), refused="several, under 'a', 'b'"),
    Brought("frame.json", texts('{"prompt": {"0": "Hi"}}'), refused="pandas: orient='records'"),
    Brought("pretty.jsonl", texts('[\n  {"prompt": "Hi"}\n]\n'), refused="a file of one JSON list is named .json"),
    Brought("large.parquet", parquet(prompt=pa.array(["Hi"], pa.large_string()).dictionary_encode()), ["Hi"]),
    Brought("view.parquet", parquet(prompt=pa.array(["Hi"], pa.string()), n=pa.nulls(1)), ["Hi"]),
    Brought("bytes.parquet", parquet(prompt=pa.array([b"Hi"])), refused="decode the column to text first"),
    Brought("nulls.parquet", parquet(prompt=pa.nulls(1)), refused="prompt is null or missing"),
    Brought("no_header.csv", texts("Is it very far from here?\nNo\n"), refused="write a line prompt above it"),
    Brought("twice.csv", texts("prompt,prompt\na,b\n"), refused="has the column 'prompt' more than once"),
    Brought("header_only.csv", texts("prompt;n\n"), refused="holds no rows"),
]

COLUMNS = [
    Brought("case.csv", texts("Prompt,n\na,1\n"), refused="did you mean prompts.column: Prompt?"),
    Brought("blank.csv", texts("n, prompt\n1,a\n"), refused="did you mean prompts.column: ' prompt'?"),
    Brought("plural.jsonl", lines({"prompts": "a"}), refused="did you mean prompts.column: prompts?"),
    Brought(
        "typo.jsonl", lines({"question": "a"}), refused="mean prompts.column: question?", knobs={"column": "qestion"}
    ),
    Brought("usual.jsonl", lines({"id": 1, "messages": ASKED[0]}), refused="did you mean prompts.column: messages?"),
    Brought("unlike.jsonl", lines({"id": 1, "body": "a"}), refused="whose columns are: id, body"),
    Brought(
        "more.jsonl", lines({"prompt": "a", "Answer": 1}), refused="did you mean Answer?", knobs={"columns": ["answer"]}
    ),
    Brought(
        "pair.jsonl", lines({"chosen": ASKED[0], "rejected": ASKED[1]}), refused="set prompts.from_preferences: true"
    ),
]

ODDITIES = [
    Brought(
        "answered.jsonl",
        lines("\n\nHuman: Hi\n\nAssistant: Hello", "\n\nHuman: Hi\n\nAssistant:"),
        ["\n\nHuman: Hi\n\nAssistant: Hello", "\n\nHuman: Hi\n\nAssistant:"],
        ["1 prompt holds text behind the mark that opens their last answer"],
    ),
    Brought("few_shot.jsonl", lines("Q: 1+1\nA: 2\nQ: 2+2\nA:"), ["Q: 1+1\nA: 2\nQ: 2+2\nA:"]),
    Brought("blank.jsonl", lines("Is it ", "Is it"), ["Is it ", "Is it"], ["1 prompt ends with a blank"]),
    Brought(
        "breaks.jsonl", lines("a\n", "b"), ["a\n", "b"], ["1 prompt ends with a line break, and the others do not"]
    ),
    Brought("all_breaks.jsonl", lines("a\n", "b\n"), ["a\n", "b\n"]),
    Brought("indent.jsonl", lines(" a", "b"), [" a", "b"], ["1 prompt begins with white space"]),
    Brought(
        "na.csv",
        texts("prompt\nNA\nnull\nNone\nnan\nNaples\n"),
        ["NA", "null", "None", "nan", "Naples"],
        ["4 prompts are the word of a missing value (line 2: 'NA')"],
    ),
    Brought(
        "repeats.jsonl",
        lines("a", "b", "a", "a"),
        ["a", "b", "a", "a"],
        ["1 prompt stands more than once, 2 rows too many (line 1 and line 3: 'a')"],
    ),
    Brought("chat_repeats.jsonl", lines(ASKED[0], ASKED[0]), [ASKED[0], ASKED[0]], ["1 prompt stands more than once"]),
    Brought("html.jsonl", lines("a &amp; b <br>"), ["a &amp; b <br>"]),
    Brought("long.jsonl", lines("x" * 300_000), ["x" * 300_000]),
]
