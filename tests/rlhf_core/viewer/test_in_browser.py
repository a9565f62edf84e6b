"""The page in a real browser: what a person does with it, and what a hostile text cannot."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import Tab, chromium_tab, find_chromium
from page_contents import ATTACKS, CHAT, decoded, evaluation, made_contents, with_texts

from rlhf_core.viewer.page import page_of

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="chromium is not installed: apt-get install chromium"),
]
PAIRS = [
    {"prompt": "The film", "before": " was dull.", "after": " was bright.", "score_before": -1.0, "score_after": 2.0},
    {"prompt": "How was it?", "prompt_text": "<system>Be brief.<user>How was it?", "before": "Dull.", "after": "Fun.",
     "score_before": -1.0, "score_after": 2.0},
]  # fmt: skip
CHOSEN = "document.querySelector('#detail-title').textContent"
ROWS = "[...document.querySelectorAll('#grid tr[data-row]')].map((r) => Number(r.dataset.row))"
FOCUSED = "document.activeElement.dataset.t"
TIP = "document.querySelector('#tip').hidden ? null : document.querySelector('#tip').textContent"
ORDER = [row for iteration in reversed(range(10)) for row in range(30 * iteration, 30 * iteration + 30)]
"""Of the rows of ``page``: the newest iteration first."""
FIRST = slice(ORDER[0] * 12, ORDER[0] * 12 + 12)
"""The tokens of the first of them."""
AT_ONCE_S = 1.5
"""A second, and some: a busy machine has small caches."""


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with chromium_tab() as tab:
        yield tab


@pytest.fixture(scope="module")
def contents() -> dict[str, Any]:
    return made_contents(300, 12) | {"before_after": PAIRS, "evaluation": evaluation()}


@pytest.fixture(scope="module")
def page(contents: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "view.html"
    path.write_bytes(page_of(contents))
    return path


@pytest.fixture
def fresh(tab: Tab, page: Path) -> Iterator[Tab]:
    """The page, loaded anew; whatever it complains of fails the test, and so does a request."""
    tab.look()
    tab.open(page)
    yield tab
    assert tab.complaints() == []
    assert tab.requests() == [page.as_uri()]


@pytest.fixture
def numbers(contents: dict[str, Any]) -> Callable[[str], np.ndarray]:
    return lambda name: decoded(contents["samples"]["numbers"][name])


def click(tab: Tab, selector: str) -> None:
    tab.evaluate(f"document.querySelector({json.dumps(selector)}).click()")


def fill(tab: Tab, selector: str, value: str) -> None:
    tab.evaluate(
        f"(() => {{ const i = document.querySelector({json.dumps(selector)}); i.value = {json.dumps(value)};"
        "i.dispatchEvent(new Event('input')); i.dispatchEvent(new Event('change')); })()"
    )


@pytest.mark.parametrize("name", ["score", "kl", "k3", "length", "rlhf_reward", "max_abs_advantage"])
def test_each_heading_sorts(fresh: Tab, numbers: Callable[[str], np.ndarray], name: str) -> None:
    click(fresh, f"th[data-column={name}] button")
    values = numbers(name)
    rows = fresh.evaluate(ROWS)
    assert rows == np.argsort(-values.astype(float), kind="stable")[: len(rows)].tolist()
    assert fresh.evaluate(f"document.querySelector('th[data-column={name}]').ariaSort") == "descending"
    click(fresh, f"th[data-column={name}] button")
    assert fresh.evaluate(ROWS) == np.argsort(values, kind="stable")[: len(rows)].tolist()
    assert fresh.evaluate("document.querySelectorAll('th[aria-sort]').length") == 1


def test_only_the_rows_in_sight_exist(fresh: Tab) -> None:
    assert len(fresh.evaluate(ROWS)) < 60
    fresh.evaluate("document.querySelector('#grid').scrollTop = 1e9")
    fresh.wait_for(f"{ROWS}.at(-1) === {ORDER[-1]}")
    assert len(fresh.evaluate(ROWS)) < 60
    assert fresh.evaluate("document.querySelector('#grid table').getAttribute('aria-rowcount')") == "301"


def test_filters(fresh: Tab, numbers: Callable[[str], np.ndarray]) -> None:
    def count() -> str:
        return fresh.evaluate("document.querySelector('#count').textContent")

    assert count() == "300 samples"
    fill(fresh, "#search", "PROMPT number 7")
    assert fresh.evaluate(ROWS) == [257, 207, 157, 107, 57, 7]
    fill(fresh, "#search", "")
    fill(fresh, "#iteration", "4")
    assert set(fresh.evaluate(ROWS)) <= set(range(120, 150))
    assert count() == "30 of 300 samples"
    fill(fresh, "#finish-reason", "length")
    assert count() == "15 of 300 samples"
    click(fresh, "#filters button[type=reset]")
    fresh.wait_for("document.querySelector('#count').textContent === '300 samples'")
    fill(fresh, "#score-low", "1")
    fill(fresh, "#kl-high", "0")
    expected = int(((numbers("score") >= 1) & (numbers("kl") <= 0)).sum())
    assert count() == f"{expected} of 300 samples"
    fill(fresh, "#score-low", "99")
    assert "No sample passes these filters." in fresh.evaluate("document.querySelector('#grid').textContent")


def test_keys_walk_through_samples_and_tokens(fresh: Tab, contents: dict[str, Any]) -> None:
    ids = [contents["samples"]["id"][row] for row in ORDER]
    assert fresh.evaluate(CHOSEN) == ids[0]
    fresh.press("j")
    fresh.press("j")
    fresh.press("k")
    assert fresh.evaluate(CHOSEN) == ids[1]
    fresh.evaluate("document.querySelector('#grid table').focus()")
    for key in ("ArrowDown", "ArrowDown", "ArrowUp"):
        fresh.press(key)
    assert fresh.evaluate(CHOSEN) == ids[2]
    fresh.press("End")
    assert fresh.evaluate(CHOSEN) == ids[299]
    active = "document.getElementById(document.querySelector('#grid table').getAttribute('aria-activedescendant'))"
    assert fresh.evaluate(f"{active}.dataset.row") == str(ORDER[299])
    box = "document.querySelector('#grid').getBoundingClientRect()"
    assert fresh.evaluate(f"{active}.getBoundingClientRect().bottom <= {box}.bottom")
    fresh.press("Enter")
    assert fresh.evaluate(FOCUSED) == "0"
    fresh.press("ArrowRight")
    assert fresh.evaluate(FOCUSED) == "1"
    fresh.press("End")
    assert fresh.evaluate(FOCUSED) == "11"
    fresh.press("ArrowUp")
    assert fresh.evaluate(CHOSEN) == ids[298]
    assert fresh.evaluate(FOCUSED) == "0", "the focus stays among the tokens"


def test_slash_searches_and_escape_leaves(fresh: Tab, contents: dict[str, Any]) -> None:
    fresh.press("/")
    assert fresh.evaluate("document.activeElement.id") == "search"
    for letter in "word7":
        fresh.press(letter)
    assert fresh.evaluate("document.activeElement.value") == "word7"
    fresh.press("j")
    assert fresh.evaluate(CHOSEN) == contents["samples"]["id"][ORDER[0]], "a letter that is typed is no command"
    fresh.press("Escape")
    assert fresh.evaluate("document.activeElement.id") != "search"


def test_the_question_mark_opens_the_help(fresh: Tab) -> None:
    fresh.press("?")
    assert fresh.evaluate("document.querySelector('#help').open")
    fresh.press("Escape")
    fresh.wait_for("!document.querySelector('#help').open")
    click(fresh, "#help-button")
    click(fresh, "#help-close")
    assert not fresh.evaluate("document.querySelector('#help').open")


def test_numbers_of_a_token_by_pointer_and_by_focus(fresh: Tab, contents: dict[str, Any]) -> None:
    tokens = contents["tokens"]
    logprob, reference, kl = (float(decoded(tokens[name])[FIRST][3]) for name in ("logprob", "ref_logprob", "kl"))
    expected = [f"{abs(v):.4f}" for v in (logprob, reference, kl, math.exp(logprob - reference))]
    fresh.hover("#tokens .token:nth-child(4)")
    fresh.wait_for("!document.querySelector('#tip').hidden")
    by_pointer = fresh.evaluate(TIP)
    assert all(number in by_pointer for number in expected)
    fresh.evaluate("document.querySelector('#tokens .token').focus()")
    for _ in range(3):
        fresh.press("ArrowRight")
    assert fresh.evaluate(TIP) == by_pointer
    read_out = fresh.evaluate("document.activeElement.ariaLabel")
    assert read_out.startswith("token 4, ␣word")
    assert all(f"{name} " in read_out for name in ("KL", "reward", "value", "advantage", "return", "entropy"))
    fresh.press("Escape")
    assert fresh.evaluate(TIP) is None


def test_the_table_of_tokens_has_the_same_numbers(fresh: Tab, contents: dict[str, Any]) -> None:
    click(fresh, ".token-table summary")
    fresh.wait_for("document.querySelector('.token-table tbody')")
    cells = fresh.evaluate(
        "[...document.querySelectorAll('.token-table tbody tr')].map((r) => r.children[4].textContent)"
    )
    expected = decoded(contents["tokens"]["kl"])[FIRST]
    assert [float(cell.replace("−", "-")) for cell in cells] == pytest.approx(expected.tolist(), abs=6e-5)


def test_the_colours_follow_the_chosen_measure(fresh: Tab, contents: dict[str, Any]) -> None:
    below = "[...document.querySelectorAll('#tokens .token')].map((t) => t.classList.contains('below'))"
    painted = "getComputedStyle(document.querySelector('#tokens .token:nth-child({})')).backgroundColor"
    for name in ("advantage", "reward", "kl"):
        click(fresh, f"input[name=measure][value={name}]")
        assert fresh.evaluate(below) == (decoded(contents["tokens"][name])[FIRST] < 0).tolist()
    signs = decoded(contents["tokens"]["kl"])[FIRST]
    strongest, weakest = int(np.abs(signs).argmax()) + 1, int(np.abs(signs).argmin()) + 1
    fresh.wait_for(f"{painted.format(strongest)} !== {painted.format(weakest)}")  # colours change in 120 ms
    fresh.press("c")
    assert fresh.evaluate("document.querySelector('input[name=measure]:checked').value") == "advantage"
    fresh.press("j")
    assert fresh.evaluate("document.querySelector('input[name=measure]:checked').value") == "advantage", "it stays"
    ratio = fresh.evaluate("[...document.querySelectorAll('input[name=measure]')].map((i) => i.value)")
    assert ratio == ["kl", "advantage", "reward", "ratio", "value", "entropy"]


def test_text_is_read_on_every_colour_in_light_and_dark(fresh: Tab) -> None:
    """WCAG AA: a contrast of 4.5 at least, on the strongest blue and the strongest orange."""
    for scheme, (hue, strength) in itertools.product(
        ("light", "dark"), itertools.product(("", "below"), ("0%", "100%"))
    ):
        fresh.look(scheme=scheme)
        fresh.evaluate(
            f"(() => {{ const t = document.querySelector('#tokens .token'); t.className = 'token {hue}';"
            f"t.style.transition = 'none'; t.style.setProperty('--strength', '{strength}'); }})()"
        )
        ratio = fresh.evaluate(
            """(() => {
              const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
              const light = (colour) => {
                canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
                const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
                  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
              };
              const style = getComputedStyle(document.querySelector("#tokens .token"));
              const [a, b] = [light(style.color), light(style.backgroundColor)].sort((x, y) => y - x);
              return (a + 0.05) / (b + 0.05);
            })()"""
        )
        assert ratio >= 4.5, (scheme, hue, strength)


def test_dark_as_the_system_has_it_and_by_the_button(fresh: Tab) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light = fresh.evaluate(background)
    fresh.look(scheme="dark")
    dark = fresh.evaluate(background)
    assert dark != light
    click(fresh, "#theme")
    assert (fresh.evaluate("document.documentElement.dataset.theme"), fresh.evaluate(background)) == ("light", light)
    fresh.press("t")
    fresh.look(scheme="light")
    assert (fresh.evaluate("document.documentElement.dataset.theme"), fresh.evaluate(background)) == ("dark", dark)


def test_the_address_names_the_sample(tab: Tab, page: Path, contents: dict[str, Any]) -> None:
    ids = contents["samples"]["id"]
    tab.look()
    tab.open(page, f"#{ids[217]}")
    assert tab.evaluate(CHOSEN) == ids[217]
    assert tab.evaluate("document.querySelector('tr[aria-selected=true]').dataset.row") == "217"
    tab.press("j")
    assert tab.evaluate("location.hash") == f"#{ids[218]}"
    tab.evaluate(f"location.hash = '#{ids[5]}'")
    tab.wait_for(f"{CHOSEN} === '{ids[5]}'")
    tab.evaluate("location.hash = '#i000099-p000001-s0'")
    tab.wait_for("!document.querySelector('#missing').hidden")
    assert "i000099-p000001-s0 is not among the samples" in tab.evaluate(
        "document.querySelector('#missing').textContent"
    )
    tab.evaluate("location.hash = '#%E0%A4%A'")
    tab.wait_for("document.querySelector('#missing').textContent.startsWith('%E0%A4%A')")
    assert tab.complaints() == []


def test_curves_are_drawn_and_tell_their_numbers(fresh: Tab, contents: dict[str, Any]) -> None:
    labels = fresh.evaluate("[...document.querySelectorAll('.plot')].map((p) => p.ariaLabel)")
    assert [label.split(".")[0] for label in labels] == [
        "Score",
        "KL to the reference",
        "KL coefficient β",
        "Score against KL",
    ]
    assert "target 2" in labels[1]
    assert fresh.evaluate("document.querySelectorAll('.line.target').length") == 1
    for kind, count in (
        ("attainable", 1),
        ("beyond", 1),
        ("blended", 1),
        ("evaluated", 2),
        ("best", 1),
        ("reference", 1),
    ):
        drawn = f"document.querySelectorAll('svg .{kind}').length"
        assert fresh.evaluate(drawn) == count, kind
    fresh.evaluate("document.querySelector('.plot').focus()")
    fresh.press("ArrowRight")
    fresh.press("End")
    assert fresh.evaluate(TIP).startswith("iteration 9score3.000")
    assert fresh.evaluate("document.querySelectorAll('.cursor[visibility=visible]').length") == 3, "in all three"
    fresh.press("Escape")
    assert fresh.evaluate(TIP) is None
    click(fresh, "#curves-table summary")
    fresh.wait_for("document.querySelectorAll('#curves-table tbody tr').length === 10")


def test_before_and_after_and_the_command(fresh: Tab, contents: dict[str, Any]) -> None:
    pair = fresh.evaluate("document.querySelector('.pair').innerText")
    assert [word in pair for word in ("The film", "was dull.", "was bright.", "−1.00", "2.00")] == [True] * 5
    command = fresh.evaluate("document.querySelector('.command code').textContent")
    assert command == f"rlhf inspect runs/made --sample {contents['samples']['id'][ORDER[0]]}"
    click(fresh, ".other:nth-child(2)")
    assert fresh.evaluate(CHOSEN) == contents["samples"]["id"][70], "of those with the same prompt"


def test_a_page_without_a_critic_an_evaluation_or_pairs(tab: Tab, tmp_path: Path) -> None:
    bare = made_contents(4, 3, num_iterations=1)
    bare["tokens"] |= {"value": None, "return": None}
    bare["run"] |= {"kl_target": None, "note": "The policy's tokenizer is not at hand."}
    path = tmp_path / "bare.html"
    path.write_bytes(page_of(bare))
    tab.open(path)
    assert tab.evaluate("document.querySelector('input[value=value]')") is None
    assert tab.evaluate("document.querySelector('#before-after').hidden")
    assert "tokenizer" in tab.evaluate("document.querySelector('#run-note').innerText")
    assert tab.evaluate("document.querySelectorAll('.line.target').length") == 0
    assert tab.complaints() == []


def test_of_a_chat_the_whole_prompt_is_one_click_away(fresh: Tab) -> None:
    shown = "[...document.querySelectorAll('#pairs .pair')].map((pair) => pair.innerText.split('\\n')[0])"
    assert fresh.evaluate(shown) == ["The film", "How was it?"]
    assert fresh.evaluate("document.querySelectorAll('#pairs details').length") == 1, "the other is no chat"
    assert "Be brief." not in fresh.evaluate("document.querySelector('#pairs').innerText")
    fresh.press("Home")
    row = next(row for row in ORDER if row % 50 == CHAT)
    click(fresh, f"#grid tr[data-row='{row}']")
    texts = fresh.evaluate("document.querySelector('#detail').innerText")
    assert f"question {CHAT}" in texts
    assert f"prompt number {CHAT}" not in texts
    click(fresh, "#detail .whole summary")
    assert f"prompt number {CHAT}" in fresh.evaluate("document.querySelector('#detail').innerText")
    click(fresh, "#pairs summary")
    assert "<system>Be brief.<user>How was it?" in fresh.evaluate("document.querySelector('#pairs').innerText")


def test_what_a_model_wrote_is_text_and_runs_nothing(tab: Tab, tmp_path: Path) -> None:
    texts = itertools.cycle(ATTACKS)
    hostile = made_contents(36, 4) | {"before_after": PAIRS * len(ATTACKS), "evaluation": evaluation()}
    hostile["run"]["note"] = "note"
    hostile = with_texts(hostile, lambda: next(texts))
    hostile["samples"]["components"] = dict.fromkeys(ATTACKS, hostile["samples"]["components"]["taste"])
    path = tmp_path / "hostile.html"
    path.write_bytes(page_of(hostile))
    plain = tmp_path / "plain.html"
    plain.write_bytes(page_of(made_contents(36, 4)))
    tab.look()
    tab.open(plain)
    tags = "[...new Set([...document.querySelectorAll('*')].map((e) => e.localName))].sort()"
    harmless = set(tab.evaluate(tags))
    tab.open(path)
    for _ in range(36):
        tab.press("j")
    click(tab, ".token-table summary")
    tab.hover("#tokens .token")
    fill(tab, "#search", "attacked")
    tab.evaluate("new Promise((resolve) => setTimeout(resolve, 300))")
    assert tab.evaluate("window.attacked ?? null") is None
    assert set(tab.evaluate(tags)) - harmless <= {"polygon", "rect"}, "of the evaluation"
    assert tab.complaints() == []
    assert tab.requests() == [path.as_uri()]
    shown = tab.evaluate("document.querySelector('main').textContent")
    for text in (ATTACKS[0], "<img src=x onerror=", "⟨U+202E⟩gnp.exe", "NUL ␀, bell ␇", "⟨U+D800⟩ surrogate ⟨U+DFFF⟩"):
        assert text in shown
    assert not set("\u202e\x00\u2028") & set(tab.evaluate("document.querySelector('main').innerText"))


def test_even_a_script_that_got_in_would_not_run(fresh: Tab, page: Path) -> None:
    fresh.evaluate(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.attacked = 9';"
        "document.body.append(s);"
        "const d = document.createElement('div'); d.innerHTML = '<img src=x onerror=\"window.attacked = 9\">';"
        "document.body.append(d); })()"
    )
    fresh.evaluate("new Promise((resolve) => setTimeout(resolve, 200))")
    assert fresh.evaluate("window.attacked ?? null") is None
    assert fresh.complaints() != []
    fresh.events.clear()  # they were meant
    fresh.open(page)


def test_thousands_of_samples_load_and_sort_at_once(tab: Tab, tmp_path: Path) -> None:
    """In processor time, so that it holds on a busy machine too."""
    path = tmp_path / "large.html"
    path.write_bytes(page_of(made_contents(5_000, 64)))
    tab.look()
    tab.call("Page.navigate", url="about:blank")
    spent: dict[str, float] = {}

    def measure(name: str, act: Callable[[], object]) -> None:
        before = tab.busy_s()
        act()
        tab.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done())))")
        spent[name] = tab.busy_s() - before

    measure("load", lambda: tab.open(path))
    measure("sort", lambda: click(tab, "th[data-column=score] button"))
    measure("search", lambda: fill(tab, "#search", "word77"))
    measure("search on", lambda: fill(tab, "#search", "word78"))
    measure("next", lambda: tab.press("j"))
    measure("scroll", lambda: tab.evaluate("document.querySelector('#grid').scrollTop = 30000"))
    print({name: f"{seconds * 1000:.0f} ms" for name, seconds in spent.items()})
    assert spent["load"] < AT_ONCE_S
    assert max(seconds for name, seconds in spent.items() if name != "load") < AT_ONCE_S / 4
