"""Which runs a person wants removed: all criteria hold, and mistakes are told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_runs import made_run

from rlhf_core.cleaning import Wanted, chosen, cleaned_after, needed_by_others, wanted
from rlhf_core.contracts.cleaned import Cleaned
from rlhf_core.contracts.errors import UserError
from rlhf_core.run_list import ListedRun, list_runs

NOW = 1e6
DAY = 86_400


def run(name: str, *, days: float = 0, state: Any = "finished", num_bytes: int = 10) -> ListedRun:
    return ListedRun(Path(name), name, state, num_bytes=num_bytes, written=NOW - days * DAY)


RUNS = [
    run("a", days=1),
    run("b", days=2, state="stopped"),
    run("c", days=3, state="running"),
    run("d", days=4, num_bytes=1_000),
    run("e", days=5, state="damaged"),
]


@pytest.mark.parametrize(
    ("what", "names"),
    [
        (Wanted(older_than_s=2.5 * DAY), "de"),
        (Wanted(keep=1), "bde"),
        (Wanted(keep=0), "abde"),
        (Wanted(larger_than=10), "d"),
        (Wanted(states=("stopped", "damaged")), "be"),
        (Wanted(keep=2, states=("stopped", "damaged")), "e"),
        (Wanted(older_than_s=0), "abde"),
    ],
)
def test_all_criteria_have_to_hold_and_what_runs_is_never_chosen(what: Wanted, names: str) -> None:
    assert "".join(each.name for each in chosen(RUNS, what, NOW)) == names


@pytest.mark.parametrize(
    ("older_than", "larger_than", "seconds", "num_bytes"),
    [("30d", None, 30 * DAY, None), ("1.5h", "10GB", 5_400, 10**10), ("2 w", "1GiB", 14 * DAY, 2**30)],
)
def test_amounts_have_units(older_than: str, larger_than: str | None, seconds: float, num_bytes: int | None) -> None:
    what = wanted(older_than, None, larger_than, [], [])
    assert (what.older_than_s, what.larger_than) == (seconds, num_bytes)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("30", None, None, [], []), "--older-than is '30'; write a number and a unit"),
        (("-3d", None, None, [], []), "--older-than is '-3d'"),
        ((None, None, "10 gb", [], []), "--larger-than is '10 gb'"),
        ((None, -1, None, [], []), "--keep is -1"),
        ((None, None, None, ["running"], []), "--state is 'running'; choose stopped, finished, damaged"),
        ((None, 5, None, [], ["weights"]), "--only is 'weights'; choose checkpoints or artifacts"),
        ((None, None, None, [], []), "nothing says which runs"),
        ((None, None, None, [], ["checkpoints"]), "nothing says which runs"),
    ],
)
def test_mistakes_are_told(arguments: Any, told: str) -> None:
    with pytest.raises(UserError) as refused:
        wanted(*arguments)
    assert told in str(refused.value)


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(UserError) as refused:
        wanted("x", -1, "y", ["z"], ["w"])
    assert len(refused.value.problems) == 5


def test_a_run_that_another_one_was_begun_from_is_known(tmp_path: Path) -> None:
    first = made_run(tmp_path / "a", [1.0])
    policy = first.path / "checkpoints" / "000001" / "policy"
    made_run(tmp_path / "b", [1.0], changes=[f"policy.model={policy}"])
    assert needed_by_others(list_runs(tmp_path)) == {first.path: "b"}


def test_the_record_grows() -> None:
    one = cleaned_after(Cleaned(), "2026-01-01", [4, 2], range(0))
    assert one == Cleaned("2026-01-01", [2, 4], 0, 0)
    two = cleaned_after(one, "2026-01-02", [], range(1, 5))
    three = cleaned_after(two, "2026-01-03", [6], range(1, 9))
    assert three == Cleaned("2026-01-03", [2, 4, 6], 1, 9)
    assert [three.lacks(i) for i in (0, 1, 8, 9)] == [False, True, True, False]
    assert not one.lacks(0)
