from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from iteration import Bench
from tolerances import F32_GRAD, F32_MODEL

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import NumericalError
from rlhf_core.models.ranks import ALONE, Ranks

Configure = Callable[..., RunConfig]
CRITICS = {
    "shared": ["policy.critic.kind=shared"],
    "separate": ["policy.critic.init=reward"],
    "none": ["shaping.estimator=reward"],
}


def weights(bench: Bench) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for _, p in bench.trainer.actor_critic.named_parameters()])


def one_step(config: RunConfig, ranks: Ranks = ALONE) -> tuple[Bench, torch.Tensor, dict[str, float]]:
    """A bench after a single optimiser step by plain gradient descent of rate 1, and how far it moved."""
    rate = config.ppo.model_copy(update={"learning_rate": 1.0, "critic_learning_rate": 1.0})
    bench = Bench.of(config.model_copy(update={"ppo": rate}))
    batch = bench.until_experience()
    parameters = [p for _, p in bench.trainer.actor_critic.named_parameters()]
    bench.trainer.optimizer = torch.optim.SGD([{"name": "policy", "params": parameters}], lr=1.0)  # pyright: ignore[reportAttributeAccessIssue]
    bench.trainer.ranks = ranks
    before = weights(bench)
    result = bench.update(*batch)
    return bench, weights(bench) - before, dict(result.batch.steps[0])


@pytest.mark.parametrize("critic", CRITICS.values(), ids=CRITICS.keys())
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_gradient_does_not_depend_on_micro_batches(critic: list[str], level: str, tiny_config: Configure) -> None:
    if level == "sequence" and critic != CRITICS["none"]:
        critic = [*critic, "shaping.estimator=value"]
    one = ["ppo.num_ppo_epochs=1", "ppo.num_minibatches=1", "ppo.max_grad_norm=null", f"ppo.level={level}", *critic]
    one += ["ppo.entropy_coef=0.01", "generation.max_new_tokens=12"]
    _, whole, whole_step = one_step(tiny_config(one))
    _, parts, parts_step = one_step(tiny_config([*one, "ppo.micro_batch_size=3"]))
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(parts, whole, **F32_MODEL)
    for name in ("loss", "policy_loss", "value_loss", "entropy", "clip_fraction", "num_tokens"):
        assert parts_step[name] == pytest.approx(whole_step[name], rel=1e-4, abs=1e-6), name


