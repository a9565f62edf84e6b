from __future__ import annotations

from collections.abc import Callable

import torch
from iteration import Bench
from tolerances import F32_MODEL

from rlhf_core.contracts.config import RunConfig
from rlhf_core.models.sequences import Sequences

Configure = Callable[..., RunConfig]


def test_a_draw_depends_on_seed_iteration_prompt_and_sample_alone(tiny_config: Configure) -> None:
    """Neither batch size, nor decoding in parts, nor k changes what a sample says."""
    few = Bench.of(tiny_config(["prompts.batch_size=4"]))
    many = Bench.of(tiny_config(["prompts.batch_size=16", "prompts.samples_per_prompt=2"]))
    parts = Bench.of(tiny_config(["prompts.batch_size=8", "generation.batch_size=3"]))
    texts = [
        dict(zip(rollouts.sample_ids, rollouts.texts, strict=True))
        for bench in (few, many, parts)
        for rollouts in [bench.rollouts(bench.prompts().batch).batch]
    ]
    shared = texts[0].keys() & texts[1].keys() & texts[2].keys()
    assert len(shared) == 4
    assert all(texts[0][i] == texts[1][i] == texts[2][i] for i in shared)


def test_another_iteration_or_seed_draws_anew(tiny_config: Configure) -> None:
    bench = Bench.of(tiny_config())
    prompts = bench.prompts().batch
    first, again, other = (bench.rollouts(prompts, i).batch for i in (0, 0, 1))
    assert list(first.texts) == list(again.texts)
    assert list(first.texts) != list(other.texts)


def test_values_of_a_separate_critic_are_those_of_a_full_pass(tiny_config: Configure) -> None:
    bench = Bench.of(tiny_config(["policy.critic.init=reward"]))
    prompts = bench.prompts().batch
    rollouts = bench.rollouts(prompts).batch
    assert rollouts.values_BR is not None
    assert bench.trainer.actor_critic.critic is not None
    with torch.no_grad():
        for row in range(len(rollouts.texts)):
            one = Sequences.build(prompts, rollouts).rows(torch.tensor([row]))
            values = bench.trainer.actor_critic.critic.values(one, None)
            torch.testing.assert_close(rollouts.values_BR[row, : len(values)], values, **F32_MODEL)


def test_values_of_a_shared_head_are_those_of_a_full_pass(tiny_config: Configure) -> None:
    bench = Bench.of(tiny_config(["policy.critic.kind=shared"]))
    critic = bench.trainer.actor_critic.critic
    assert critic is not None
    with torch.no_grad():
        critic.head.weight.copy_(torch.linspace(-1, 1, 32)[None])
        prompts = bench.prompts().batch
        rollouts = bench.rollouts(prompts).batch
        sequences, actor_critic = Sequences.build(prompts, rollouts), bench.trainer.actor_critic
        assert actor_critic.critic is not None
        hidden_ND = actor_critic.evaluate(sequences, 1.0).hidden_ND
        values_BR = sequences.scatter(actor_critic.critic.values(sequences, hidden_ND))
    assert rollouts.values_BR is not None
    assert rollouts.values_BR.abs().max() > 0.1
    torch.testing.assert_close(rollouts.values_BR, values_BR, **F32_MODEL)


def test_critic_free_estimators_have_no_values(tiny_config: Configure) -> None:
    bench = Bench.of(tiny_config(["shaping.estimator=reward"]))
    assert bench.trainer.actor_critic.critic is None
    assert bench.rollouts(bench.prompts().batch).batch.values_BR is None


def test_metrics_are_worked_out_from_the_rollouts(tiny_config: Configure) -> None:
    bench = Bench.of(tiny_config(["prompts.batch_size=32", "generation.max_new_tokens=12"]))
    result = bench.rollouts(bench.prompts().batch)
    lengths = [int(n) for n in result.batch.response_mask_BR.sum(dim=1)]
    assert result.metrics["rollout/response_len"] == sum(lengths) / 32
    assert result.metrics["rollout/eos_rate"] == result.batch.finish_reasons.count("eos") / 32
    assert result.metrics["rollout/truncated_rate"] == 1 - result.metrics["rollout/eos_rate"]
    assert 0 < result.metrics["rollout/eos_rate"] < 1


def test_stop_sequences_end_responses_and_stay_in_the_text(tiny_config: Configure) -> None:
    free = Bench.of(tiny_config(["generation.max_new_tokens=20"]))
    texts = free.rollouts(free.prompts().batch).batch.texts
    stop = next(text[i : i + 2] for text in texts for i in range(len(text)) if text[i : i + 2].isalpha())
    bench = Bench.of(tiny_config(["generation.max_new_tokens=20", f"generation.stop=['{stop}']"]))
    rollouts = bench.rollouts(bench.prompts().batch).batch
    assert "stop" in rollouts.finish_reasons
    for response, reason in zip(rollouts.texts, rollouts.finish_reasons, strict=True):
        assert (stop in response) == (reason == "stop")
