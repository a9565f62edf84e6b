"""From one loop state to the next."""

from __future__ import annotations

import math
from dataclasses import replace

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


def pi(kl: float, last_error: float | None) -> LoopState:
    config = KLConfig(controller="log_pi", target=6.0, proportional_gain=0.5, integral_gain=0.3)
    before = replace(BEFORE, kl_error=last_error)
    return next_state(before, config, kl=kl, num_samples=50, cursor=AFTER_PROMPTS, moments=AFTER_SCORES)


def test_log_pi_by_hand() -> None:
    first = pi(6.0 * math.e**0.1, None)  # no error before: the integral term alone
    assert first.kl_coef == pytest.approx(0.2 * math.exp(0.3 * 0.1))
    assert first.kl_error == pytest.approx(0.1)
    climbing = pi(6.0 * math.e**-0.1, -0.5)  # below the target, but climbing fast: β rises
    assert climbing.kl_coef == pytest.approx(0.2 * math.exp(0.5 * 0.4 - 0.3 * 0.1))
    assert pi(6.0, 0.0).kl_coef == pytest.approx(0.2)


@pytest.mark.parametrize(
    "config",
    [
        KLConfig(controller="adaptive", coef=0.15, target=6.0, horizon=50.0),  # - 20 % an iteration
        KLConfig(controller="adaptive", coef=0.15, target=6.0, horizon=10.0),  # - 100 %, as old runs may have it
        KLConfig(controller="log_pi", coef=0.15, target=6.0, integral_gain=1.0),
    ],
    ids=["a fifth", "all of it", "log_pi"],
)
def test_a_controller_that_waits_for_the_kl_leaves_a_thousandth_of_beta(config: KLConfig) -> None:
    """A hundred iterations without KL, then it is ten times the target: β is back before another 50 are over."""
    state, path = replace(BEFORE, kl_coef=0.15), list[float]()
    for kl in [0.0] * 100 + [60.0] * 50:
        state = next_state(state, config, kl=kl, num_samples=50, cursor=AFTER_PROMPTS, moments=AFTER_SCORES)
        path.append(state.kl_coef)
    assert min(path) == path[99] == pytest.approx(0.15e-3)
    assert path[-1] > 0.15


def test_log_pi_bounds_what_it_integrates_and_a_kl_below_zero() -> None:
    far = pi(600.0, 1.0)
    assert far.kl_error == 1.0
    assert far.kl_coef == pytest.approx(0.2 * math.exp(0.3 * 0.2))
    for kl in (0.0, -0.5):
        assert pi(kl, -1.0).kl_error == -1.0
        assert pi(kl, -1.0).kl_coef == pytest.approx(0.2 * math.exp(-0.3 * 0.2))


def test_the_error_is_kept_by_its_controller_alone() -> None:
    assert step(KLConfig(controller="adaptive"), 3.0).kl_error is None
    assert step(KLConfig(controller="fixed"), 3.0).kl_error is None


def settle(controller: KLConfig, steps: int = 400) -> list[float]:
    """KL of a plant of the usual kind: log KL creeps towards log(1 / β), and β starts ten times too small."""
    state, log_kl, path = replace(BEFORE, kl_coef=1 / 60), math.log(0.05), []
    for _ in range(steps):
        log_kl += 0.1 * (math.log(1 / state.kl_coef) - log_kl)
        path.append(math.exp(log_kl))
        state = next_state(state, controller, kl=path[-1], num_samples=50, cursor=AFTER_PROMPTS, moments=AFTER_SCORES)
    return path


def test_log_pi_overshoots_less_and_settles_sooner_than_zieglers() -> None:
    paths = [settle(KLConfig(controller=name, target=6.0, horizon=1000.0)) for name in ("adaptive", "log_pi")]
    overshoot = [max(path) / 6.0 for path in paths]
    settled = [max((i for i, kl in enumerate(path) if abs(kl / 6.0 - 1) > 0.05), default=0) for path in paths]
    assert overshoot[1] < 0.5 * overshoot[0]
    assert settled[1] < settled[0] / 2
    assert paths[1][-1] == pytest.approx(6.0, rel=0.01)


def test_a_kl_that_is_not_finite_never_enters_beta() -> None:
    with pytest.raises(ValueError, match="must not enter"):
        step(KLConfig(controller="adaptive"), float("nan"))
    with pytest.raises(ValueError, match="must not enter"):
        pi(math.inf, None)