class OneOf(Ranks):
    """A rank that has all weights, and whose neighbours are asked elsewhere."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize(("critic", "size", "passes"), [("shared", 3, ["ppo.micro_batch_size=2"]), ("separate", 9, [])])
def test_shares_of_ranks_add_up_to_the_step(critic: str, size: int, passes: list[str], tiny_config: Configure) -> None:
    """Of 8 rows, also where a rank has none: gradients, and every statistic that is a mean."""
    one = ["ppo.num_ppo_epochs=1", "ppo.num_minibatches=1", "ppo.max_grad_norm=null", "ppo.entropy_coef=0.01"]
    one += CRITICS[critic]
    _, whole, whole_step = one_step(tiny_config(one))
    shares = [one_step(tiny_config([*one, *passes]), OneOf(rank, size)) for rank in range(size)]
    torch.testing.assert_close(sum(moved for _, moved, _ in shares), whole, **F32_MODEL)
    for name in ("loss", "policy_loss", "value_loss", "entropy", "ref_k3", "approx_kl", "ratio_mean"):
        assert sum(step[name] for _, _, step in shares) == pytest.approx(whole_step[name], rel=1e-4, abs=1e-6), name
    assert {step["num_tokens"] for _, _, step in shares} == {whole_step["num_tokens"]}, "means are over all of them"


@pytest.mark.parametrize(("rows", "size", "micro"), [(8, 1, None), (8, 3, 2), (7, 2, 1), (1, 4, None), (5, 5, 3)])
def test_all_ranks_have_as_many_passes_and_each_row_has_one(rows: int, size: int, micro: int | None) -> None:
    """Else one would wait for a collective that another one never enters."""
    passes = [OneOf(rank, size).passes(rows, micro) for rank in range(size)]
    assert len({len(of_rank) for of_rank in passes}) == 1
    assert [row for of_rank in passes for index in of_rank for row in index.tolist()] == list(range(rows))
    assert all(len(index) <= (micro or rows) for of_rank in passes for index in of_rank)


def test_the_first_policy_gradient_is_that_of_reinforce(tiny_config: Configure) -> None:
    """At ρ = 1, the surrogate's gradient is -Σ A ∇log π / N: computed here from the model's plain logits."""
    settings = ["ppo.num_ppo_epochs=1", "ppo.num_minibatches=1", "ppo.max_grad_norm=null", "shaping.estimator=reward"]
    config = tiny_config(settings)
    _, moved, _ = one_step(config)
    bench = Bench.of(config)
    prompts, rollouts, experience = bench.until_experience()
    model, total = bench.trainer.actor_critic.policy.model, torch.tensor(0.0)
    for row in range(len(rollouts.texts)):
        prompt = prompts.tokens_QP[row][prompts.mask_QP[row]]
        response = rollouts.tokens_BR[row][rollouts.response_mask_BR[row]]
        logits = model(torch.cat([prompt, response])[None]).logits[0].log_softmax(dim=1)
        picked = logits[len(prompt) - 1 : -1].gather(1, response[:, None])[:, 0]
        total = total + (picked * experience.advantages_BR[row, : len(response)]).sum()
    (total / rollouts.response_mask_BR.sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(moved, expected, **F32_MODEL)


def test_the_ratio_is_one_on_the_first_minibatch_and_checked(tiny_config: Configure) -> None:
    bench = Bench.of(tiny_config())
    prompts, rollouts, experience = bench.until_experience()
    shifted = replace(rollouts, logprobs_BR=rollouts.logprobs_BR - 0.01)
    with pytest.raises(NumericalError, match=r"ratio .* must be 1 on the first minibatch.*0\.0.* likely cause"):
        bench.update(prompts, shifted, experience)
    first = bench.update(prompts, rollouts, experience).batch.steps[0]
    assert first["max_abs_log_ratio"] < F32_MODEL["atol"]
    assert first["clip_fraction"] == 0.0


def test_epochs_minibatches_and_permutations(tiny_config: Configure) -> None:
    bench = Bench.of(tiny_config(["ppo.num_ppo_epochs=3", "ppo.num_minibatches=4"]))
    before = bench.trainer.digest()
    batch = bench.until_experience()
    result = bench.update(*batch)
    steps = result.batch.steps
    assert [(s["epoch"], s["minibatch"]) for s in steps] == [(e, m) for e in range(3) for m in range(4)]
    assert {s["num_samples"] for s in steps} == {2}
    tokens = int(batch[1].response_mask_BR.sum())
    assert all(sum(int(s["num_tokens"]) for s in steps if s["epoch"] == e) == tokens for e in range(3))
    assert len({tuple(s["num_tokens"] for s in steps if s["epoch"] == e) for e in range(3)}) > 1
    assert bench.trainer.digest() != before
    assert bench.trainer.iteration == 1


def test_an_update_is_a_function_of_its_inputs(tiny_config: Configure) -> None:
    digests = []
    for overrides in ([], [], ["seed=8"]):
        bench = Bench.of(tiny_config())
        batch = bench.until_experience()
        bench.config = tiny_config(overrides)  # the permutations come from the seed
        bench.update(*batch)
        digests.append(bench.trainer.digest())
    assert digests[0] == digests[1] != digests[2]


def test_target_kl_skips_the_remaining_epochs(tiny_config: Configure) -> None:
    settings = ["ppo.num_ppo_epochs=4", "ppo.num_minibatches=2", "ppo.learning_rate=0.01"]
    bench = Bench.of(tiny_config([*settings, "ppo.target_kl=1e-6"]))
    result = bench.update(*bench.until_experience())
    assert len(result.batch.steps) == 2
    assert result.metrics["update/early_stopped"] == 1.0


def plain_logprobs(bench: Bench, prompts: Any, rollouts: Any) -> list[list[float]]:
    """log π of each response token from the model's plain logits, one response at a time, in float64."""
    found: list[list[float]] = []
    for row in range(len(rollouts.texts)):
        prompt = prompts.tokens_QP[row][prompts.mask_QP[row]]
        response = rollouts.tokens_BR[row][rollouts.response_mask_BR[row]]
        with torch.no_grad():
            logits = bench.trainer.actor_critic.policy.model(torch.cat([prompt, response])[None]).logits[0].double()
        logprobs = logits.log_softmax(dim=1)[len(prompt) - 1 : -1]
        found.append([float(logprobs[t, token]) for t, token in enumerate(response.tolist())])
    return found


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_approx_kl_is_a_mean_over_tokens_at_either_level(level: str, tiny_config: Configure) -> None:
    """Σ_bt (ρ_bt - 1 - log ρ_bt) / Σ_b len_b in a loop; and target_kl is compared with that."""
    settings = ["ppo.num_ppo_epochs=2", "ppo.num_minibatches=1", "shaping.estimator=reward", f"ppo.level={level}"]
    settings += ["ppo.learning_rate=0.003", "generation.max_new_tokens=12"]
    once, twice = Bench.of(tiny_config([*settings, "ppo.num_ppo_epochs=1"])), Bench.of(tiny_config(settings))
    prompts, rollouts, experience = once.until_experience()
    old = plain_logprobs(once, prompts, rollouts)
    once.update(prompts, rollouts, experience)
    now = plain_logprobs(once, prompts, rollouts)
    ratios = [[a - b for a, b in zip(new_row, old_row, strict=True)] for new_row, old_row in zip(now, old, strict=True)]
    terms = [math.expm1(x) - x for row in ratios for x in row]
    expected = math.fsum(terms) / len(terms)
    second = twice.update(prompts, rollouts, experience).batch.steps[1]
    assert len({len(row) for row in ratios}) > 1, "responses of one length would not tell"
    assert expected > 1e-3
    assert second["approx_kl"] == pytest.approx(expected, rel=1e-3)
    for factor, steps in ((1.1, 3), (0.9, 2)):  # it is looked at after each epoch
        three = Bench.of(tiny_config([*settings, "ppo.num_ppo_epochs=3", f"ppo.target_kl={factor * expected}"]))
        assert len(three.update(prompts, rollouts, experience).batch.steps) == steps


