"""What becomes of a response that a component could not score: ``on_error``."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_core.contracts.errors import NumericalError
from rlhf_core.contracts.reward_config import ComponentSection, ModelReward
from rlhf_core.rewards.scoring import Failure, Outcome

logger = logging.getLogger(__name__)
SHOWN = 3


def settle(
    name: str, config: ComponentSection, outcomes: Sequence[Outcome], sample_ids: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Apply a component's policy to what it could not score.

    Args:
        name: of the component.
        config: its ``on_error`` and ``substitute``.
        outcomes: one a response.
        sample_ids: of the responses.
    Returns: (values_B, mask_B): float32 raw scores, 0 where masked; False = dropped. Both without NaN.
    Raises: NumericalError with component, samples and cause if the policy is ``fail``.
    """
    failures = {row: outcome for row, outcome in enumerate(outcomes) if isinstance(outcome, Failure)}
    if failures:
        first = next(iter(failures.values()))
        some = [sample_ids[row] for row in failures]
        problem = (
            f"reward component {name} {first.reason} for {len(some)} of {len(sample_ids)} samples ({some_of(some)})"
        )
        if config.on_error == "fail":
            raise NumericalError(f"{problem}; {_remedy(config, first)}") from first.error
        done = "left out there" if config.on_error == "drop" else f"{config.substitute:g} stands in"
        logger.warning("%s; %s", problem, done)
    stands_in = config.substitute if config.on_error == "substitute" and config.substitute is not None else 0.0
    values_B = torch.tensor([stands_in if isinstance(o, Failure) else o for o in outcomes], dtype=torch.float32)
    dropped = failures if config.on_error == "drop" else {}
    return values_B, torch.tensor([row not in dropped for row in range(len(outcomes))], dtype=torch.bool)


def some_of(sample_ids: Sequence[str]) -> str:
    """The first few, as a sentence shows them."""
    return ", ".join(sample_ids[:SHOWN]) + (" …" if len(sample_ids) > SHOWN else "")


def _remedy(config: ComponentSection, failure: Failure) -> str:
    has_computed = isinstance(config, ModelReward) and failure.reason.startswith(("gave", "raised"))
    check = "check the model's weights and dtype" if has_computed else "mend it"
    return f"a score must be finite: {check}, or set its on_error to drop or substitute"
