"""Which terms of the loss move what: KL in the loss, dual clip, aggregation, critic warm-up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from iteration import Bench
from tolerances import F32_MODEL

from rlhf_core.contracts.config import RunConfig

Configure = Callable[..., RunConfig]
ONE_STEP = ["ppo.num_ppo_epochs=1", "ppo.num_minibatches=1", "ppo.max_grad_norm=null", "shaping.estimator=reward"]


def parameters(bench: Bench, part: str) -> torch.Tensor:
    named = bench.trainer.actor_critic.named_parameters()
    return torch.cat([p.detach().flatten() for name, p in named if name.startswith(part)])


def gradient(config: RunConfig, **changes: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """The policy's gradient of one optimiser step, with parts of the experience changed."""
    bench = Bench.of(config.model_copy(update={"ppo": config.ppo.model_copy(update={"learning_rate": 1.0})}))
    prompts, rollouts, experience = bench.until_experience()
    policy = [p for _, p in bench.trainer.actor_critic.policy_parameters()]
    bench.trainer.optimizer = torch.optim.SGD([{"name": "policy", "params": policy}], lr=1.0)  # pyright: ignore[reportAttributeAccessIssue]
    before = parameters(bench, "policy.")
    changes = {name: change(experience) if callable(change) else change for name, change in changes.items()}
    result = bench.update(prompts, rollouts, replace(experience, **changes))
    return before - parameters(bench, "policy."), dict(result.batch.steps[0])


def no_advantage(experience: Any) -> torch.Tensor:
    return torch.zeros_like(experience.advantages_BR)


def nearer_reference(experience: Any) -> torch.Tensor:
    """As if the reference gave every sampled token half of its probability: log π - log π_ref = log 2."""
    return torch.where(experience.response_mask_BR, 0.6931472, 0.0)


def test_k3_in_the_loss_pulls_towards_the_reference(tiny_config: Configure) -> None:
    """Without advantages, the gradient of c · k3 is c (1 - e^-d) ∇log π: half of c ∇log π at d = log 2."""
    with_kl = tiny_config([*ONE_STEP, "ppo.kl_loss_coef=0.1"])
    found, step = gradient(with_kl, advantages_BR=no_advantage, token_kl_BR=nearer_reference)
    pull, _ = gradient(
        tiny_config(ONE_STEP),
        advantages_BR=lambda e: torch.where(e.response_mask_BR, -0.05, 0.0),  # -A ∇log π
        token_kl_BR=nearer_reference,
    )
    assert pull.abs().max() > 1e-4
    torch.testing.assert_close(found, pull, **F32_MODEL)
    assert step["ref_k3"] == pytest.approx(0.5 - 1 + 0.6931472, rel=1e-4)
    assert step["loss"] == pytest.approx(0.1 * step["ref_k3"], rel=1e-4)
    at_rest, _ = gradient(with_kl, advantages_BR=no_advantage)
    assert at_rest.abs().max() < 1e-5, "the policy is the reference: nothing pulls"


@pytest.mark.parametrize(("estimator", "value"), [("k2", 0.5 * 0.6931472**2), ("k3+", 0.5 - 1 + 0.6931472)])
def test_other_estimators_in_the_loss_pull_by_the_log_ratio(
    estimator: str, value: float, tiny_config: Configure
) -> None:
    """The gradient of c · d² / 2 is c d ∇log π, with d = log 2; the logged k3 stays k3."""
    with_kl = tiny_config([*ONE_STEP, "ppo.kl_loss_coef=0.1", f"ppo.kl_loss_estimator={estimator}"])
    found, step = gradient(with_kl, advantages_BR=no_advantage, token_kl_BR=nearer_reference)
    pull, _ = gradient(
        tiny_config(ONE_STEP),
        advantages_BR=lambda e: torch.where(e.response_mask_BR, -0.06931472, 0.0),
        token_kl_BR=nearer_reference,
    )
    torch.testing.assert_close(found, pull, **F32_MODEL)
    assert step["loss"] == pytest.approx(0.1 * value, rel=1e-4)
    assert step["ref_k3"] == pytest.approx(0.5 - 1 + 0.6931472, rel=1e-4)


