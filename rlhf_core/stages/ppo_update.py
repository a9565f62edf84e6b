"""Stage 6: several epochs of clipped-surrogate steps on one batch of experience."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from rlhf_core.batch_metrics import Record, epoch_kl, update_metrics
from rlhf_core.contracts.batches import (
    Experience,
    Prompts,
    Rollouts,
    StageResult,
    UpdateStatistics,
)
from rlhf_core.contracts.config import PPOConfig
from rlhf_core.contracts.errors import NumericalError
from rlhf_core.models.checkpoints import Trainer
from rlhf_core.models.critic import Critic
from rlhf_core.models.ranks import Ranks
from rlhf_core.ops.randomness import seeded_generator
from rlhf_core.ops.schedules import learning_rate_at
from rlhf_core.updating.batch import UpdateBatch
from rlhf_core.updating.losses import Step, policy_loss, value_loss
from rlhf_core.updating.off_policy import relative_to_now

RATIO_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.5}
"""Largest |log ρ| of a token on the first minibatch: decoding against a full pass, by compute type."""


def ppo_update(
    trainer: Trainer,
    prompts: Prompts,
    rollouts: Rollouts,
    experience: Experience,
    config: PPOConfig,
    *,
    temperature: float,
    max_response_len: int,
    seed: int,
    iteration: int,
    num_iterations: int,
    importance_cap: float | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> StageResult[UpdateStatistics]:
    """Move policy and critic: ``num_ppo_epochs`` passes in ``num_minibatches`` steps each.

        loss = -L_clip + c_v · L_value - c_H · H + c_KL · KL, each a mean over the real tokens of the optimiser step,
        whatever the micro-batches; at sequence level L_clip alone is a mean over its responses. While the critic warms
        up, the policy stays where it is and L_value is all of it.

    At either level ``approx_kl`` and ``target_kl`` are KL(π_old ‖ π) per token, a mean over all tokens of a step (of an
    epoch, for ``target_kl``); ``clip_fraction`` and ``ratio_mean`` are over what has a ratio: tokens or responses.

    Args:
        trainer: **mutated**: weights, optimizer moments, number of updates done. Where it is in parts on the ranks of
            a group, each of them calls with the same arguments, computes its share of every step's rows, and returns
            the same.
        prompts: of this iteration.
        rollouts: responses, behaviour log-probs and values.
        experience: advantages and returns; its token_kl also gives the reference's log-probs.
        config: epochs, minibatches, clipping, learning rate.
        temperature: the one that generated.
        max_response_len: the length limit of generation, in tokens.
        seed: the run's seed; each epoch's permutation is drawn from (seed, iteration, epoch).
        iteration: from 0.
        num_iterations: of the run, for the learning-rate schedule.
        importance_cap: where another policy than the trainer's has drawn the responses: ratios are then taken to the
            trainer's as it is now, and each sample counts by its importance weight, at most so much, where the two
            differ by more than ``importance_threshold``. None: the trainer's own.
        on_step: called with (step, of) after each optimiser step.
    Returns: one record an optimiser step, and their means as metrics.
    Raises: NumericalError if ρ is not 1 on the first minibatch, too many steps in a row are not finite, or a step has
        left a weight or moment that is not finite.
    Source: Schulman et al. 2017 (arXiv 1707.06347); expectations as in SEMANTICS.
    """
    batch = UpdateBatch.build(prompts, rollouts, experience, trainer.actor_critic.policy.device)
    sampler: dict[str, float] = {}
    if importance_cap is not None:
        batch, sampler = relative_to_now(trainer, batch, config, temperature, importance_cap)
    warming_up = iteration < config.critic_warmup_iterations
    learning_rate = _set_learning_rate(trainer, config, iteration, num_iterations)
    steps: list[Record] = []
    skipped_in_a_row = 0
    for epoch in range(config.num_ppo_epochs):
        order = seeded_generator(seed, "ppo_update", iteration, epoch).permutation(len(batch.sequences))
        for minibatch, index in enumerate(torch.from_numpy(order).chunk(config.num_minibatches)):
            rows = batch.rows(index)
            num_tokens = int(rows.sequences.response_mask_BR.sum())
            step = Step(config, temperature, max_response_len, len(index), num_tokens, warming_up)
            record = _optimizer_step(trainer, rows, step, is_first=not steps)
            place: Record = {"step": len(steps), "epoch": epoch, "minibatch": minibatch, "num_samples": len(index)}
            steps.append(place | record | {"learning_rate": learning_rate})
            skipped_in_a_row = skipped_in_a_row + 1 if record["skipped"] else 0
            if skipped_in_a_row >= config.max_skipped_steps:
                raise NumericalError(
                    f"{skipped_in_a_row} optimiser steps in a row had a loss or gradient that is not finite "
                    f"(iteration {iteration}); the weights are as before them and the iteration's artifacts are "
                    "intact; begin again with a lower ppo.learning_rate or kl.coef, or with policy.dtype float32"
                )
            if on_step is not None:
                on_step(len(steps), config.num_ppo_epochs * config.num_minibatches)
        if config.target_kl is not None and epoch_kl(steps, epoch) > config.target_kl:
            break
    trainer.iteration += 1
    trainer.check_finite()
    return StageResult(
        UpdateStatistics(steps), update_metrics(steps, planned=config.num_ppo_epochs * config.num_minibatches) | sampler
    )


def _optimizer_step(trainer: Trainer, batch: UpdateBatch, step: Step, *, is_first: bool) -> Record:
    """Accumulate the gradient over micro-batches, check it, clip it, step.

    A critic with a trunk of its own shares nothing with the policy: both go forward and backward side by side.
    """
    actor_critic, ranks = trainer.actor_critic, trainer.ranks
    critic = None if batch.returns_BR is None else actor_critic.critic  # None: an estimator that needs no values
    sums: dict[str, float] = {"value_loss": 0.0, "value_clip_fraction": 0.0}
    max_log_ratio = 0.0
    trainer.optimizer.zero_grad(set_to_none=True)
    for index in ranks.passes(step.num_samples, step.config.micro_batch_size):
        part = batch.rows(index) if len(index) else batch.without_tokens()
        if critic is not None and critic.trunk is not None:
            with ranks.beside(partial(_learn_values, critic, part, step)) as learned:
                loss, statistics, _ = policy_loss(actor_critic, part, step)
                _backward(loss)
            statistics |= learned()
        else:
            loss, statistics, hidden_ND = policy_loss(actor_critic, part, step)
            if critic is not None:
                of_critic, of_values = value_loss(critic, part, hidden_ND, step)
                loss = of_critic if step.warming_up else loss + of_critic
                statistics |= of_values
            _backward(loss)
        worst = ranks.largest(statistics.pop("max_abs_log_ratio"))
        if is_first:
            _check_ratio(worst, actor_critic.policy.dtype)
        max_log_ratio = max(max_log_ratio, worst)
        statistics["loss"] += step.config.vf_coef * statistics.get("value_loss", 0.0)
        for name, value in statistics.items():
            sums[name] = sums.get(name, 0.0) + (value if len(index) else 0.0)
    sums = ranks.total(sums)
    grad_norm, critic_grad_norm = _clip_gradients(trainer, step.config.max_grad_norm)
    skipped = not all(map(math.isfinite, (sums["loss"], grad_norm, critic_grad_norm)))
    if not skipped:
        trainer.optimizer.step()
    norms = {"grad_norm": grad_norm, "critic_grad_norm": critic_grad_norm, "max_abs_log_ratio": max_log_ratio}
    return {"num_tokens": step.num_tokens, "skipped": skipped, **sums, **norms}


def _learn_values(critic: Critic, batch: UpdateBatch, step: Step) -> dict[str, float]:
    """Add the gradient of a separate critic."""
    loss, statistics = value_loss(critic, batch, None, step)
    loss.backward()
    return statistics


def _backward(loss: Tensor) -> None:
    """Without a graph where the policy stays as it is: AdamW leaves it alone then, moments included."""
    if loss.requires_grad:
        loss.backward()


def _check_ratio(worst: float, dtype: torch.dtype) -> None:
    if not math.isfinite(worst):
        raise NumericalError(
            "the policy's log-probs are not finite on the first minibatch, though they were when it generated: its "
            "weights in memory are broken; resume, which reads them from the newest checkpoint again"
        )
    if not worst <= RATIO_TOLERANCE[dtype]:
        raise NumericalError(
            f"the ratio to the behaviour policy must be 1 on the first minibatch, but a token's log-ratio is "
            f"{worst:.3g} (tolerance {RATIO_TOLERANCE[dtype]:g}); likely cause: the rollouts come from other "
            "weights, another temperature (a tiny generation.temperature magnifies every rounding), or an architecture "
            "whose cached decoding disagrees with its full pass; nothing of this stage is committed: resume, and if it "
            "comes back, raise generation.temperature or choose another architecture"
        )


def _clip_gradients(trainer: Trainer, max_norm: float | None) -> tuple[float, float]:
    """Norms before clipping: (policy and a shared critic's head, separate critic)."""
    critic = trainer.actor_critic.critic
    policy_group = [p for _, p in trainer.actor_critic.policy_parameters()]
    critic_group = [p for _, p in trainer.actor_critic.critic_parameters()]
    if critic is None or critic.trunk is None:
        policy_group, critic_group = policy_group + critic_group, []
    limit = math.inf if max_norm is None else max_norm
    return _clip(policy_group, limit, trainer.ranks), _clip(critic_group, limit, trainer.ranks)


def _clip(parameters: Sequence[Tensor], limit: float, ranks: Ranks) -> float:
    """The norm of a group's gradients, which are scaled where it is above the limit."""
    grads = [ranks.part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    norm = ranks.norm(float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0)
    if norm > limit:
        torch._foreach_mul_(grads, limit / (norm + 1e-6))
    return norm


def _set_learning_rate(trainer: Trainer, config: PPOConfig, iteration: int, num_iterations: int) -> float:
    factor = learning_rate_at(
        iteration,
        peak=1.0,
        schedule=config.lr_schedule,
        num_iterations=num_iterations,
        warmup_iterations=config.warmup_iterations,
    )
    peaks = {
        "policy": config.learning_rate,
        "embeddings": config.learning_rate * config.embedding_lr_factor,
        "critic": config.critic_learning_rate or config.learning_rate,
    }
    for group in trainer.optimizer.param_groups:
        group["lr"] = peaks[group["name"]] * factor
    return config.learning_rate * factor
