"""The pages that Prefect shows: what a model writes cannot become a link, an image, HTML or another table row."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from flows.markdown import LONGEST_TEXT, code, edges, escaped, evaluation_page, result_page, run_page, table

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![pixel](http://evil.example/p.png)",
    "see http://evil.example and www.evil.example",
    "<http://evil.example>",
    "a | b | c\n| d |",
    "# heading\n\n- list\n> quote",
    "`code` **bold** _em_ ~~gone~~",
    "&lt;b&gt; &#106;avascript",
    "\\` \\| \\[x](y)",
    "$$x$$ :smile: ^1^",
    "```\nfence\n```",
]
METRICS = {
    "objective/scores": 1.25,
    "objective/kl": 0.5,
    "kl/beta": 0.15,
    "rollout/response_len": 12.0,
    "time/iteration_s": 3.5,
}


def parsed(markdown: str) -> list[Any]:
    """Every token, inline ones too, as a renderer that knows links, tables and strikethrough has them."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(markdown)
    return [each for token in tokens for each in (token, *(token.children or ()))]


def texts(markdown: str) -> str:
    return "".join(token.content for token in parsed(markdown) if token.type in ("text", "text_special"))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_text(text: str) -> None:
    page = table(("a", "b"), [(escaped(text), "end")])
    kinds = {token.type for token in parsed(page)}
    assert kinds <= {
        "table_open", "table_close", "thead_open", "thead_close", "tbody_open", "tbody_close", "tr_open", "tr_close",
        "th_open", "th_close", "td_open", "td_close", "inline", "text", "text_special",
    }  # fmt: skip
    assert sum(token.type == "td_open" for token in parsed(page)) == 2, "one row of two cells"
    assert "http://" not in page
    assert "www." not in page, "nothing that a renderer makes a link of by itself"


@settings(deadline=None)
@given(st.text(max_size=100))
def test_any_text_reads_as_it_is_and_stays_in_its_cell(text: str) -> None:
    page = table(("a", "b"), [(escaped(text), "end")])
    found = [token for token in parsed(page) if token.type == "inline"]
    assert len(found) == 4
    shown = "".join(child.content for child in found[2].children or ())
    visible = [c for c in text if c.isprintable() and not c.isspace()]
    assert [c for c in shown if not c.isspace() and c != "⏎"] == [c for c in visible if c != "⏎"]


def test_long_texts_are_cut_and_lines_joined() -> None:
    assert texts(escaped("x" * 1000)) == "x" * (LONGEST_TEXT - 1) + "…"
    assert escaped("a\nb\x1b[31m\u202ec") == "a ⏎ b \\[31m c"


def test_a_path_is_code_unless_it_would_end_it() -> None:
    assert code("/runs/a b") == "`/runs/a b`"
    assert code("/runs/`x|") == "\\/runs\\/\\`x\\|"


def test_the_page_of_a_run() -> None:
    sample = {"prompt_text": "The film", "response_text": "was <b>fine</b>", "score": 1.5, "kl": 0.25}
    recent = {i: {**METRICS, "objective/kl": float(i)} for i in (3, 4, 5)}
    page = run_page(["**6 of 9**", "folder `x`"], recent, [sample], ["iteration 5: KL was 5"])
    assert "| iteration | score | KL | β | length | seconds |" in page
    assert "| oldest → newest | ▁▁▁ | ▁▅█ |" in page.replace("▄", "▅")
    rows = [line for line in page.splitlines() if line.startswith(("| 3", "| 4", "| 5"))]
    assert rows == [f"| {i} | 1.250 | {i}.00 | 0.1500 | 12.0 | 3.50 |" for i in (5, 4, 3)], "the newest first"
    assert "| 1.50 | 0.25 | The film | was \\<b\\>fine\\<\\/b\\> |" in page
    assert "Responses of iteration 5" in page
    assert "**Guards** · iteration 5\\: KL was 5" in page
    assert run_page(["nothing yet"], {}, [], []) == "nothing yet\n"


def test_the_page_of_a_result() -> None:
    sample = {"prompt": "p|q", "before": "b", "score_before": -1.0, "after": "a", "score_after": 2.0}
    last = {**METRICS, "objective/scores": 3.25}
    page = result_page(["done"], [METRICS, METRICS], [last, last], [sample])
    assert "| score | 1.250 | 3.250 | +2.000 |" in page
    assert "(means of 2)" in page
    assert page.endswith("| before | -1.00 | b | p\\|q |\n| after | 2.00 | a |  |\n"), "nothing long before a score"


def test_the_page_of_an_evaluation_has_the_trained_policies_alone() -> None:
    numbers = {name: {"mean": 0.5, "low": 0.4, "high": 0.7} for name in ("score", "gain", "kl", "win_rate")}
    numbers |= {"share_of_attainable": None, "response_len": {"mean": 9.0, "low": 8.0, "high": 9.5}, "blend": 1.0}
    policies = {"000003@0.5": {**numbers, "blend": 0.5}, "000003": numbers}
    summary = {"policies": policies, "prompts": {"num_prompts": 6}, "samples": 4}
    sample = {"prompt": "p", "ref_response": "r", "ref_score": 0.5, "response": "x", "score": 1.5}
    page = evaluation_page("runs/a/evaluations/b", summary, [sample])
    assert "| 000003 | 0.500 ± 0.200 | 0.500 ± 0.200 | 0.500 ± 0.200 | 0.500 ± 0.200 | – | 9.000 ± 1.000 |" in page
    assert "@0.5" not in page
    assert page.endswith("| reference | 0.50 | r | p |\n| policy | 1.50 | x |  |\n")


@pytest.mark.parametrize(
    ("finished", "first", "last"),
    [(0, [], []), (1, [0], [0]), (3, [0], [2]), (40, [0, 1, 2, 3, 4], [35, 36, 37, 38, 39])],
)
def test_edges(finished: int, first: list[int], last: list[int]) -> None:
    assert [list(of) for of in edges(finished)] == [first, last]
