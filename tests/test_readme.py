"""The README is short, names the six stages, and its links lead somewhere."""

from __future__ import annotations

from pathlib import Path

from documentation import prepare

from rlhf_core.contracts.stage_graph import FILE_STEMS, STAGES

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= 200
    tree = TEXT.split("## The tree")[1].split("```")[1]
    assert 10 <= len(tree.strip().splitlines()) <= 15


def test_it_names_the_six_stages_and_their_files() -> None:
    assert [name for name in [*STAGES, *FILE_STEMS.values()] if name not in TEXT] == []


def test_its_links_lead_somewhere() -> None:
    assert prepare.broken_links({README: TEXT}) == []


def test_it_leads_to_every_page() -> None:
    """From the table, or from the navigation of the site, which test_docs.py compares with the pages."""
    assert "make docs" in TEXT
    for folder in ("tutorials", "guides", "extend", "reference", "concepts"):
        assert f"](docs/{folder}/" in TEXT, folder
