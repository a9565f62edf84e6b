from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from iteration import Bench
from tolerances import F32_MODEL

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import NumericalError
from rlhf_core.models.reward_model import RewardModel

Configure = Callable[..., RunConfig]


def reward_model(bench: Bench) -> RewardModel:
    (model,) = bench.rewards
    assert isinstance(model, RewardModel)
    return model


def test_the_score_is_the_weighted_sum_and_raw_values_are_kept(tiny_config: Configure) -> None:
    first = tiny_config().reward.first_model
    assert first is not None
    bench = Bench.of(
        tiny_config(
            [
                "reward.components.0.weight=2.0",
                f"reward.components.1={{kind: model, name: other, weight: -0.5, model: {first.model}}}",
            ]
        )
    )
    prompts = bench.prompts().batch
    result = bench.scores(prompts, bench.rollouts(prompts).batch)
    raw = result.batch.components_BC
    assert result.batch.names == ["reward0", "other"]
    torch.testing.assert_close(raw[:, 0], raw[:, 1])
    torch.testing.assert_close(result.batch.score_B, 1.5 * raw[:, 0])
    assert result.metrics["reward/other"] == pytest.approx(float(raw[:, 1].mean()))


def test_what_was_sampled_is_what_is_scored_eos_included(tiny_config: Configure) -> None:
    bench = Bench.of(tiny_config())
    prompts = bench.prompts().batch
    rollouts = bench.rollouts(prompts).batch
    scores = bench.scores(prompts, rollouts).batch
    row = rollouts.finish_reasons.index("eos")
    ids = torch.cat(
        [prompts.tokens_QP[row][prompts.mask_QP[row]], rollouts.tokens_BR[row][rollouts.response_mask_BR[row]]]
    )
    with torch.no_grad():
        expected = reward_model(bench).model(input_ids=ids[None]).logits[0, 0]
    torch.testing.assert_close(scores.score_B[row], expected, **F32_MODEL)


def test_a_nan_score_is_refused_with_component_and_samples(tiny_config: Configure) -> None:
    bench = Bench.of(tiny_config())
    prompts = bench.prompts().batch
    rollouts = bench.rollouts(prompts).batch
    reward_model(bench).model.score.weight[0, 0] = torch.nan  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
    with pytest.raises(NumericalError, match=r"reward component reward0 gave nan for 8 of 8 samples \(i000000-p"):
        bench.scores(prompts, rollouts)


SAMPLING = [[], ["generation.temperature=0.7"], ["generation.top_k=7"], ["generation.top_p=0.6"]]


@pytest.mark.parametrize("sampling", SAMPLING)
def test_reference_and_behaviour_agree_where_they_are_the_same_model(
    sampling: list[str], tiny_config: Configure
) -> None:
    """Temperature and truncated support are the same in both log-probs: KL is 0, not merely small."""
    bench = Bench.of(tiny_config(sampling))
    prompts = bench.prompts().batch
    rollouts = bench.rollouts(prompts).batch
    reference = bench.ref_logprobs(prompts, rollouts).batch
    torch.testing.assert_close(reference.ref_logprobs_BR, rollouts.logprobs_BR, **F32_MODEL)
    assert rollouts.logprobs_BR.abs().max() > 0.1


def test_the_rows_read_at_a_time_do_not_matter(tiny_config: Configure) -> None:
    whole, parts = Bench.of(tiny_config()), Bench.of(tiny_config(["reference.batch_size=3"]))
    prompts = whole.prompts().batch
    rollouts = whole.rollouts(prompts).batch
    torch.testing.assert_close(
        whole.ref_logprobs(prompts, rollouts).batch.ref_logprobs_BR,
        parts.ref_logprobs(prompts, rollouts).batch.ref_logprobs_BR,
        **F32_MODEL,
    )
