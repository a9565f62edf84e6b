"""Learning rates."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import EXACT, F64_OP, HAND, JAX_F32
from torch.testing import assert_close

from rlhf_core.ops.schedules import learning_rate_at

OPTAX = json.loads((Path(__file__).parents[2] / "golden" / "jax.json").read_text())["cases"]
EXAMPLES = settings(max_examples=50)
SCHEDULES = ["constant", "linear", "cosine"]


def learning_rates(schedule: str, num_iterations: int, warmup_iterations: int, peak: float = 1.0) -> list[float]:
    return [
        learning_rate_at(
            i,
            peak=peak,
            schedule=schedule,
            num_iterations=num_iterations,
            warmup_iterations=warmup_iterations,
        )
        for i in range(num_iterations)
    ]


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1.0, 1.0, 1.0, 1.0]),
        ("linear", 0, [1.0, 0.75, 0.5, 0.25]),  # 1 - i / 4: N+ anneals to 0 after the last one
        ("cosine", 0, [1.0, 0.85355339, 0.5, 0.14644661]),  # (1 + cos(π i / 4)) / 2
        ("linear", 1, [0.5, 1.0, 2 / 3, 1 / 3]),  # half-way up, the peak, then 1 - (i - 1) / 3
        ("constant", 3, [0.25, 0.5, 0.75, 1.0]),
    ],
)
def test_by_hand(schedule: str, warmup: int, expected: list[float]) -> None:
    for actual, wanted in zip(learning_rates(schedule, 4, warmup), expected, strict=True):
        assert_close(actual, wanted, **HAND)


@pytest.mark.parametrize("name", [name for name in OPTAX if name.startswith("schedule_")])
def test_golden_optax(name: str) -> None:
    case = OPTAX[name]
    actual = learning_rates(case["schedule"], case["num_iterations"], case["warmup_iterations"], case["peak"])
    assert_close(actual, case["learning_rates"], **JAX_F32)


@EXAMPLES
@given(st.sampled_from(SCHEDULES), st.integers(1, 60), st.integers(0, 70), st.floats(1e-7, 1e-2))
def test_agrees_with_a_loop(schedule: str, num_iterations: int, warmup: int, peak: float) -> None:
    expected = []
    for i in range(num_iterations):
        if i < warmup:
            expected.append(peak / (warmup + 1) * (i + 1))
            continue
        left = 1 - (i - warmup) / (num_iterations - warmup)
        factor = {"constant": 1.0, "linear": left, "cosine": math.sin(math.pi / 2 * left) ** 2}[schedule]
        expected.append(peak * factor)
    assert_close(learning_rates(schedule, num_iterations, warmup, peak), expected, **F64_OP)


@EXAMPLES
@given(st.sampled_from(SCHEDULES), st.integers(1, 60), st.integers(0, 70), st.floats(1e-7, 1e-2))
def test_rises_to_the_peak_then_never_rises(schedule: str, num_iterations: int, warmup: int, peak: float) -> None:
    rates = learning_rates(schedule, num_iterations, warmup, peak)
    assert all(0 < rate <= peak for rate in rates)
    rise, fall = rates[: warmup + 1], rates[warmup:]
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
    if fall:
        assert fall[0] == peak


def test_the_unit_is_the_peak() -> None:
    for schedule in SCHEDULES:
        unit, doubled = (learning_rates(schedule, 9, 2, peak) for peak in (1.0, 2.0))
        assert_close(doubled, [2 * rate for rate in unit], **EXACT)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="polynomial"):
        learning_rates("polynomial", 3, 0)
    # even during the warm-up, when it is not needed yet
    with pytest.raises(ValueError, match="polynomial"):
        learning_rates("polynomial", 3, 3)