@pytest.mark.parametrize(
    ("aggregation", "factor"),
    [
        ("sequence_mean", lambda lens, limit: lens.float().mean() / lens),
        ("fixed_length", lambda lens, limit: lens.float().mean() / limit + 0 * lens),
    ],
)
def test_aggregation_weighs_the_tokens(
    aggregation: str, factor: Callable[[torch.Tensor, int], torch.Tensor], tiny_config: Configure
) -> None:
    """Each way is the token mean of advantages that are weighted beforehand."""
    longer = [*ONE_STEP, "generation.max_new_tokens=12", "seed=3"]
    lens: list[int] = []

    def weighted(experience: Any) -> torch.Tensor:
        lens_B = experience.response_mask_BR.sum(dim=1)
        lens.extend(lens_B.tolist())
        return experience.advantages_BR * factor(lens_B, 12)[:, None]

    found, _ = gradient(tiny_config([*longer, f"ppo.loss_aggregation={aggregation}"]))
    expected, _ = gradient(tiny_config(longer), advantages_BR=weighted)
    plain, _ = gradient(tiny_config(longer))
    assert len(set(lens)) > 1, "responses of one length would not tell"
    torch.testing.assert_close(found, expected, **F32_MODEL)
    assert (plain - expected).abs().max() > 1e-4


@pytest.mark.parametrize("aggregation", ["sequence_mean", "fixed_length"])
def test_aggregation_does_not_depend_on_micro_batches(aggregation: str, tiny_config: Configure) -> None:
    settings = [*ONE_STEP, "generation.max_new_tokens=12", f"ppo.loss_aggregation={aggregation}"]
    settings += ["ppo.kl_loss_coef=0.1", "ppo.entropy_coef=0.01"]
    whole, whole_step = gradient(tiny_config(settings))
    parts, parts_step = gradient(tiny_config([*settings, "ppo.micro_batch_size=3"]))
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(parts, whole, **F32_MODEL)
    assert parts_step["loss"] == pytest.approx(whole_step["loss"], rel=1e-4, abs=1e-6)


def test_dual_clip_silences_a_bad_response_that_became_likelier(tiny_config: Configure) -> None:
    """Old log-probs 2 nats lower: ρ = e² > 3 everywhere. A < 0 then has no gradient, but with c it has one without."""
    limits = [*ONE_STEP, "ppo.num_ppo_epochs=1"]
    for dual_clip, is_silent in (("3.0", True), ("null", False), ("8.0", False)):
        bench = Bench.of(tiny_config([*limits, f"ppo.dual_clip={dual_clip}"]))
        prompts, rollouts, experience = bench.until_experience()
        bad = replace(experience, advantages_BR=torch.where(experience.response_mask_BR, -1.0, 0.0))
        earlier = replace(rollouts, logprobs_BR=rollouts.logprobs_BR - 2.0)
        before = bench.trainer.digest()
        with pytest.MonkeyPatch.context() as patch:  # the ratio is not 1 here, on purpose
            patch.setattr("rlhf_core.stages.ppo_update._check_ratio", lambda *_: None)
            result = bench.update(prompts, earlier, bad)
        assert (bench.trainer.digest() == before) is is_silent
        assert result.batch.steps[0]["clip_fraction"] == float(is_silent)


@pytest.mark.parametrize(
    "critic", [["policy.critic.kind=shared"], ["policy.critic.init=reward"]], ids=["shared", "separate"]
)
def test_the_critic_warms_up_alone(critic: list[str], tiny_config: Configure) -> None:
    bench = Bench.of(tiny_config([*critic, "ppo.critic_warmup_iterations=1", "ppo.entropy_coef=0.01"]))
    policy, value_function = parameters(bench, "policy."), parameters(bench, "critic.")
    batch = bench.until_experience()
    first = bench.update(*batch, iteration=0)
    assert torch.equal(parameters(bench, "policy."), policy)
    assert not torch.equal(parameters(bench, "critic."), value_function)
    assert all(step["max_abs_log_ratio"] < F32_MODEL["atol"] for step in first.batch.steps)
    assert not any(bench.trainer.optimizer.state.get(p) for _, p in bench.trainer.actor_critic.policy_parameters())
    bench.update(*batch, iteration=1)
    assert not torch.equal(parameters(bench, "policy."), policy)


@pytest.mark.parametrize("estimator", ["reward", "rloo", "group", "reinforce++"])
def test_estimators_without_a_critic_load_none(estimator: str, tiny_config: Configure) -> None:
    config = tiny_config([f"shaping.estimator={estimator}", "prompts.samples_per_prompt=4"])
    assert not config.uses_critic
    bench = Bench.of(config)
    assert bench.trainer.actor_critic.critic is None
    prompts, rollouts, experience = bench.until_experience()
    assert rollouts.values_BR is None
    before = bench.trainer.digest()
    result = bench.update(prompts, rollouts, experience)
    assert bench.trainer.digest() != before
    assert result.metrics["loss/value_avg"] == 0.0
