"""The page and the picture of several runs: whole, self-contained, and deaf to what names and values say."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from chromium import chromium_tab, find_chromium
from made_runs import made_evaluation, made_run

from rlhf_core.comparing.comparison import Comparison, compare
from tasks.reports.comparison_figure import draw_comparison
from tasks.reports.comparison_page import charts_of, comparison_page

HOSTILE = "<script>alert(1)<|script> \"'& $\\frac{"
VOID = {"meta", "line", "path", "circle"}


@pytest.fixture
def compared(tmp_path: Path) -> Comparison:
    made_run(tmp_path / "plain", [0.0, 1.0, 2.0], [0.0, 0.5, 1.0])
    other = made_run(
        tmp_path / HOSTILE, [0.0, 3.0, 4.0, 5.0], changes=["kl.target=8", f"generation.stop=['{'<b>' * 2}']"],
        identity={"device": "<img src=x onerror=alert(1)>"},
    )  # fmt: skip
    made_evaluation(other, "a", score=1.9, kl=1.2)
    return compare([tmp_path / "plain", tmp_path / HOSTILE])


class Elements(HTMLParser):
    """Every element with its attributes, and whether each is closed."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_well_formed_and_asks_nobody_for_anything(compared: Comparison) -> None:
    page = comparison_page(compared).decode()
    elements = Elements()
    elements.feed(page)
    assert elements.open == []
    tags = {tag for tag, _ in elements.found}
    assert not tags & {"script", "img", "link", "iframe", "object"}
    attributes = [(name, value) for _, attrs in elements.found for name, value in attrs.items()]
    assert not [name for name, _ in attributes if name.startswith("on") or name in ("src", "href")]
    policy = next(attrs["content"] for tag, attrs in elements.found if attrs.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert HOSTILE in elements.text
    assert '["<b><b>"]' in elements.text
    assert "<img src=x onerror=alert(1)>" in elements.text


def test_the_page_has_what_the_terminal_has(compared: Comparison) -> None:
    page = comparison_page(compared).decode()
    for text in (
        "kl.target",
        "8.0",
        "3.000 ± 2.160",
        "evaluated: win rate",
        "target 8",
        "attainable",
        "device differs",
    ):
        assert text in page
    assert page.count("<svg") == 4
    assert 'class="standing stopped"' in page


def test_curves_are_the_runs_own_numbers(compared: Comparison) -> None:
    score, kl, beta, against = charts_of(compared)
    assert list(score.curves[0].faint) == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert list(score.curves[0].points) == [(0, 0.0), (1, 0.5), (2, 1.0)], "means with those before"
    assert [level for level, _, _ in kl.levels] == [2.0, 8.0]
    assert beta.from_zero
    assert [point for _, point, *_ in against.marks] == [(1.2, 1.9)]
    assert against.curves[0].tips[2] == "plain, iteration 2: score 1.000 at 0.50 nats"


def test_a_shared_target_is_one_line(tmp_path: Path) -> None:
    for name in ("a", "b"):
        made_run(tmp_path / name, [0.0, 1.0])
    _, kl, *_ = charts_of(compare([tmp_path / "a", tmp_path / "b"]))
    assert list(kl.levels) == [(2.0, "target 2", "")]


def test_the_picture_is_drawn_whatever_the_names_are(compared: Comparison) -> None:
    picture = draw_comparison(compared)
    assert picture.startswith(b"\x89PNG\r\n")
    assert len(picture) > 50_000


def test_many_runs_of_one_iteration_each(tmp_path: Path) -> None:
    paths = [tmp_path / f"_{i}" for i in range(11)]
    for i, path in enumerate(paths):
        made_run(path, [float(i)], changes=[f"seed={i}", "kl.controller=fixed"])
    compared = compare(paths)
    assert draw_comparison(compared).startswith(b"\x89PNG")
    assert comparison_page(compared).decode().count("<li ") == 11


def test_wide_tables_scroll_by_themselves_and_keep_their_labels(compared: Comparison) -> None:
    page = comparison_page(compared).decode()
    assert page.count('<div class="wide" tabindex="0"><table>') == page.count("<table>") > 0
    assert "thead th { position: sticky; top: 0;" in page
    assert "th:first-child { position: sticky; left: 0;" in page


@pytest.mark.browser
@pytest.mark.skipif(find_chromium() is None, reason="chromium is not installed: apt-get install chromium")
def test_in_a_browser_labels_and_names_stay_in_view(tmp_path: Path) -> None:
    paths = [tmp_path / f"a-run-with-quite-a-long-name-{i}" for i in range(12)]
    for i, path in enumerate(paths):
        policy = f"/models/of/somebody/far/away/policy-{i}"
        made_run(path, [float(i)], changes=[f"seed={i}", f"policy.model={policy}"])
    page = tmp_path / "compare.html"
    page.write_bytes(comparison_page(compare(paths)))
    left = "[...document.querySelectorAll('.wide')].map((w) => { w.scrollLeft = 400; w.scrollTop = 60; return w; })"
    seen = (
        f"JSON.stringify({left}.map((w) => {{ const box = w.getBoundingClientRect(); "
        "const label = w.querySelector('tbody tr:last-child th').getBoundingClientRect(); "
        "const name = w.querySelector('thead th:nth-child(3)').getBoundingClientRect(); "
        "return [w.scrollLeft, w.scrollWidth > w.clientWidth, label.left - box.left, name.top - box.top]; }))"
    )
    with chromium_tab() as tab:
        tab.look(width=900, height=420)
        tab.call("Page.navigate", url=page.as_uri())
        tab.wait_for("document.querySelectorAll('.wide').length === 2 && document.readyState === 'complete'")
        found = json.loads(tab.evaluate(seen))
        assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert len(found) == 2
    for scrolled, is_wide, label_left, name_top in found:
        assert is_wide
        assert scrolled > 0
        assert abs(label_left) < 2, "the label of a row stays at the left"
        assert abs(name_top) < 2, "the name of a run stays at the top"
