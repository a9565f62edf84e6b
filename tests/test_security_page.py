"""The security model's table has each field of the config, and a test or a row of the battery behind each danger."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from rlhf_core.contracts.config import RunConfig

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "concepts" / "security-model.md").read_text(encoding="utf-8")
ROWS = [
    [re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split(" | ")]
    for line in PAGE.split("## Each field of the config")[1].split("## What Python imports")[0].splitlines()
    if line.startswith("| `")
]
"""Cells of each row, of each the words in backticks: the fields, the danger, the guard, the tests."""
NUMBERS = ROWS[-1][0]


def leaves(model: type[BaseModel], prefix: str = "") -> dict[str, list[Any]]:
    """Dotted name -> annotations of every field, also of each kind of a component."""
    found: dict[str, list[Any]] = {}
    for name, field in model.model_fields.items():
        children = sections(field.annotation)
        for child in children:
            for inner, kinds in leaves(child, f"{prefix}{name}.").items():
                found.setdefault(inner, []).extend(kinds)
        if not children:
            found.setdefault(f"{prefix}{name}", []).append(field.annotation)
    return found


def sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections(part)]


def is_free(annotation: Any) -> bool:
    """Whether a value may hold any text."""
    if get_origin(annotation) is Literal:
        return False
    return annotation in (str, Any, dict, list) or any(map(is_free, get_args(annotation)))


def test_each_field_stands_in_one_row() -> None:
    listed = [field for row in ROWS for field in row[0]]
    assert sorted(listed) == sorted(leaves(RunConfig)), (
        "add the field to docs/concepts/security-model.md: what can it do?"
    )


def test_each_free_text_has_a_row_of_its_own() -> None:
    free = [name for name, kinds in leaves(RunConfig).items() if any(map(is_free, kinds))]
    assert len(free) > 40
    assert [name for name in free if name in NUMBERS] == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][0])
def test_something_looks_at_each_danger(row: list[list[str]]) -> None:
    assert row[3]
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for name in row[3]:
        is_row = (ROOT / "tests" / "torture" / "rows" / f"{name}.py").is_file()
        assert is_row or re.search(rf"def {name}\(", tests), name
