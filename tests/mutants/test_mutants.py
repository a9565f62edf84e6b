"""The planted bugs fit the sources, and a result is used again only while nothing under it has changed."""

from __future__ import annotations

import ast
from dataclasses import replace

import pytest
from mutants import coverage, trying
from mutants.bugs import BUGS, ROOT, Bug
from mutants.coverage import Coverage
from mutants.report import page
from mutants.trying import Result, is_current, result_key

BUG = BUGS[0]
NOTHING = Coverage({}, {}, [])


def result(tier: str, test: str = "") -> Result:
    return Result(result_key(BUG, [test] if test else []), test, tier, 1, 1.0)


@pytest.mark.exhaustive  # a source that changes is mended in the list before the bugs are tried again
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_fits_its_file(bug: Bug) -> None:
    source = (ROOT / bug.file).read_text(encoding="utf-8")
    assert ast.dump(ast.parse(bug.planted(source))) != ast.dump(ast.parse(source))
    assert coverage._functions_of(bug)


def test_there_are_a_hundred_of_all_rooms() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) == 100
    rooms = {bug.file.rpartition("/")[0] for bug in BUGS}
    assert rooms >= {
        "flows",
        "tasks",
        *(f"rlhf_core/{name}" for name in ("contracts", "ops", "models", "stages", "store")),
    }


def test_a_text_that_is_not_there_once_is_refused() -> None:
    with pytest.raises(ValueError, match="2 times, not once"):
        BUG.planted(BUG.text * 2)
    with pytest.raises(ValueError, match="0 times, not once"):
        BUG.planted("")


def test_the_function_around_a_bug_is_found() -> None:
    method = next(bug for bug in BUGS if bug.file.endswith("lease.py"))
    assert coverage._functions_of(method) == ["_take"]
    inner = next(bug for bug in BUGS if "scored" not in bug.about and bug.file.endswith("http.py"))
    assert coverage._functions_of(inner) == ["HttpComponent._score_batch"]


def test_a_modules_own_tests_come_first_and_the_cheapest_of_the_others() -> None:
    callers = {
        "rlhf_core/ops/kl.py:token_kl": ["tests/flows/a.py", "tests/tasks/b.py", "tests/rlhf_core/ops/test_kl.py"]
    }
    found = Coverage(callers, {"tests/flows/a.py": 9.0, "tests/tasks/b.py": 1.0}, []).tests_of(BUG)
    assert found[0] == "tests/rlhf_core/ops/test_kl.py"
    assert found[-2:] == ["tests/tasks/b.py", "tests/flows/a.py"]


def test_a_result_holds_while_the_test_that_caught_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    caught = result("fast", "tests/rlhf_core/ops/test_kl.py")
    assert is_current(BUG, caught, NOTHING)
    assert not is_current(replace(BUG, replacement="0"), caught, NOTHING)
    escaped = replace(result("escaped"), key=result_key(BUG, NOTHING.tests_of(BUG)))
    assert is_current(BUG, escaped, NOTHING)
    one_more = Coverage({"rlhf_core/ops/kl.py:token_kl": ["tests/test_readme.py"]}, {}, [])
    assert not is_current(BUG, escaped, one_more), "another test may catch it"
    monkeypatch.setattr(trying, "ROOT", ROOT / "nowhere")
    assert not is_current(BUG, caught, NOTHING)


@pytest.mark.parametrize(
    ("tiers", "is_met"), [(["fast"] * 19 + ["all"], True), (["fast"] * 18 + ["all", "unsure"], False)]
)
def test_the_goal_is_a_share_of_what_the_whole_suite_catches(tiers: list[str], is_met: bool) -> None:
    results = {bug.name: result(tier) for bug, tier in zip(BUGS, [*tiers, "escaped"], strict=False)}
    text, met = page(BUGS, results)
    assert met is is_met
    assert "- tried: 21 of 100" in text
    assert "not tried" in text
