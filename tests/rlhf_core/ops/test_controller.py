"""From one loop state to the next."""

from __future__ import annotations

import pytest

from rlhf_core.contracts.config import KLConfig
from rlhf_core.contracts.loop_state import Cursor, LoopState, ScoreMoments
from rlhf_core.ops.controller import next_state

BEFORE = LoopState(iteration=4, kl_coef=0.2, episodes=100, cursor=Cursor(0, 8), moments=ScoreMoments(100, 1.0, 2.0))
AFTER_PROMPTS, AFTER_SCORES = Cursor(1, 16), ScoreMoments(150, 1.5, 3.0)


def step(config: KLConfig, kl: float) -> LoopState:
    return next_state(BEFORE, config, kl=kl, num_samples=50, cursor=AFTER_PROMPTS, moments=AFTER_SCORES)


def test_everything_is_carried_on_and_a_fixed_beta_stays() -> None:
    after = step(KLConfig(controller="fixed"), kl=99.0)
    assert after == LoopState(5, 0.2, episodes=150, cursor=AFTER_PROMPTS, moments=AFTER_SCORES)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.6, 0.2 * (1 + 0.1 * 50 / 1000)),  # 10 % above the target
        (60.0, 0.2 * (1 + 0.2 * 50 / 1000)),  # far above: the error is clipped at 0.2
        (0.0, 0.2 * (1 - 0.2 * 50 / 1000)),  # far below
        (6.0, 0.2),
    ],
)
def test_an_adaptive_beta_follows_the_kl(kl: float, expected: float) -> None:
    assert step(KLConfig(controller="adaptive", target=6.0, horizon=1000.0), kl).kl_coef == pytest.approx(expected)


def test_a_kl_that_is_not_finite_never_enters_beta() -> None:
    with pytest.raises(ValueError, match="must not enter"):
        step(KLConfig(controller="adaptive"), float("nan"))
