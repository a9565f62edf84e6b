"""Each guard on made-up histories: when it speaks, when it is silent, and what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config
from rlhf_core.guards import RULES, Finding, findings, last_good
from rlhf_core.ops.kl import token_kl

CALM = {
    "objective/kl": 2.0,
    "kl/k3": 2.1,
    "kl/beta": 0.1,
    "policy/entropy_avg": 1.5,
    "rollout/distinct_2": 0.6,
    "rollout/repetition": 0.01,
    "rollout/response_len": 20.0,
    "rollout/truncated_rate": 0.1,
    "rollout/score_length_corr": 0.2,
    "objective/scores": 1.0,
    "objective/scores_std": 2.0,
    "reward/taste": 1.0,
    "spread/taste": 1.0,
    "reward/form": 0.5,
    "spread/form": 0.5,
    "guard/first_max_abs_log_ratio": 1e-6,
}
"""Numbers of a healthy iteration: no guard says a word."""
ALL_ON = ("guards.kl_ceiling.threshold=10", "guards.truncation_ceiling.threshold=0.5")


def config(*overrides: str) -> RunConfig:
    components = [{"name": "taste"}, {"name": "form", "weight": 2.0}]
    return build_config({"reward": {"components": components}}, [*ALL_ON, *overrides])


def history(*changes: Mapping[str, float], calm: int = 10) -> list[dict[str, float]]:
    """Calm iterations, and then some with other numbers."""
    return [dict(CALM)] * calm + [{**CALM, **change} for change in changes]


def said(numbers: Sequence[Mapping[str, float]], made: RunConfig, **accepted: int) -> dict[str, Finding]:
    return {finding.guard: finding for finding in findings(numbers, made, accepted)}


def test_a_calm_run_hears_nothing() -> None:
    assert all(said(history(calm=calm), config()) == {} for calm in (1, 5, 10, 30))
    assert config().guards.active.keys() == RULES.keys(), "the rules and the config have the same guards"


TRIPS = [
    ("kl_ceiling", {"objective/kl": 10.1, "kl/k3": 9.0}, {"objective/kl": 9.9, "kl/k3": 9.0}),
    ("negative_kl", {"objective/kl": -0.11, "kl/k3": 0.5}, {"objective/kl": -0.09, "kl/k3": 0.5}),
    ("entropy_floor", {"policy/entropy_avg": 0.049}, {"policy/entropy_avg": 0.051}),
    ("distinct_floor", {"rollout/distinct_2": 0.17}, {"rollout/distinct_2": 0.19}),
    ("repetition_ceiling", {"rollout/repetition": 0.51}, {"rollout/repetition": 0.49}),
    ("length_correlation", {"rollout/score_length_corr": 0.81}, {"rollout/score_length_corr": 0.79}),
    ("length_correlation", {"rollout/score_length_corr": -0.81}, {"rollout/score_length_corr": -0.79}),
    ("truncation_ceiling", {"rollout/truncated_rate": 0.51}, {"rollout/truncated_rate": 0.5}),
]


@pytest.mark.parametrize(("guard", "beyond", "within"), TRIPS)
def test_a_guard_trips_beyond_its_threshold_alone(
    guard: str, beyond: dict[str, float], within: dict[str, float]
) -> None:
    one = config(f"guards.{guard}.patience=1")
    assert said(history(beyond), one).keys() == {guard}
    assert said(history(within), one) == {}
    assert said(history(beyond), config(f"guards.{guard}.patience=1", f"guards.{guard}.threshold=null")) == {}


@pytest.mark.parametrize(("guard", "beyond", "within"), TRIPS)
def test_a_sentence_says_what_was_seen_the_threshold_the_cause_and_what_to_do(
    guard: str, beyond: dict[str, float], within: dict[str, float]
) -> None:
    made = config(f"guards.{guard}.patience=1")
    finding = said(history(beyond), made)[guard]
    side = "above" if finding.value > finding.limit else "below"
    assert finding.sentence.startswith("iteration 10: ")
    assert f"{side} guards.{guard}.threshold {finding.limit:g};" in finding.sentence
    assert "\n" not in finding.sentence
    seen, cause, remedy = finding.sentence.split("; likely cause: ")[0], *finding.sentence.split("; ")[-2:]
    assert all(len(part) > 20 for part in (seen, cause, remedy))
    assert abs(finding.limit) == made.guards.active[guard].threshold


def test_patience_counts_iterations_in_a_row() -> None:
    three, high = config("guards.kl_ceiling.patience=3"), {"objective/kl": 20.0}
    assert said(history(high, high), three) == {}
    assert said(history(high, high, {}, high), three) == {}, "a calm one begins the count anew"
    finding = said(history(high, high, high), three)["kl_ceiling"]
    assert (finding.in_a_row, finding.is_new) == (3, True)
    assert "for 3 iterations" in finding.sentence
    later = said(history(high, high, high, high), three)["kl_ceiling"]
    assert (later.in_a_row, later.is_new) == (4, False), "it is told once"


def test_what_is_accepted_stays_so_until_the_number_is_back_within() -> None:
    stop, high = config("guards.kl_ceiling.action=stop"), {"objective/kl": 20.0}
    assert said(history(high), stop)["kl_ceiling"].acts
    accepted = said(history(high, high), stop, kl_ceiling=10)["kl_ceiling"]
    assert accepted.is_accepted
    assert not accepted.acts
    assert said(history(high, {}, high), stop, kl_ceiling=10)["kl_ceiling"].acts, "armed anew"
    other = config("guards.entropy_floor.action=stop")
    assert said(history({"policy/entropy_avg": 0.0}), other, kl_ceiling=10)["entropy_floor"].acts


def test_a_warning_never_acts() -> None:
    assert not said(history({"objective/kl": 20.0}), config())["kl_ceiling"].acts
    assert said(history({"objective/kl": 20.0}), config("guards.kl_ceiling.action=pause"))["kl_ceiling"].acts


class TestLastGood:
    HIGH: Mapping[str, float] = {"objective/kl": 20.0}

    def test_is_the_newest_iteration_within_all_thresholds(self) -> None:
        patient = config("guards.kl_ceiling.action=stop", "guards.kl_ceiling.patience=3")
        assert last_good(history(self.HIGH, self.HIGH, self.HIGH), patient, {}) == 9, (
            "before the row, not before its end"
        )
        assert last_good(history(self.HIGH, {}, self.HIGH), patient, {}) == 11

    def test_only_counts_guards_that_may_stop(self) -> None:
        assert last_good(history(self.HIGH), config(), {}) == 10
        two = config("guards.kl_ceiling.action=stop", "guards.entropy_floor.action=pause")
        assert last_good(history({"policy/entropy_avg": 0.0}, self.HIGH), two, {}) == 9

    def test_counts_what_was_accepted_as_good(self) -> None:
        stop = config("guards.kl_ceiling.action=stop")
        assert last_good(history(self.HIGH, self.HIGH), stop, {"kl_ceiling": 10}) == 11

    def test_there_may_be_none(self) -> None:
        assert last_good([{**CALM, **self.HIGH}], config("guards.kl_ceiling.action=stop"), {}) is None
        assert last_good([], config(), {}) is None


class TestNegativeKL:
    """Responses are sampled here, so that the guard sees what a real mismatch looks like."""

    @staticmethod
    def finding(sampled: torch.Tensor, recorded: torch.Tensor, reference: torch.Tensor, seed: int) -> set[str]:
        """The guards that trip where tokens come from one distribution and are recorded under another."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            tokens_BR = torch.multinomial(sampled, 64 * 16, replacement=True).reshape(64, 16)
        mask_BR = torch.ones_like(tokens_BR, dtype=torch.bool)
        logs = (recorded.log()[tokens_BR], reference.log()[tokens_BR], mask_BR)
        k1, k3 = (float(token_kl(*logs, estimator=e).sum(dim=1).mean()) for e in ("k1", "k3"))
        made = config("guards.kl_ceiling.threshold=null")
        return set(said([CALM | {"objective/kl": k1, "kl/k3": k3}], made))

    POLICY = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    NEAR = torch.tensor([0.48, 0.26, 0.13, 0.065, 0.065])

    @pytest.mark.parametrize("seed", range(20))
    def test_chance_is_no_mismatch(self, seed: int) -> None:
        assert self.finding(self.POLICY, self.POLICY, self.NEAR, seed) == set()

    def test_in_a_small_batch_a_negative_mean_may_be_chance(self) -> None:
        """With k3 = 0.2 and 8 responses, three standard errors of k1 are 3 √(0.4 / 8) = 0.67."""
        small = config("prompts.batch_size=8")
        assert said([CALM | {"objective/kl": -0.4, "kl/k3": 0.2}], small).keys() == set()
        assert said([CALM | {"objective/kl": -0.5, "kl/k3": 0.2}], small).keys() == {"negative_kl"}
        assert said([CALM | {"objective/kl": -0.4, "kl/k3": 0.2}], config()).keys() == {"negative_kl"}, "64 responses"

    @pytest.mark.parametrize("seed", range(5))
    def test_a_sampler_of_another_temperature_or_support_is_found(self, seed: int) -> None:
        hot = self.POLICY**0.5 / (self.POLICY**0.5).sum()
        reference = torch.tensor([0.3, 0.25, 0.2, 0.125, 0.125])
        assert self.finding(hot, self.POLICY, reference, seed) == {"negative_kl"}
        tail_only = torch.tensor([0.0, 0.4, 0.3, 0.15, 0.15])
        assert self.finding(tail_only, self.POLICY, reference, seed) == {"negative_kl"}

    @pytest.mark.parametrize(
        ("overrides", "numbers", "cause"),
        [
            ([], {"guard/first_max_abs_log_ratio": 0.02}, "the sampler's log-probs differ from a full pass"),
            (["policy.dtype=bfloat16", "reference.dtype=float32"], {}, "policy.dtype is bfloat16 and reference.dtype"),
            (["generation.top_p=0.9"], {}, "unequal supports: with top_k None and top_p 0.9"),
            (["generation.top_k=5"], {}, "unequal supports: with top_k 5"),
            (["generation.temperature=0.7"], {}, "generation.temperature 0.7 divides the logits of the sampler"),
            ([], {}, "responses were not sampled from the distribution whose log-probs are recorded"),
        ],
    )
    def test_the_cause_follows_from_what_is_configured_and_measured(
        self, overrides: list[str], numbers: dict[str, float], cause: str
    ) -> None:
        negative = {"objective/kl": -1.0, "kl/k3": 0.8} | numbers
        assert f"likely cause: {cause}" in said(history(negative), config(*overrides))["negative_kl"].sentence


