"""The prompt of a preference pair."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from rlhf_core.contracts.config import PromptsConfig
from rlhf_core.contracts.config_io import digest_json
from rlhf_core.contracts.errors import UserError
from rlhf_core.prompts.preferences import shared_messages, shared_prompt, shared_text
from rlhf_core.prompts.sources import PromptSet, load_prompt_set

ASSISTANT = "\n\nAssistant:"
SAME = "chosen and rejected are the same, so no prompt can be told from them; drop the pair"
NOTHING = (
    "chosen and rejected share no beginning that could be a prompt; drop the pair, or give the prompts a "
    "column of their own and name it in prompts.column"
)

# Few letters, so that two drawn texts often share a beginning.
texts = st.lists(st.sampled_from(["a", "b", "9", " ", "\n", ".", "é", "e\u0301", "你", ASSISTANT])).map("".join)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.sampled_from("ab")}
)
chats = st.lists(messages, max_size=5)


def turns(*contents: str) -> list[dict[str, str]]:
    """Messages "u:..." of the user, "a:..." of the assistant, "s:..." of the system."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": roles[c[0]], "content": c[2:]} for c in contents]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        # the marker of HH
        (
            "\n\nHuman: Hi\n\nAssistant: Hello",
            "\n\nHuman: Hi\n\nAssistant: Hey",
            "\n\nHuman: Hi\n\nAssistant:",
        ),
        ("\n\nHuman: Hi\n\nAssistant: No.", "\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant:"),
        (
            "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: D 1",
            "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: D 2",
            "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant:",
        ),
        (
            "\n\nHuman: A\n\nAssistant: B\n\nAss 1",
            "\n\nHuman: A\n\nAssistant: B\n\nAss 2",
            "\n\nHuman: A\n\nAssistant:",
        ),
        # no whole marker in what is shared
        ("Hi\n\nAssistant; yes", "Hi\n\nAssistant: no", "Hi\n\nAssistant"),
        # the last whole word
        ("2 + 2 is four", "2 + 2 is five", "2 + 2 is"),
        ("2 + 2 is 41", "2 + 2 is 4", "2 + 2 is"),
        ("2 + 2 is 4", "2 + 2 is 4, of course", "2 + 2 is 4"),
        ("What?\nYes", "What?\nNo", "What?"),
        ("What?", "What? No", "What?"),
        ("What?Yes", "What?No", "What?"),
        ("the cat", "the dog", "the"),
        ("the cat", "the", "the"),
        ("the cat", "then", ""),
        ("un café", "un cafe", "un"),
        ("un cafe\u0301", "un cafe", "un"),
        ("un cafe\u0301s", "un cafe\u0301!", "un"),
        ("  indented a", "  indented b", "  indented"),
        ("yes", "no", ""),
        (" yes", " no", ""),
        ("", "no", ""),
    ],
)
def test_shared_text(chosen: str, rejected: str, prompt: str) -> None:
    assert shared_text(chosen, rejected) == prompt
    assert shared_text(rejected, chosen) == prompt


@given(texts, texts, texts)
@example("", "a", "a b")
def test_shared_text_is_a_prefix_of_both_at_a_boundary(start: str, ours: str, theirs: str) -> None:
    chosen, rejected = start + ours, start + theirs
    prompt = shared_text(chosen, rejected)

    assert chosen.startswith(prompt)
    assert rejected.startswith(prompt)
    assert shared_text(rejected, chosen) == prompt
    if ASSISTANT in start:
        assert prompt.endswith(ASSISTANT)
        assert len(prompt) >= start.index(ASSISTANT) + len(ASSISTANT)
    elif not prompt.endswith(ASSISTANT):
        assert prompt == prompt.rstrip()


@given(texts, texts, texts)
def test_shared_text_cuts_no_word(start: str, ours: str, theirs: str) -> None:
    chosen, rejected = start + ours, start + theirs
    prompt = shared_text(chosen, rejected)

    for text in (chosen, rejected):
        around = text[len(prompt) - 1 : len(prompt) + 1] if prompt else ""
        assert re.fullmatch(r"[^\W_]{2}|[^\W_]\u0301", around) is None, around


@given(texts, texts, texts)
def test_shared_text_keeps_a_whole_question(question: str, ours: str, theirs: str) -> None:
    assume(ASSISTANT not in question + ours + theirs and question.strip())
    question = question.strip()

    prompt = shared_text(f"{question}\n1{ours}", f"{question}\n2{theirs}")

    assert prompt == question


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (turns("u:Hi", "a:Hello"), turns("u:Hi", "a:Hey"), turns("u:Hi")),
        (turns("s:Be", "u:Hi", "a:1"), turns("s:Be", "u:Hi", "a:2"), turns("s:Be", "u:Hi")),
        (turns("u:A", "a:B", "u:C", "a:1"), turns("u:A", "a:B", "u:C", "a:2"), turns("u:A", "a:B", "u:C")),
        (turns("u:A", "a:B", "u:1", "a:C"), turns("u:A", "a:B", "u:2", "a:C"), turns("u:A")),
        (turns("u:A", "a:B"), turns("u:A", "a:B", "u:C", "a:D"), turns("u:A")),
        (turns("u:A", "a:B", "a:C", "u:1"), turns("u:A", "a:B", "a:C", "u:2"), turns("u:A")),
        (turns("u:A"), turns("s:A"), []),
        (turns("a:Hello", "u:1"), turns("a:Hello", "u:2"), []),
        ([], turns("u:A"), []),
    ],
)
def test_shared_messages(
    chosen: list[dict[str, str]], rejected: list[dict[str, str]], prompt: list[dict[str, str]]
) -> None:
    assert shared_messages(chosen, rejected) == prompt
    assert shared_messages(rejected, chosen) == prompt


