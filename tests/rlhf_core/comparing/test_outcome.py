"""What came out of one run: worked examples."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from made_runs import made_evaluation, made_run

from rlhf_core.comparing.outcome import Spread, newest_evaluation, outcome, smoothed
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.records import write_record

SCORES = [0.0, 1.0, 5.0, 6.0, 4.0, 2.0]


def test_spread_is_mean_and_sample_standard_deviation() -> None:
    found = Spread.of([1.0, 2.0, 3.0, 6.0])
    assert (found.mean, found.std) == (3.0, pytest.approx(2.160246899)), "numpy.std(ddof=1)"
    assert Spread.of([4.0]) == Spread(4.0, None)


def test_smoothed_lines_are_means_with_those_before() -> None:
    assert smoothed([1.0, 3.0, 8.0, 4.0], 2) == [1.0, 2.0, 5.5, 6.0]
    assert smoothed([1.0, 3.0], 5) == [1.0, 2.0]


def test_the_end_the_best_and_the_price_of_a_run(tmp_path: Path) -> None:
    found = outcome(made_run(tmp_path / "run", SCORES, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]), "run", last=2)
    assert found.standing == "finished"
    assert (found.end["score"].mean, found.end["score"].std) == (3.0, pytest.approx(2**0.5))
    assert found.end["kl"].mean == 4.5
    assert found.gain_per_nat == pytest.approx(3.0 / 4.5), "above the 0.0 of the first batch"
    assert (found.best_score, found.best_kl, found.best_until) == (5.5, 2.5, 3), "iterations 2 and 3"
    assert found.seconds == pytest.approx(18.0), "six stages of half a second in six iterations"
    assert found.seconds_per_iteration == pytest.approx(3.0)
    assert found.kl_target == 2.0


def test_a_run_shorter_than_the_window_is_averaged_as_a_whole(tmp_path: Path) -> None:
    found = outcome(made_run(tmp_path / "run", [2.0], is_reported=False), "run")
    assert (found.num_averaged, found.end["score"], found.best_score) == (1, Spread(2.0, None), 2.0)
    assert found.gain_per_nat is None
    assert found.standing == "stopped"


def test_no_gain_is_told_where_the_first_batch_is_not_the_references(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", SCORES, changes=["reference.model=another"])
    assert outcome(run, "run").gain_per_nat is None


def test_standing(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", SCORES)
    with run.locked():
        assert outcome(run, "run").standing == "working"
    assert outcome(run, "run").standing == "finished"
    write_record(run.path / "guards.json", {"tripped": {}, "accepted": {}, "stopped": "kl_ceiling"})
    assert outcome(run, "run").standing == "stopped"
    (run.path / "guards.json").unlink()
    (run.path / "before_after.json").unlink()
    assert outcome(run, "run").standing == "stopped", "before its report"


class TestEvaluation:
    def test_the_one_written_last_counts_and_its_policy_that_is_not_blended(self, tmp_path: Path) -> None:
        run = made_run(tmp_path / "run", SCORES)
        assert newest_evaluation(run) is None
        newer, older = (made_evaluation(run, name, score=score, kl=1.0) for name, score in (("a", 2.0), ("b", 3.0)))
        os.utime(older / "summary.json", ns=(1, 1))
        found = newest_evaluation(run)
        assert found is not None
        assert (found.folder, found.policy) == (str(newer), "000006")
        assert found.numbers["score"]["mean"] == 2.0
        assert found.frontier == [(0.0, 0.1), (1.0, 1.5), (2.0, 2.2)], "as far as it is trusted"

    def test_one_that_is_not_finished_is_no_evaluation_yet(self, tmp_path: Path) -> None:
        run = made_run(tmp_path / "run", SCORES)
        (made_evaluation(run, "a", score=1.0, kl=1.0) / "summary.json").unlink()
        assert newest_evaluation(run) is None

    @pytest.mark.parametrize("text", ['{"policies": {}}', '{"policies": {"000006": {"score": 1}}}', "[]", "{"])
    def test_a_foreign_summary_is_refused_by_name(self, tmp_path: Path, text: str) -> None:
        run = made_run(tmp_path / "run", SCORES)
        folder = made_evaluation(run, "a", score=1.0, kl=1.0)
        (folder / "summary.json").write_text(text)
        with pytest.raises(IntegrityError, match=r"evaluations/a/summary\.json"):
            newest_evaluation(run)
