"""The tables of the tiers name tests that exist, and none of them empties a file's fast tier by mistake."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from tiers import EXHAUSTIVE, FEW, is_exhaustive

TESTS = Path(__file__).parent
NAMED = [(file, name) for table in (EXHAUSTIVE, FEW) for file, names in table.items() for name in names]


def names_of(file: str) -> list[str]:
    """The tests of a file as ``Class::test`` or ``test``, without parameters."""
    found: list[str] = []
    for node in ast.parse((TESTS / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            found.append(node.name)
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
            found += [f"{node.name}::{method.name}" for method in methods]
    return found


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_name_begins_one_of_the_file(file: str, name: str) -> None:
    plain = name.partition("[")[0]
    assert any(found.startswith(plain) for found in names_of(file))


@pytest.mark.parametrize("file", FEW)
def test_a_file_of_few_is_there(file: str) -> None:
    assert names_of(file)


def test_what_stays_and_what_leaves() -> None:
    assert is_exhaustive("flows/test_ranks.py", "test_a_rank_that_stops_is_named")
    assert not is_exhaustive("flows/test_ranks.py", "test_a_layout_that_cannot_be_is_refused[update0]")
    assert is_exhaustive("flows/test_sweep_flow.py", "TestWhole::test_each_run_stands_where_it_should")
    assert not is_exhaustive("flows/test_sweep_flow.py", "TestMistakes::test_of_what_is_asked")
    assert not is_exhaustive("rlhf_core/ops/test_kl.py", "test_anything")
    assert set(EXHAUSTIVE) & set(FEW) == set()