@given(chats, chats, chats)
def test_shared_messages_begin_both_and_end_with_a_question(
    start: list[dict[str, str]], ours: list[dict[str, str]], theirs: list[dict[str, str]]
) -> None:
    chosen, rejected = start + ours, start + theirs
    prompt = shared_messages(chosen, rejected)

    assert chosen[: len(prompt)] == rejected[: len(prompt)] == prompt
    assert not prompt or prompt[-1]["role"] != "assistant"
    rest = zip(chosen[len(prompt) :], rejected[len(prompt) :], strict=False)
    for mine, other in rest:  # nothing shared is left out but assistant messages
        if mine != other:
            break
        assert mine["role"] == "assistant"


@pytest.mark.parametrize(
    ("chosen", "rejected", "sentence"),
    [
        ("a", "a", SAME),
        (turns("u:Hi"), turns("u:Hi"), SAME),
        (
            "a",
            turns("u:a"),
            "one of chosen and rejected is a text, the other a chat; both must be of one kind",
        ),
        ("yes", "no", NOTHING),
        (turns("a:yes"), turns("a:no"), NOTHING),
    ],
)
def test_pair_without_a_prompt(chosen: Any, rejected: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=r"chosen and rejected") as caught:
        shared_prompt(chosen, rejected)

    assert str(caught.value) == sentence


# Whole sources


def load(path: Path, rows: list[dict[str, Any]], **knobs: Any) -> PromptSet:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_prompt_set(PromptsConfig(source=str(path), from_preferences=True, **knobs))


def test_each_prompt_once_in_the_order_of_its_first_pair(tmp_path: Path) -> None:
    chat = turns("u:Hi")
    pairs: list[dict[str, Any]] = [
        {"rejected": "b: 2", "chosen": "b: 1"},
        {"chosen": "a: 1", "rejected": "a: 2"},
        {"chosen": "b: 3", "rejected": "b: 4"},
        {"chosen": chat + turns("a:1"), "rejected": chat + turns("a:2")},
        {"chosen": chat + turns("a:3"), "rejected": chat + turns("a:4")},
    ]

    found = load(tmp_path / "p.jsonl", pairs)

    assert found == PromptSet(["b:", "a:", chat], digest_json(["b:", "a:", chat]), 2, [{}, {}, {}])


def test_prompt_column_comes_first(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "same", "rejected": "same"}, {"prompt": "q"}, {"prompt": "p"}]

    assert load(tmp_path / "p.jsonl", rows) == PromptSet(["p", "q"], digest_json(["p", "q"]), 1, [{}, {}])
    assert list(load(tmp_path / "p.jsonl", [{"question": turns("u:q")}], column="question").entries) == [turns("u:q")]


def test_a_side_that_is_named_as_column_is_the_prompt(tmp_path: Path) -> None:
    found = load(tmp_path / "p.jsonl", [{"chosen": "a b", "rejected": "a c"}], column="chosen")

    assert list(found.entries) == ["a b"]


def test_pairs_of_parquet_in_any_order_of_columns(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"rejected": ["a c"], "n": [1], "chosen": ["a b"]}), tmp_path / "p.parquet")
    config = PromptsConfig(source=str(tmp_path / "p.parquet"), from_preferences=True)

    assert list(load_prompt_set(config).entries) == ["a"]


def test_bad_pairs_are_all_named(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"chosen": "a b", "rejected": "a c"},
        {"chosen": "a", "rejected": "a"},
        {"chosen": "a", "rejected": "b"},
        {"chosen": None, "rejected": "b"},
        {"chosen": "a", "rejected": ["b"]},
        {"chosen": turns("u: ", "a:1"), "rejected": turns("u: ", "a:2")},
    ]

    with pytest.raises(UserError) as caught:
        load(tmp_path / "p.jsonl", rows, bad_pairs="refuse")

    where = f"prompts.source '{tmp_path / 'p.jsonl'}', line"
    assert list(caught.value.problems) == [
        f"{where} 2: {SAME}",
        f"{where} 3: {NOTHING}",
        f"{where} 4: chosen is null or missing; a text or a list of {{role, content}} messages is needed",
        f"{where} 5: rejected[0] is 'b'; a message is {{role, content}}, both of them texts",
        f"{where} 6: the shared beginning ends with a message whose content is ' '; it needs text",
    ]
