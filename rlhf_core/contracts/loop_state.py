"""What one iteration hands to the next, besides the weights: a few numbers, kept as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlhf_core.contracts.errors import IntegrityError


@dataclass(frozen=True)
class Cursor:
    """Where in the shuffled prompts the next iteration begins."""

    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class ScoreMoments:
    """Count, mean and sum of squared deviations of scores.

    Example: the scores 1 and 3 have ``ScoreMoments(count=2, mean=2.0, m2=2.0)``
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0


@dataclass(frozen=True)
class LoopState:
    """Where the loop stands before an iteration.

    Example: ``LoopState(iteration=7, kl_coef=0.149, episodes=448, cursor=Cursor(0, 448))``
    """

    iteration: int
    """The iteration that starts from this state."""
    kl_coef: float
    episodes: int = 0
    cursor: Cursor = Cursor()
    moments: ScoreMoments = ScoreMoments()
    kl_error: float | None = None
    """Of the iteration before, for the log_pi controller; None before the first, and with the others."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LoopState:
        """From :meth:`to_json`. Raises IntegrityError for anything else."""
        try:
            parts: dict[str, Any] = {"cursor": Cursor(**values["cursor"]), "moments": ScoreMoments(**values["moments"])}
            state = cls(**{**values, **parts})
            wrong = state._wrong()
        except (TypeError, KeyError) as error:
            raise IntegrityError(f"not a loop state: {error}") from None
        if wrong:
            raise IntegrityError(
                f"not a loop state: {wrong}; it was changed since it was computed: delete the manifest (06_update.json)"
                " or the checkpoint that holds it; `rlhf resume RUN --repair` computes it again"
            )
        return state

    def _wrong(self) -> str | None:
        """The first number that no run could have come to."""
        counts = {
            "iteration": self.iteration,
            "episodes": self.episodes,
            "cursor.epoch": self.cursor.epoch,
            "cursor.position": self.cursor.position,
            "moments.count": self.moments.count,
        }
        amounts = {"kl_coef": self.kl_coef, "moments.m2": self.moments.m2}
        numbers = {"moments.mean": self.moments.mean, "kl_error": 0.0 if self.kl_error is None else self.kl_error}
        for name, value in counts.items():
            if type(value) is not int or value < 0:
                return f"{name} is {value!r}, not a count"
        for name, value in (amounts | numbers).items():
            if type(value) not in (int, float) or not math.isfinite(value) or (name in amounts and value < 0):
                return f"{name} is {value!r}"
        return None