def test_a_step_that_is_not_finite_never_reaches_the_weights(tiny_config: Configure) -> None:
    bench = Bench.of(tiny_config(["ppo.num_ppo_epochs=1", "ppo.max_skipped_steps=2"]))
    prompts, rollouts, experience = bench.until_experience()
    before = bench.trainer.digest()
    broken = replace(experience, advantages_BR=torch.full_like(experience.advantages_BR, torch.inf))
    with pytest.raises(NumericalError, match="2 optimiser steps in a row"):
        bench.update(prompts, rollouts, broken)
    assert bench.trainer.digest() == before
    one_bad = experience.advantages_BR.clone()
    one_bad[0, 0] = torch.nan
    result = bench.update(prompts, rollouts, replace(experience, advantages_BR=one_bad))
    assert sorted(bool(s["skipped"]) for s in result.batch.steps) == [False, True]
    assert all(map(math.isfinite, result.metrics.values())), "a manifest holds no NaN"
    assert result.metrics["guard/skipped_steps"] == 1
    assert bench.trainer.digest() != before
    assert torch.isfinite(weights(bench)).all()


def test_gradients_are_clipped(tiny_config: Configure) -> None:
    settings = ["ppo.num_ppo_epochs=1", "ppo.num_minibatches=1", "shaping.estimator=reward"]
    _, free, step = one_step(tiny_config([*settings, "ppo.max_grad_norm=null"]))
    _, clipped, _ = one_step(tiny_config([*settings, "ppo.max_grad_norm=0.2"]))
    assert float(free.norm()) == pytest.approx(step["grad_norm"], rel=1e-3)
    assert float(clipped.norm()) == pytest.approx(0.2, rel=1e-2)
    assert float(torch.nn.functional.cosine_similarity(clipped, free, dim=0)) > 0.999


def test_the_value_loss_reaches_the_critic_alone_when_it_is_separate(tiny_config: Configure) -> None:
    settings = ["ppo.num_ppo_epochs=1", "ppo.num_minibatches=1", "ppo.max_grad_norm=null"]
    bench, without, _ = one_step(tiny_config([*settings, "ppo.vf_coef=0.0"]))
    _, with_it, _ = one_step(tiny_config([*settings, "ppo.vf_coef=0.5"]))
    policy_size = sum(p.numel() for _, p in bench.trainer.actor_critic.policy_parameters())
    torch.testing.assert_close(with_it[:policy_size], without[:policy_size], **F32_GRAD)
    assert without[policy_size:].abs().max() == 0.0
    assert with_it[policy_size:].abs().max() > 1e-4


def test_learning_rate_follows_its_schedule(tiny_config: Configure) -> None:
    rates = ["ppo.learning_rate=0.003", "ppo.critic_learning_rate=0.03", "ppo.embedding_lr_factor=2"]
    bench = Bench.of(tiny_config([*rates, "num_iterations=3"]))
    batch = bench.until_experience()
    assert bench.update(*batch, iteration=0).metrics["lr"] == pytest.approx(0.003)
    groups = {group["name"]: group for group in bench.trainer.optimizer.param_groups}
    found = {name: group["lr"] for name, group in groups.items()}
    assert found == {"policy": pytest.approx(0.003), "embeddings": pytest.approx(0.006), "critic": pytest.approx(0.03)}
    tied = bench.trainer.actor_critic.policy.model.get_input_embeddings().weight  # pyright: ignore[reportCallIssue]
    assert [id(p) for p in groups["embeddings"]["params"]] == [id(tied)], "input and output embeddings are one here"


def test_truncated_support_keeps_the_ratio_at_one(tiny_config: Configure) -> None:
    for sampling in ("generation.top_k=5", "generation.top_p=0.5", "generation.temperature=0.6"):
        bench = Bench.of(tiny_config([sampling]))
        step = bench.update(*bench.until_experience()).batch.steps[0]
        assert step["max_abs_log_ratio"] < F32_MODEL["atol"], sampling


def test_bfloat16_computes_under_autocast_and_trains_float32_weights(tiny_config: Configure) -> None:
    bench = Bench.of(tiny_config(["policy.dtype=bfloat16"]))
    before = bench.trainer.digest()
    result = bench.update(*bench.until_experience())
    assert bench.trainer.digest() != before
    assert {p.dtype for _, p in bench.trainer.actor_critic.named_parameters()} == {torch.float32}
    assert result.batch.steps[0]["max_abs_log_ratio"] < 0.5
    rounded, exact = (
        Bench.of(tiny_config([f"policy.dtype={dtype}"])).until_experience()[1].entropies_BR[:, 0]
        for dtype in ("bfloat16", "float32")
    )
    assert 1e-4 < float((rounded - exact).abs().max()) < 0.5, "bfloat16 rounds, and only rounds"
