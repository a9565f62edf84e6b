"""The gate of a training chain: what a policy must show on held-out prompts before it is promoted.

Both numbers are read at the unfavourable end of their 95 % interval over prompts, so that a policy is not promoted by
luck: few prompts make the gate harder to pass, never easier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.section import PositiveFloat, Section
from rlhf_core.evaluation.request import Request

OURS = ("newest", "best", "last_good")
"""Aliases that every run sets."""


class Gate(Section):
    """Held-out prompts, how they are answered, and what the answers must show."""

    prompts: str = Field(min_length=1, description="source of prompts that were not trained on")
    column: str | None = Field(default=None, description="of the prompts; null: the run's")
    num_prompts: Annotated[int, Field(ge=2)] = Field(default=64, description="at most so many, drawn by the seed")
    samples: Annotated[int, Field(ge=1)] = Field(default=8, description="responses of the policy to each prompt")
    frontier_samples: Annotated[int, Field(ge=20)] = Field(
        default=64, description="responses of the reference to each prompt"
    )
    min_win_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.55, description="against the reference; the lower end of its 95 % interval must reach it"
    )
    max_kl: PositiveFloat = Field(
        default=10.0, description="to the reference, nats a response; the upper end of its 95 % interval may reach it"
    )
    alias: str = Field(
        default="production",
        pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,99}$",
        description="of the registered model, given to the version that passes",
    )

    @field_validator("alias")
    @classmethod
    def _is_free(cls, alias: str) -> str:
        if alias in (*OURS, "latest") or (alias[0] in "vV" and alias[1:].isdecimal()):
            raise ValueError("it has another meaning; choose a name like production")
        return alias

    def request(self, run_dir: str) -> Request:
        """The evaluation that the gate looks at: of the run's newest checkpoint."""
        return Request(
            run_dir, self.prompts, self.column, num_prompts=self.num_prompts, samples=self.samples,
            frontier_samples=self.frontier_samples,
        )  # fmt: skip

    def judge(self, numbers: Mapping[str, Any]) -> Sequence[Check]:
        """What the gate says of a policy.

        Args:
            numbers: of one policy in an evaluation's summary.
        """
        wins, kl = numbers["win_rate"], numbers["kl"]
        return (
            Check("win rate", wins["mean"], wins["low"], f"at least {self.min_win_rate:g}",
                  passed=wins["low"] >= self.min_win_rate),
            Check("KL", kl["mean"], kl["high"], f"at most {self.max_kl:g}", passed=kl["high"] <= self.max_kl),
        )  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One number at the gate.

    Example: ``Check("win rate", 0.61, 0.55, "at least 0.6", passed=False)``
    """

    name: str
    mean: float
    bound: float
    """The unfavourable end of its interval, which is what counts."""
    wanted: str
    passed: bool

    @property
    def sentence(self) -> str:
        """``win rate 0.610, at the low end of its interval 0.550; at least 0.6 is wanted``."""
        end = "low" if self.bound < self.mean else "high"
        return (
            f"{self.name} {self.mean:.3f}, at the {end} end of its interval {self.bound:.3f}; {self.wanted} is wanted"
        )


def gate_of(**values: Any) -> Gate:
    """A gate of these values, those that are None left at their default. Raises UserError, a sentence each."""
    try:
        return Gate(**{name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        raise UserError(
            *(f"gate.{'.'.join(map(str, e['loc']))} is {e['input']!r}: {_said(e['msg'])}" for e in error.errors())
        ) from None


def _said(message: str) -> str:
    return message.removeprefix("Value error, ")
