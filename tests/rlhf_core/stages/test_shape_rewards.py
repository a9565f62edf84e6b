from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from iteration import Bench
from tolerances import F32_OP, F32_SUM

from rlhf_core.contracts.batches import ReferenceLogprobs, Rollouts, Scores
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import IntegrityError, NumericalError
from rlhf_core.contracts.loop_state import ScoreMoments

Configure = Callable[..., RunConfig]
IDS = ["a", "b", "c"]
MASK = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
LOGPROBS = torch.tensor([[-1.0, -2.0, -0.5], [-0.25, -1.5, 0.0], [-3.0, 0.0, 0.0]])
REF = torch.tensor([[-1.5, -2.0, -1.0], [-0.5, -1.0, 0.0], [-2.0, 0.0, 0.0]])
VALUES = torch.tensor([[0.5, 0.25, 1.0], [0.0, 0.5, 0.0], [1.0, 0.0, 0.0]])
SCORES = torch.tensor([2.0, -1.0, 0.5])


def three(reasons: tuple[str, ...] = ("eos", "length", "eos")) -> tuple[Rollouts, Scores, ReferenceLogprobs]:
    """Three responses of three, two and one token, with KL sums 1, -0.25 and -1."""
    rollouts = Rollouts(
        sample_ids=IDS,
        prompt_ids=[0, 1, 2],
        prompt_rows=torch.arange(3),
        sample_indices=[0, 0, 0],
        texts=["", "", ""],
        tokens_BR=torch.ones_like(MASK, dtype=torch.int64),
        response_mask_BR=MASK,
        logprobs_BR=LOGPROBS,
        entropies_BR=torch.zeros_like(LOGPROBS),
        values_BR=VALUES,
        supports=None,
        finish_reasons=list(reasons),
    )
    scores = Scores(IDS, ["r"], SCORES[:, None], torch.ones(len(IDS), 1, dtype=torch.bool), SCORES)
    return rollouts, scores, ReferenceLogprobs(IDS, REF, MASK)


PLAIN = ["kl.coef=0.5", "shaping.whiten_advantages=false", "shaping.gae_lambda=1.0"]


def shape(tiny_config: Configure, overrides: list[str], reasons: tuple[str, ...] = ("eos", "length", "eos"), **changes):
    bench = Bench.of(tiny_config([*PLAIN, *overrides]))
    return bench.experience(*three(reasons), **changes)


