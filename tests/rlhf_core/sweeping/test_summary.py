"""The best point and its intervals, on numbers that can be worked by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import UserError
from rlhf_core.sweeping import summary
from rlhf_core.sweeping.folder import Standing, SweepFolder
from rlhf_core.sweeping.grid import plan_runs
from rlhf_core.sweeping.summary import Criterion, criterion_of, summarize

T_2 = 4.302652729911275
"""Student's t, 2 degrees of freedom, 97.5 %: a table."""
Numbers = Mapping[tuple[float, int], tuple[float, float, float] | str]
"""(kl.coef, seed) -> score, KL, gain; or why it is not finished."""


@pytest.fixture
def summed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Results of made-up runs."""

    def of(numbers: Numbers, criterion: Criterion) -> dict[str, Any]:
        coefs, seeds = sorted({coef for coef, _ in numbers}), sorted({seed for _, seed in numbers})
        config = build_config({"kl": {"controller": "fixed"}})
        runs = plan_runs(config, {"kl.coef": coefs}, seeds)
        found = {run.name: numbers[run.values["kl.coef"], run.seed] for run in runs}

        class Made(SweepFolder):
            def standing(self, run: Any) -> Standing:
                made = found[run.name]
                return Standing(3, 3, is_finished=not isinstance(made, str))

        monkeypatch.setattr(summary.RunFolder, "open", lambda path: path.name)
        keys = ("score", "kl", "gain")
        monkeypatch.setattr(summary, "run_numbers", lambda name: dict(zip(keys, found[name], strict=True)))
        made = Made(Path("sweep"), config, {"kl.coef": coefs}, tuple(seeds), tuple(runs))
        failures = {name: numbers for name, numbers in found.items() if isinstance(numbers, str)}
        return summarize(made, criterion, failures)

    return of


THREE: Numbers = {
    (0.1, 0): (2.0, 4.0, 1.5), (0.1, 1): (2.2, 5.0, 1.7), (0.1, 2): (2.4, 6.0, 1.9),
    (0.2, 0): (1.5, 1.0, 1.0), (0.2, 1): (1.8, 1.5, 1.3), (0.2, 2): (1.5, 2.0, 1.0),
    (0.3, 0): (1.0, 1.5, 0.5), (0.3, 1): (1.0, 1.5, 0.5), (0.3, 2): (1.0, 1.5, 0.5),
}  # fmt: skip


def test_means_and_intervals_are_students_over_seeds(summed: Any) -> None:
    points = summed(THREE, Criterion(price=0.1))["points"]
    score = points[0]["score"]
    assert score["mean"] == pytest.approx(2.2)
    assert score["high"] - score["mean"] == pytest.approx(T_2 * 0.2 / math.sqrt(3)), "std 0.2 of three"
    assert points[0]["kl"]["mean"] == pytest.approx(5.0)
    assert points[0]["value"]["mean"] == pytest.approx(2.2 - 0.1 * 5.0)
    assert points[0]["gain_per_nat"]["mean"] == pytest.approx(1.7 / 5.0), "a ratio of means"
    assert points[2]["score"] == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_the_price_of_a_nat_decides(summed: Any) -> None:
    assert summed(THREE, Criterion(price=0.0))["best"]["point"] == 0
    assert summed(THREE, Criterion(price=0.1))["best"]["point"] == 0, "1.7 against 1.45"
    found = summed(THREE, Criterion(price=0.5))
    assert (found["best"]["point"], found["best"]["next"]) == (1, 2), "0.85, 0.25 and -0.3"
    assert [p["on_frontier"] for p in found["points"]] == [True, True, False]


def test_the_lead_is_paired_by_seed(summed: Any) -> None:
    best = summed(THREE, Criterion(price=0.0))["best"]
    differences = [0.5, 0.4, 0.9]
    mean = sum(differences) / 3
    std = math.sqrt(sum((d - mean) ** 2 for d in differences) / 2)
    assert best["lead"]["mean"] == pytest.approx(mean)
    assert best["lead"]["high"] - mean == pytest.approx(T_2 * std / math.sqrt(3))
    assert best["note"] == "which may be chance: more seeds would tell"
    clear = {k: (v[0] + 5 * (k[0] == 0.1), *v[1:]) for k, v in THREE.items() if not isinstance(v, str)}
    assert summed(clear, Criterion(price=0.0))["best"]["note"] == ""


def test_at_a_kl(summed: Any) -> None:
    found = summed(THREE, Criterion(price=9.0, at_kl=4.99))
    assert found["best"]["point"] == 1, "5.0 is above it; the price is not asked"
    assert found["points"][1]["value"]["mean"] == pytest.approx(1.6)
    none = summed(THREE, Criterion(price=0.1, at_kl=1.0))["best"]
    assert none["point"] is None
    assert none["note"] == "no point's KL is at most 1 nats; the lowest is 1.50, of kl.coef=0.2"


def test_a_point_whose_seed_has_failed_is_not_the_best(summed: Any) -> None:
    found = summed({**THREE, (0.1, 1): "it diverged"}, Criterion(price=0.0))
    assert (found["points"][0]["finished"], found["points"][0]["of"]) == (2, 3)
    assert found["points"][0]["score"]["mean"] == pytest.approx(2.2), "of those that have"
    assert found["best"]["point"] == 1
    assert not found["points"][0]["on_frontier"]
    (failed,) = (run for run in found["runs"] if not run["finished"])
    assert (failed["seed"], failed["failure"]) == (1, "it diverged")
    nothing = summed({(0.1, 0): "a", (0.2, 0): "b"}, Criterion(price=0.0))
    assert nothing["best"]["note"] == "no point has finished with all of its seeds"
    assert nothing["points"][0]["score"] is None


def test_one_seed_has_no_interval(summed: Any) -> None:
    found = summed({(0.1, 0): (2.0, 4.0, 1.0), (0.2, 0): (1.0, 0.001, 0.0)}, Criterion(price=0.0))
    assert found["points"][0]["score"] == {"mean": 2.0, "low": None, "high": None}
    assert found["points"][0]["gain_per_nat"]["mean"] == pytest.approx(0.25)
    assert found["points"][1]["gain_per_nat"] is None, "it has hardly moved"
    assert found["best"]["lead"] == {"mean": 1.0, "low": None, "high": None}
    assert "one seed tells no difference from chance" in found["best"]["note"]


def test_points_that_came_out_exactly_equal_say_why(summed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_core.sweeping.equal._measured", lambda _: {})
    same = {(coef, seed): (2.0 + seed, 4.0, 1.5) for coef in (0.1, 0.2) for seed in (0, 1, 2)}
    found = summed(same, Criterion(price=0.0))
    assert found["best"]["note"] == (
        "more seeds would tell nothing: all points came out exactly equal: kl.coef has had no effect: what it bounds "
        "or selects never occurred in these runs"
    )
    assert [group["points"] for group in found["equal"]] == [[0, 1]]
    nearly = same | {(0.2, 2): (4.0, 4.0, 1.5 + 1e-15)}
    assert summed(nearly, Criterion(price=0.0))["equal"] == []
    third = same | {(0.3, seed): (9.0, 4.0, 1.5) for seed in (0, 1, 2)}
    found = summed(third, Criterion(price=0.0))
    assert found["best"]["note"] == ""
    assert found["equal"][0]["why"].startswith("kl.coef=0.1; kl.coef=0.2 came out exactly equal: ")


def test_the_criterion_is_one_of_two() -> None:
    assert criterion_of(0.15, None, None) == Criterion(0.15)
    assert criterion_of(0.15, None, 0.4) == Criterion(0.4)
    assert criterion_of(0.15, 6.0, None).at_kl == 6.0
    with pytest.raises(UserError) as caught:
        criterion_of(0.15, -1.0, float("nan"))
    assert len(caught.value.problems) == 3