class TestScoreDrift:
    """In standard deviations, between the first five iterations and the last five: worked out by hand."""

    @staticmethod
    def moved(score: float, form: float, *overrides: str, **also: float) -> dict[str, Finding]:
        last = {"objective/scores": 1.0 + score, "reward/form": 0.5 + form, **also}
        return said(history(*[last] * 5, calm=5), config(*overrides))

    def test_trips_where_the_score_has_risen_and_a_component_has_fallen(self) -> None:
        finding = self.moved(score=1.4, form=-0.3)["score_drift"]
        assert finding.value == pytest.approx(0.6), "rise 1.4 / 2 = 0.7, fall 0.3 / 0.5 = 0.6"
        assert "risen by 0.70 standard deviations, while its component form has fallen by 0.60" in finding.sentence
        assert "reward.components.1" in finding.sentence

    @pytest.mark.parametrize(("score", "form"), [(0.9, -0.3), (1.4, -0.2), (1.4, 0.3), (-1.4, -0.3), (1.4, 0.0)])
    def test_is_silent_unless_both_have_moved(self, score: float, form: float) -> None:
        assert self.moved(score, form) == {}

    def test_of_a_penalty_the_rise_is_the_fall(self) -> None:
        penalty = "reward.components.1.weight=-1.0"
        assert self.moved(1.4, -0.3, penalty) == {}
        assert "risen, against its weight, by 0.60" in self.moved(1.4, 0.3, penalty)["score_drift"].sentence

    def test_a_component_that_never_varied_may_fall_too(self) -> None:
        """A format that all responses had: std 0, then 0.4."""
        still = {"reward/form": 1.0, "spread/form": 0.0}
        first = [CALM | still] * 5
        half = still | {"objective/scores": 2.4, "reward/form": 0.8, "spread/form": 0.4}
        assert said([*first, *[CALM | half] * 5], config()).keys() == {"score_drift"}
        none = still | {"objective/scores": 2.4, "reward/form": 0.0}
        assert said([*first, *[CALM | none] * 5], config())["score_drift"].value == pytest.approx(0.7)

    def test_the_windows_do_not_overlap(self) -> None:
        last = {"objective/scores": 9.0, "reward/form": -9.0}
        assert said(history(*[last] * 4, calm=5), config()) == {}
        assert said(history(*[last] * 4, calm=4), config("guards.baseline_iterations=4")).keys() == {"score_drift"}

    def test_a_component_that_was_not_measured_is_left_out(self) -> None:
        """In an iteration in which it failed on every response, it has no mean."""
        last = {"objective/scores": 9.0, "reward/form": -9.0}
        numbers = history(*[last] * 5, calm=5)
        assert said(numbers, config()).keys() == {"score_drift"}
        del numbers[7]["reward/form"]
        assert said(numbers, config()) == {}

    def test_one_component_is_the_score(self) -> None:
        alone = build_config({"reward": {"components": [{"name": "form", "weight": -1.0}]}})
        last = {"objective/scores": 9.0, "reward/form": -9.0}
        assert said(history(*[last] * 5, calm=5), alone) == {}


