"""The numbers that guards read, worked out again from the batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from iteration import Bench


@pytest.fixture
def bench(tiny_config: Callable[..., Any], tiny: Any) -> Bench:
    again = ["reward.components.1.model=" + str(tiny.reward), "reward.components.1.name=twice"]
    return Bench.of(tiny_config(again))


def test_distinct_2_is_over_all_responses_together(bench: Bench) -> None:
    result = bench.rollouts(bench.prompts().batch)
    batch = result.batch
    grams = [
        pair
        for tokens, mask in zip(batch.tokens_BR.tolist(), batch.response_mask_BR.tolist(), strict=True)
        for pair in pairwise(tokens[: sum(mask)])
    ]
    assert result.metrics["rollout/distinct_2"] == pytest.approx(len(set(grams)) / len(grams))


def test_score_and_length_are_correlated_over_responses(bench: Bench) -> None:
    prompts = bench.prompts().batch
    rollouts = bench.rollouts(prompts).batch
    scores, reference = bench.scores(prompts, rollouts).batch, bench.ref_logprobs(prompts, rollouts).batch
    metrics = bench.experience(rollouts, scores, reference).metrics
    lengths = rollouts.response_mask_BR.sum(dim=1).numpy()
    assert len(set(lengths.tolist())) > 1
    r = np.corrcoef(scores.score_B.numpy().astype(np.float64), lengths)[0, 1]
    assert metrics["rollout/score_length_corr"] == pytest.approx(r, abs=1e-6)


def test_the_spread_of_a_component_is_over_the_responses_that_it_scored(bench: Bench) -> None:
    prompts = bench.prompts().batch
    rollouts = bench.rollouts(prompts).batch
    scores, reference = bench.scores(prompts, rollouts).batch, bench.ref_logprobs(prompts, rollouts).batch
    components_BC = torch.arange(16.0).reshape(8, 2) ** 2
    mask_BC = torch.ones_like(components_BC, dtype=torch.bool)
    mask_BC[5:, 1] = False
    spread = replace(scores, components_BC=components_BC, components_mask_BC=mask_BC)
    metrics = bench.experience(rollouts, spread, reference).metrics
    assert metrics["spread/reward0"] == pytest.approx(np.std([0, 4, 16, 36, 64, 100, 144, 196]))
    assert metrics["spread/twice"] == pytest.approx(np.std([1, 9, 25, 49, 81]))
