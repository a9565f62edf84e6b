"""The `guards` section of the config: what a run is watched for, and what happens when a threshold is crossed.

A guard looks at the numbers of each finished iteration, and changes none: thresholds are no part of a run's
identity, and may be changed when it is resumed. The rules stand in :mod:`rlhf_core.guards`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf_core.contracts.section import Positive, PositiveFloat, Section

GuardAction = Literal["warn", "stop", "pause"]


class Guard(Section):
    """Base of all guards."""

    threshold: PositiveFloat | None = Field(default=None, description="null: off")
    action: GuardAction = Field(
        default="warn", description="go on; end the run and keep its last good state; or ask a person"
    )
    patience: Positive = Field(default=1, description="iterations in a row beyond the threshold before it acts")


class KLCeiling(Guard):
    """The policy has left the reference."""

    threshold: PositiveFloat | None = Field(default=None, description="objective/kl above this, nats; null: off")


class NegativeKL(Guard):
    """KL is estimated below 0, by more than chance allows: a mismatch between sampling and scoring."""

    threshold: PositiveFloat | None = Field(
        default=0.1, description="objective/kl below minus this, nats, and far below kl/k3; null: off"
    )


class EntropyFloor(Guard):
    """The policy has become certain of each token: it no longer explores."""

    threshold: PositiveFloat | None = Field(default=0.05, description="policy/entropy_avg below this, nats; null: off")


class DistinctFloor(Guard):
    """Responses resemble each other more than those of the first iterations did."""

    threshold: PositiveFloat | None = Field(
        default=0.3, le=1, description="rollout/distinct_2 below this share of its first mean; null: off"
    )
    patience: Positive = Field(default=3, description="iterations in a row beyond the threshold before it acts")


class RepetitionCeiling(Guard):
    """Responses repeat themselves."""

    threshold: PositiveFloat | None = Field(
        default=0.5, le=1, description="rollout/repetition above this share of bigrams; null: off"
    )
    patience: Positive = Field(default=3, description="iterations in a row beyond the threshold before it acts")


class LengthCorrelation(Guard):
    """The score is mostly a matter of length."""

    threshold: PositiveFloat | None = Field(
        default=0.8, le=1, description="size of rollout/score_length_corr above this; null: off"
    )
    patience: Positive = Field(default=3, description="iterations in a row beyond the threshold before it acts")


class TruncationCeiling(Guard):
    """Responses no longer come to an end."""

    threshold: PositiveFloat | None = Field(
        default=None, lt=1, description="rollout/truncated_rate above this; null: off"
    )


class ScoreDrift(Guard):
    """The combined score rises while one of its components falls."""

    threshold: PositiveFloat | None = Field(
        default=0.5, description="both by more than this, in standard deviations over responses; null: off"
    )


class GuardsConfig(Section):
    """Numbers that a run is watched for; a guard acts between two iterations."""

    baseline_iterations: Positive = Field(
        default=5, description="first iterations, which distinct_floor and score_drift compare with"
    )
    pause_timeout_s: Positive = Field(
        default=86_400, description="how long a paused run waits for a person before it is stopped"
    )
    kl_ceiling: KLCeiling = KLCeiling()
    negative_kl: NegativeKL = NegativeKL()
    entropy_floor: EntropyFloor = EntropyFloor()
    distinct_floor: DistinctFloor = DistinctFloor()
    repetition_ceiling: RepetitionCeiling = RepetitionCeiling()
    length_correlation: LengthCorrelation = LengthCorrelation()
    truncation_ceiling: TruncationCeiling = TruncationCeiling()
    score_drift: ScoreDrift = ScoreDrift()

    @property
    def active(self) -> dict[str, Guard]:
        """Each guard that has a threshold, by its name."""
        guards: dict[str, Guard] = {
            "kl_ceiling": self.kl_ceiling,
            "negative_kl": self.negative_kl,
            "entropy_floor": self.entropy_floor,
            "distinct_floor": self.distinct_floor,
            "repetition_ceiling": self.repetition_ceiling,
            "length_correlation": self.length_correlation,
            "truncation_ceiling": self.truncation_ceiling,
            "score_drift": self.score_drift,
        }
        return {name: guard for name, guard in guards.items() if guard.threshold is not None}

    @property
    def may_stop(self) -> bool:
        """Whether any guard can end the run."""
        return any(guard.action != "warn" for guard in self.active.values())