def test_distinct_is_compared_with_the_mean_of_the_first_iterations() -> None:
    made = config("guards.distinct_floor.patience=1", "guards.baseline_iterations=2")
    first: list[dict[str, Any]] = [CALM | {"rollout/distinct_2": 0.2}, CALM | {"rollout/distinct_2": 0.4}]
    assert said([*first, CALM | {"rollout/distinct_2": 0.08}], made).keys() == {"distinct_floor"}, "0.27 of 0.3"
    assert said([*first, CALM | {"rollout/distinct_2": 0.1}], made) == {}, "0.33 of 0.3"
    assert said([CALM | {"rollout/distinct_2": 0.0}], made) == {}, "the first are not compared with themselves"
    longer = CALM | {"rollout/distinct_2": 0.08, "rollout/response_len": 50.0}
    assert "grown from 20 to 50 tokens" in said([*first, longer], made)["distinct_floor"].sentence


@pytest.mark.parametrize(
    ("guard", "numbers", "overrides", "cause"),
    [
        ("kl_ceiling", {"objective/kl": 20.0}, ["kl.controller=fixed"], "β = 0.1 is fixed and too small"),
        ("kl_ceiling", {"objective/kl": 20.0}, [], "β = 0.1 follows too slowly"),
        ("kl_ceiling", {"objective/kl": 20.0}, ["kl.target=10"], "aims at kl.target 10, which is not below"),
        ("entropy_floor", {"policy/entropy_avg": 0.01}, [], "collapsed onto few responses"),
        ("length_correlation", {"rollout/score_length_corr": -0.9}, [], "likes short responses"),
        ("length_correlation", {"rollout/score_length_corr": 0.9}, [], "likes long responses"),
        ("truncation_ceiling", {"rollout/truncated_rate": 0.9}, [], "learnt not to end"),
        ("truncation_ceiling", {"rollout/truncated_rate": 0.15}, ["guards.truncation_ceiling.threshold=0.12"], "64 is"),
    ],
)
def test_the_likely_cause_follows_from_config_and_history(
    guard: str, numbers: dict[str, float], overrides: list[str], cause: str
) -> None:
    made = config(f"guards.{guard}.patience=1", *overrides)
    assert cause in said(history(numbers), made)[guard].sentence.split("likely cause: ")[1]


def test_a_policy_that_begins_certain_is_told_so() -> None:
    assert "certain from the start" in said([CALM | {"policy/entropy_avg": 0.01}], config())["entropy_floor"].sentence
