"""The page itself: nothing in its data can be markup, its policy lets nothing else through, equal runs equal bytes."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import shutil
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from page_contents import ATTACKS, evaluation, made_contents, with_texts

from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.verification.run import verify_run
from rlhf_core.viewer import page as module
from rlhf_core.viewer.page import SCRIPTS, check_out, embedded, page_of, write_page, write_run_page

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "rlhf_core" / "viewer"


class Parts(HTMLParser):
    """Elements of a page with their attributes, and the text inside of style and script."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[tuple[str, str]] = []
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("style", "script"):
            self.inside.append((str(dict(attrs).get("type") or tag), ""))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] in ("style", "script") and self.cdata_elem:
            kind, text = self.inside[-1]
            self.inside[-1] = (kind, text + data)


def attacked() -> dict[str, Any]:
    texts = itertools.cycle(ATTACKS)
    contents = made_contents(24, 4) | {"evaluation": evaluation()}
    contents["before_after"] = [{"prompt": "", "before": "", "after": "", "score_before": 0.0, "score_after": 1.0}]
    return with_texts(contents, lambda: next(texts))


def test_whatever_a_model_wrote_stays_data() -> None:
    plain, hostile = Parts(page_of(made_contents(24, 4))), Parts(page_of(attacked()))
    assert hostile.elements == plain.elements, "a text has become an element"
    (data,) = [text for kind, text in hostile.inside if kind == "application/json"]
    assert not set("<>&\x00\u2028\u2029") & set(data)
    assert data.isascii()
    assert json.loads(data) == attacked()


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="Out of range float values"):
        embedded({"kl": float("nan")})


def test_the_policy_allows_this_style_and_this_script_and_nothing_else() -> None:
    parts = Parts(page_of(made_contents(3, 2)))
    (policy,) = [a["content"] for _, a in parts.elements if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    digests = {kind: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for kind, text in parts.inside}
    assert rules == {
        "default-src": "'none'",
        "script-src": f"'sha256-{digests['module']}'",
        "style-src": f"'sha256-{digests['style']}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_it_names_nothing_outside() -> None:
    page = page_of(made_contents(3, 2)).decode()
    assert set(re.findall(r"https?://[^\"' )]+", page)) == {"http://www.w3.org/2000/svg"}, (
        "the name of SVG, never asked for"
    )
    for _, attributes in Parts(page.encode()).elements:
        assert not {"src", "style"} & set(attributes)
        assert str(attributes.get("href", "#")).startswith(("#", "data:,"))
        assert not [name for name in attributes if name.startswith("on")]


def test_the_script_never_makes_markup_of_text() -> None:
    script = "".join((FOLDER / name).read_text() for name in SCRIPTS)
    markup = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "createContextualFragment", "DOMParser")
    reach = ("eval(", "new Function", "import(", "fetch(", "XMLHttpRequest", "WebSocket", "localStorage")
    assert [word for word in (*markup, *reach) if word in script] == []
    assert "</" not in script + (FOLDER / "page.css").read_text()
    assert "\r" not in script, "a parser of HTML reads a line end otherwise than the digest does"


def test_every_file_of_the_page_is_packaged_and_used() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    kinds = setup["package-data"]["rlhf_core.viewer"]
    packaged = {path.name for kind in kinds for path in FOLDER.glob(kind)}
    assert packaged == {*SCRIPTS, "page.html", "page.css"}
    assert packaged == {path.name for path in FOLDER.iterdir() if path.suffix not in (".py", ".pyc") and path.is_file()}


def test_equal_runs_in_equal_folders_give_equal_bytes(run: RunFolder, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_page(run, tmp_path / f"{name}.html", [0, 2], limit=None)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_page_of_a_run_belongs_to_it(run: RunFolder, tmp_path: Path) -> None:
    """It is there at the end, and a verification knows it; without it nothing is wrong either."""
    copied = Path(shutil.copytree(run.path, tmp_path / "run", symlinks=True))
    assert (copied / "view.html").is_file()
    assert verify_run(copied, load_weights=False).findings == []
    (copied / "view.html").unlink()
    assert verify_run(copied, load_weights=False).findings == []
    written = write_run_page(RunFolder.open(copied))
    assert written is not None
    assert written.num_bytes == (copied / "view.html").stat().st_size
    assert (list(written.iterations), written.num_samples) == ([0, 1, 2], 24)


def test_the_page_that_a_run_writes_stays_small(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = RunFolder.open(Path(shutil.copytree(run.path, tmp_path / "run", symlinks=True)))
    least = len(page_of(module.page_contents(copied, [0, 1, 2], limit=1, with_evaluation=False)))
    monkeypatch.setattr(module, "SMALL_BYTES", least + 2_000)
    monkeypatch.setattr(module, "_small_limit", lambda *_: 8)
    written = write_run_page(copied)
    assert written is not None
    assert written.num_bytes <= least + 2_000
    assert 3 <= written.num_samples < written.num_responses == 24
    monkeypatch.setattr(module, "SMALL_BYTES", 1)
    written = write_run_page(copied)
    assert written is not None
    assert written.num_samples == 3, "one of each at least"


def test_a_run_without_an_iteration_has_no_page(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunFolder, "num_finished", lambda _self: 0)
    assert write_run_page(run) is None


def test_a_page_goes_where_a_file_can(tmp_path: Path) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").touch()
    for name, said in (
        ("run.json", r"does not end in \.html; name a page, as in .*/run\.html"),
        ("folder.html", "is a folder; name a file"),
        ("file/deep/page.html", "file is a file, not a folder"),
    ):
        with pytest.raises(UserError, match=said):
            check_out(tmp_path / name)
    check_out(tmp_path / "new" / "page.html")
    check_out(Path("page.html"))
