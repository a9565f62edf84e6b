"""Several runs: what differs, seeds, notes, and every mistake in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from made_runs import commit, made_evaluation, made_run

from rlhf_core.comparing.comparison import compare
from rlhf_core.comparing.presentation import difference_lines, duration, group_lines, result_lines, to_json
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.records import read_record, write_record

UP, DOWN = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 4.0, 3.0, 2.0]


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    made_run(tmp_path / "low", UP)
    made_run(tmp_path / "high", DOWN, changes=["kl.target=8", "generation.stop=['.']"], is_reported=False)
    return [tmp_path / "low", tmp_path / "high"]


def test_only_keys_that_differ_are_told_in_the_order_of_the_config(pair: list[Path]) -> None:
    lines = difference_lines(compare(pair))
    assert lines == [("generation.stop", ["[]", '["."]']), ("kl.target", ["2.0", "8.0"])]


def test_a_key_that_one_config_lacks_is_told(tmp_path: Path) -> None:
    made_run(tmp_path / "a", UP)
    second = "reward.components.1={kind: function, function: length}"
    made_run(tmp_path / "b", UP, changes=[second])
    lines = dict(difference_lines(compare([tmp_path / "a", tmp_path / "b"])))
    assert lines["reward.components.1.kind"] == ["(absent)", "function"]


def test_results_are_a_line_a_quantity_and_a_cell_a_run(pair: list[Path]) -> None:
    made = dict(result_lines(compare(pair, last=2)))
    assert made["standing"] == ["finished", "stopped"]
    assert made["iterations"] == ["6 of 6", "4 of 6"]
    assert made["score"] == ["4.500 ± 0.707", "2.500 ± 0.707"]
    assert made["best score, mean of 2"] == ["4.500", "4.500"]
    assert made["at KL, until iteration"] == ["2.25, 5", "0.25, 1"]
    assert made["time in all"] == ["18 s", "12 s"]
    assert not [label for label in made if label.startswith("evaluated")], "neither was"


def test_an_evaluation_is_told_where_there_is_one(pair: list[Path]) -> None:
    run = compare(pair).outcomes[1].run
    made_evaluation(run, "held-out", score=2.0, kl=1.0, share=None)
    made = dict(result_lines(compare(pair)))
    assert made["evaluated: score"] == ["", "2.000 ± 0.200"]
    assert made["evaluated: iteration"] == ["", "6"]
    assert "evaluated: of the attainable" not in made


class TestSeeds:
    @pytest.fixture
    def runs(self, tmp_path: Path) -> list[Path]:
        for seed, shift in ((0, 0.0), (1, 2.0)):
            made_run(tmp_path / f"low-{seed}", [s + shift for s in UP], changes=[f"seed={seed}"])
        made_run(tmp_path / "high-0", UP, changes=["kl.target=8"])
        return [tmp_path / name for name in ("low-0", "low-1", "high-0")]

    def test_runs_of_one_config_are_summed_up_across_their_seeds(self, runs: list[Path]) -> None:
        compared = compare(runs, last=2)
        low, high = compared.groups
        assert (low.name, low.runs, low.seeds) == ("kl.target=2.0", ["low-0", "low-1"], [0, 1])
        assert (low.end["score"].mean, low.end["score"].std) == (5.5, pytest.approx(2**0.5))
        assert (high.name, high.end["score"].std) == ("kl.target=8.0", None)
        made = dict(group_lines(compared))
        assert made["score"] == ["5.500 ± 1.414", "4.500"]
        assert made["seeds"] == ["0, 1", "0"]

    def test_without_a_second_seed_there_is_nothing_to_sum_up(self, runs: list[Path]) -> None:
        assert compare([runs[0], runs[2]]).groups == []

    def test_seeds_alone(self, runs: list[Path]) -> None:
        (group,) = compare(runs[:2]).groups
        assert group.name == "the same config"
        assert dict(difference_lines(compare(runs[:2]))) == {"seed": ["0", "1"]}


def test_other_conditions_are_notes_with_short_digests(tmp_path: Path) -> None:
    made_run(tmp_path / "a", UP)
    other = {"num_threads": 4, "source": "e" * 64, "versions": {"torch": "2.14.0"}, "config": "other"}
    made_run(tmp_path / "b", UP, identity=other)
    assert compare([tmp_path / "a", tmp_path / "b"]).notes == [
        "num_threads differs: 2 in a; 4 in b",
        f"source differs: {'s' * 64} in a; {'e' * 12}… in b",
        "versions.torch differs: 2.13.0 in a; 2.14.0 in b",
    ]


def test_equal_names_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        made_run(tmp_path / folder / "run", UP)
    assert [each.name for each in compare([tmp_path / "x/run", tmp_path / "y/run"]).outcomes] == ["x/run", "y/run"]


def test_a_run_that_is_going_is_compared_as_far_as_it_is(tmp_path: Path) -> None:
    made_run(tmp_path / "done", UP)
    going = made_run(tmp_path / "going", [1.0, 2.0], is_reported=False)
    with going.locked():
        compared = compare([tmp_path / "done", tmp_path / "going"])
        assert [each.standing for each in compared.outcomes] == ["finished", "working"]
        commit(going, 2, 3.0, 1.0)
        assert len(compare([tmp_path / "done", tmp_path / "going"]).outcomes[1].rows) == 3


def test_json_is_whole_and_plain(pair: list[Path]) -> None:
    told = json.loads(json.dumps(to_json(compare(pair, last=2)), allow_nan=False))
    assert [run["name"] for run in told["runs"]] == ["low", "high"]
    assert told["runs"][0]["end"]["score"] == {"mean": 4.5, "std": pytest.approx(0.5**0.5)}
    assert told["runs"][0]["curves"]["score"] == UP
    assert told["differences"]["kl.target"] == [2.0, 8.0]
    assert told["runs"][0]["evaluation"] is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (303, "5 min 03 s"), (3599.9, "1 h 00 min"), (7620, "2 h 07 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def _one(runs: Path) -> list[Path]:
    return [runs / "a"]


def _same(runs: Path) -> list[Path]:
    return [runs / "a", runs / "b" / ".." / "a"]


def _nothing_there(runs: Path) -> list[Path]:
    return [runs / "a", runs / "nowhere"]


def _no_run(runs: Path) -> list[Path]:
    (runs / "empty").mkdir()
    return [runs / "a", runs / "empty"]


def _unfinished(runs: Path) -> list[Path]:
    made_run(runs / "new", [], is_reported=False)
    return [runs / "a", runs / "new"]


def _older_schema(runs: Path) -> list[Path]:
    old = made_run(runs / "old", [1.0])
    commit(old, 0, 1.0, 1.0, version=0)
    return [runs / "a", runs / "old"]


def _older_config(runs: Path) -> list[Path]:
    record = read_record(made_run(runs / "older", [1.0]).path / "run.json")
    record["config"]["kl"]["goal"] = record["config"]["kl"].pop("target")
    write_record(runs / "older" / "run.json", record)
    return [runs / "a", runs / "older"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (_one, r"^compare takes two runs or more, and was given one; `rlhf inspect .*/a` looks into one run$"),
        (_same, r"^.*/b/\.\./a is the same run as .*/a: name each run once$"),
        (_nothing_there, r"^.*/nowhere is not a run folder: there is no such folder"),
        (_no_run, r"^.*/empty is not a run folder: it has no run\.json"),
        (_unfinished, r"^.*/new has not finished its first iteration, so .*: `rlhf resume .*/new` goes on with it$"),
        (_older_schema, r"^.*/old cannot be compared: .* has schema version 0, this release reads \d+$"),
        (_older_config, r"^.*/older was written by another version of rlhf-flow, whose config differs: kl\.goal "),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_a_mistake_is_one_sentence(tmp_path: Path, asked: Callable[[Path], list[Path]], said: str) -> None:
    for name in ("a", "b"):
        made_run(tmp_path / name, UP)
    with pytest.raises(UserError, match=said) as refused:
        compare(asked(tmp_path))
    assert len(refused.value.problems) == 1


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    made_run(tmp_path / "a", UP)
    with pytest.raises(UserError) as refused:
        compare([tmp_path / "x", tmp_path / "a", tmp_path / "a"])
    assert len(refused.value.problems) == 2