def test_token_form_by_hand(tiny_config: Configure) -> None:
    """R_t = -0.5 kl_t, the score on the last real token; with λ = γ = 1, returns are sums of what follows."""
    experience = shape(tiny_config, []).batch
    expected = torch.tensor([[-0.25, 0.0, 1.75], [-0.125, -0.75, 0.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(experience.rewards_BR, expected)
    torch.testing.assert_close(experience.kl_B, torch.tensor([1.0, -0.25, -1.0]))
    torch.testing.assert_close(experience.rlhf_reward_B, torch.tensor([1.5, -0.875, 1.0]))
    returns = torch.tensor([[1.5, 1.75, 1.75], [-0.875, -0.75, 0.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(experience.returns_BR, returns)
    torch.testing.assert_close(experience.advantages_BR, torch.where(MASK, returns - VALUES, 0.0))


def test_sequence_form_puts_everything_on_the_last_token(tiny_config: Configure) -> None:
    experience = shape(tiny_config, ["shaping.level=sequence"]).batch
    expected = torch.tensor([[0.0, 0.0, 1.5], [0.0, -0.875, 0.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(experience.rewards_BR, expected)


@pytest.mark.parametrize(
    ("estimator", "expected"), [("value", [1.5 - 0.5, -0.875 - 0.0, 1.0 - 1.0]), ("reward", [1.5, -0.875, 1.0])]
)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_one_advantage_a_response(estimator: str, expected: list[float], level: str, tiny_config: Configure) -> None:
    experience = shape(tiny_config, [f"shaping.estimator={estimator}", f"shaping.level={level}"]).batch
    torch.testing.assert_close(experience.advantages_BR, torch.where(MASK, torch.tensor(expected)[:, None], 0.0))


def of_one_prompt(tiny_config: Configure, overrides: list[str]):
    """The three responses as answers to the same prompt; their R are 1.5, -0.875 and 1."""
    rollouts, scores, reference = three()
    bench = Bench.of(tiny_config([*PLAIN, "prompts.batch_size=6", "prompts.samples_per_prompt=3", *overrides]))
    same = replace(rollouts, prompt_rows=torch.zeros(3, dtype=torch.int64), values_BR=None)
    return bench.experience(same, scores, reference)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["shaping.estimator=rloo"], [1.5 - 0.0625, -0.875 - 1.25, 1.0 - 0.3125]),
        (["shaping.estimator=group", "shaping.group_std=false"], [1.5 - 1.625 / 3, -0.875 - 1.625 / 3, 1 - 1.625 / 3]),
        (["shaping.estimator=group"], [0.76539, -1.13145, 0.36606]),  # those by their sample std, 1.25208
    ],
)
def test_comparison_with_the_other_responses(
    overrides: list[str], expected: list[float], tiny_config: Configure
) -> None:
    experience = of_one_prompt(tiny_config, overrides).batch
    torch.testing.assert_close(
        experience.advantages_BR, torch.where(MASK, torch.tensor(expected)[:, None], 0.0), atol=2e-5, rtol=0
    )
    assert experience.returns_BR is None


def test_reinforce_plus_plus_is_the_whitened_return_to_go(tiny_config: Configure) -> None:
    experience = of_one_prompt(tiny_config, ["shaping.estimator=reinforce++", "shaping.whiten_advantages=true"]).batch
    to_go = torch.tensor([1.5, 1.75, 1.75, -0.875, -0.75, 1.0])
    whitened = (to_go - to_go.mean()) / to_go.std(correction=0)
    torch.testing.assert_close(experience.advantages_BR[MASK], whitened, **F32_OP)


def test_a_shared_advantage_is_whitened_over_responses(tiny_config: Configure) -> None:
    experience = of_one_prompt(tiny_config, ["shaping.estimator=rloo", "shaping.whiten_advantages=true"]).batch
    plain = torch.tensor([1.4375, -2.125, 0.6875])
    expected = (plain - plain.mean()) / plain.std(correction=0)
    torch.testing.assert_close(experience.advantages_BR, torch.where(MASK, expected[:, None], 0.0), **F32_OP)


def test_the_penalty_uses_the_configured_estimator_and_both_are_logged(tiny_config: Configure) -> None:
    result = shape(tiny_config, ["kl.estimator=k2"])
    k2 = 0.5 * torch.where(MASK, LOGPROBS - REF, 0.0) ** 2
    torch.testing.assert_close(result.batch.rlhf_reward_B, SCORES - 0.5 * k2.sum(dim=1))
    assert result.metrics["objective/kl"] == pytest.approx(-0.25 / 3)
    assert result.metrics["kl/k3"] > 0


def test_score_pipeline_keeps_each_step(tiny_config: Configure) -> None:
    """Running normalisation by (2, -1, 0.5): mean 0.5, std sqrt(1.5); clip at 1; penalty; length penalty."""
    settings = ["shaping.score_normalization=running", "shaping.score_clip=1.0", "shaping.missing_eos_penalty=0.5"]
    result = shape(tiny_config, [*settings, "shaping.length_penalty=0.1"])
    std = 1.5**0.5
    torch.testing.assert_close(result.batch.score_B, SCORES)
    torch.testing.assert_close(result.batch.score_normalized_B, torch.tensor([1.5, -1.5, 0.0]) / std)
    torch.testing.assert_close(result.batch.score_clipped_B, torch.tensor([1.0, -1.0, 0.0]))
    torch.testing.assert_close(result.batch.score_shaped_B, torch.tensor([1.0 - 0.3, -1.5 - 0.2, 0.0 - 0.1]))
    assert result.state["moments"] == {"count": 3, "mean": pytest.approx(0.5), "m2": pytest.approx(4.5)}


def test_a_stop_sequence_is_an_end_and_set_replaces_the_score(tiny_config: Configure) -> None:
    settings = ["shaping.missing_eos_penalty=3.0", "shaping.missing_eos_mode=set"]
    shaped = shape(tiny_config, settings, ("stop", "length", "eos")).batch.score_shaped_B
    assert shaped.tolist() == [2.0, -3.0, 0.5]


def test_reference_normalisation_is_measured_once(tiny_config: Configure) -> None:
    settings = ["shaping.score_normalization=reference"]
    first = shape(tiny_config, settings)
    assert first.state["moments"]["count"] == 3
    later = shape(tiny_config, settings, moments=ScoreMoments(10, 1.0, 40.0))
    assert later.state["moments"] == {"count": 10, "mean": 1.0, "m2": 40.0}
    torch.testing.assert_close(later.batch.score_normalized_B, (SCORES - 1.0) / 2.0)


def test_whitening(tiny_config: Configure) -> None:
    gae = shape(tiny_config, ["shaping.whiten_advantages=true"]).batch.advantages_BR[MASK]
    torch.testing.assert_close(gae.mean(), torch.tensor(0.0), **F32_SUM)
    torch.testing.assert_close(gae.std(correction=0), torch.tensor(1.0), **F32_OP)
    one = shape(tiny_config, ["shaping.whiten_advantages=true", "shaping.estimator=reward"]).batch.advantages_BR
    torch.testing.assert_close(one[:, 0].std(correction=0), torch.tensor(1.0), **F32_OP)


@pytest.mark.parametrize(
    ("level", "before"),
    [
        ("token", [-0.25, 0.0, 1.75, -0.125, -0.75, 1.0]),  # of test_token_form_by_hand
        ("sequence", [1.5, -0.875, 1.0]),  # a response has one reward, and zeros before it that are none
    ],
)
def test_whitened_rewards_keep_their_mean(level: str, before: list[float], tiny_config: Configure) -> None:
    """Against Python's own statistics: std 1 around the mean, over what is a reward at that level."""
    mean, std = statistics.fmean(before), statistics.pstdev(before)
    rewards_BR = shape(tiny_config, ["shaping.whiten_rewards=true", f"shaping.level={level}"]).batch.rewards_BR
    found = rewards_BR[MASK] if level == "token" else rewards_BR[MASK][[2, 4, 5]]
    torch.testing.assert_close(found, torch.tensor([(x - mean) / std + mean for x in before]), **F32_OP)
    if level == "sequence":
        assert rewards_BR.count_nonzero() == len(before)


@pytest.mark.parametrize(
    ("estimator", "values"),
    [
        ("reward", [1.5, -0.875, 1.0]),  # R, one a response, whatever their lengths 3, 2 and 1
        ("gae", [1.0, 1.5, 0.75, -0.875, -1.25, 0.0]),  # returns less values, one a token
    ],
)
def test_the_spread_of_advantages_is_over_what_has_one(
    estimator: str, values: list[float], tiny_config: Configure
) -> None:
    metrics = shape(tiny_config, [f"shaping.estimator={estimator}", "shaping.whiten_advantages=true"]).metrics
    assert metrics["advantages/mean"] == pytest.approx(statistics.fmean(values), rel=1e-6)
    assert metrics["advantages/std"] == pytest.approx(statistics.pstdev(values), rel=1e-6)


def test_a_constant_batch_is_centred_and_counted(tiny_config: Configure) -> None:
    bench = Bench.of(tiny_config(["kl.coef=0.5", "shaping.estimator=reward"]))
    rollouts, scores, reference = three()
    same = replace(scores, score_B=torch.full((3,), 2.0))
    result = bench.experience(replace(rollouts, logprobs_BR=REF), same, reference)
    assert result.metrics["guard/flat_batch"] == 1.0
    assert result.batch.advantages_BR.abs().max() == 0.0


def test_kl_must_be_zero_where_policy_and_reference_are_the_same(tiny_config: Configure) -> None:
    with pytest.raises(NumericalError, match=r"KL must be 0 at iteration 0.* differs by 1 nats; likely cause"):
        shape(tiny_config, [], zero_kl_in="float32")


def test_an_infinite_log_prob_is_named(tiny_config: Configure) -> None:
    bench = Bench.of(tiny_config(PLAIN))
    rollouts, scores, reference = three()
    broken = REF.clone()
    broken[1, 0] = -torch.inf
    with pytest.raises(NumericalError, match=r"kl is not finite in 1 of 3 rows \(b\).*under the reference"):
        bench.experience(rollouts, scores, replace(reference, ref_logprobs_BR=broken))


def test_artifacts_of_other_samples_are_refused(tiny_config: Configure) -> None:
    bench = Bench.of(tiny_config(PLAIN))
    rollouts, scores, reference = three()
    with pytest.raises(IntegrityError, match="different samples"):
        bench.experience(rollouts, replace(scores, sample_ids=["a", "c", "b"]), reference)
