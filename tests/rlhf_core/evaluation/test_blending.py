"""The share that has a given KL: on a KL known as a formula, and on one that is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from iteration import Bench
from tolerances import F32_OP
from torch.testing import assert_close

from rlhf_core.contracts.config import RunConfig
from rlhf_core.evaluation.blending import MAX_STEPS, TOLERANCE, kl_to_reference, share_at_kl
from rlhf_core.evaluation.samples import draw_responses
from rlhf_core.ops.comparison import Interval

MakeConfig = Callable[[Sequence[str]], RunConfig]


def exactly(kl: float) -> Interval:
    return Interval(kl, kl, kl)


CURVES: dict[str, Callable[[float], float]] = {
    "quadratic": lambda a: 5 * a**2,
    "steep at the end": lambda a: 5 * a**6,
    "flat at the end": lambda a: 5 * (1 - (1 - a) ** 4),
    "a cliff": lambda a: 5 / (1 + math.exp(-60 * (a - 0.8))),
    "negative by chance near 0": lambda a: 5 * a**2 - (0.05 if a < 0.9 else 0.0),
}


@pytest.mark.parametrize("target", [0.02, 0.5, 1.5, 3.0, 4.9])
@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES.keys())
def test_the_share_has_the_kl_within_its_tolerance(curve: Callable[[float], float], target: float) -> None:
    asked: list[float] = []

    def kl_of(share: float) -> Interval:
        asked.append(share)
        return exactly(curve(share))

    share, found = share_at_kl(target, kl_of, exactly(curve(1.0)))
    assert found.mean == pytest.approx(curve(share))
    assert found.mean == pytest.approx(target, rel=TOLERANCE)
    assert len(asked) <= MAX_STEPS
    assert all(0 < a < 1 for a in asked)


def test_few_measurements_where_the_kl_grows_as_the_square() -> None:
    asked: list[float] = []
    share, _ = share_at_kl(1.25, lambda a: asked.append(a) or exactly(5 * a**2), exactly(5.0))
    assert share == pytest.approx(0.5)
    assert len(asked) == 1


def test_the_policy_itself_and_what_it_has_not() -> None:
    def never(share: float) -> Interval:
        raise AssertionError(share)

    assert share_at_kl(5.0, never, exactly(5.0)) == (1.0, exactly(5.0))
    for target in (0.0, -1.0, 5.1, float("nan")):
        with pytest.raises(ValueError, match="target must be in"):
            share_at_kl(target, never, exactly(5.0))


def test_a_jump_over_the_target_gives_the_closest_that_was_measured() -> None:
    for target, closest in ((1.5, 1.2), (2.0, 1.2), (3.0, 1.2), (3.5, 5.0), (4.0, 5.0), (4.5, 5.0)):
        share, found = share_at_kl(target, lambda a: exactly(5.0 if a > 0.6 else 1.2), exactly(5.0))
        assert (found.mean, share > 0.6) == (closest, closest == 5.0)


def test_a_kl_is_the_mean_of_its_responses_and_comes_again(tiny_config: MakeConfig) -> None:
    bench = Bench.of(tiny_config(["policy.critic.kind=shared"]))
    policy, prompts = bench.trainer.actor_critic.policy, bench.prompts().batch
    still = kl_to_reference(policy, bench.reference, bench.plan.tokenizer, prompts, bench.config)
    assert_close(still.mean, 0.0, **F32_OP)
    with torch.no_grad():
        for _, parameter in bench.trainer.actor_critic.policy_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    found = [kl_to_reference(policy, bench.reference, bench.plan.tokenizer, prompts, bench.config) for _ in range(2)]
    assert found[0] == found[1], "the same dice"
    _, kl_B, k3_B = draw_responses(
        policy, bench.reference, bench.plan.tokenizer, prompts, bench.config, part=0, num_samples=16
    )
    assert_close(found[0].mean, float(kl_B.double().mean()))
    assert found[0].low < found[0].mean < found[0].high
    assert found[0].mean > 0.05
    assert float(k3_B.min()) >= 0
