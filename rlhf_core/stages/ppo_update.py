"""Stage 6: several epochs of clipped-surrogate steps on one batch of experience."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from rlhf_core.batch_metrics import Record, epoch_kl, sampler_metrics, update_metrics
from rlhf_core.contracts.batches import (
    Experience,
    Prompts,
    Rollouts,
    StageResult,
    UpdateStatistics,
    check_aligned,
    check_as_long,
)
from rlhf_core.contracts.config import PPOConfig
from rlhf_core.contracts.errors import NumericalError
from rlhf_core.models.checkpoints import Trainer
from rlhf_core.models.critic import Critic
from rlhf_core.models.ranks import Ranks
from rlhf_core.models.sequences import Sequences
from rlhf_core.ops.kl import token_kl
from rlhf_core.ops.losses import (
    aggregate,
    approx_kl,
    clipped_surrogate,
    clipped_value_loss,
    importance_weights,
    log_ratio,
)
from rlhf_core.ops.masking import masked_sum
from rlhf_core.ops.randomness import seeded_generator
from rlhf_core.ops.schedules import learning_rate_at

RATIO_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.5}
"""Largest |log ρ| of a token on the first minibatch: decoding against a full pass, by compute type."""


@dataclass(frozen=True)
class _Batch:
    """Everything an optimiser step reads, on the device."""

    sequences: Sequences
    old_logprobs_BR: Tensor
    ref_logprobs_BR: Tensor
    advantages_BR: Tensor
    old_values_BR: Tensor | None
    returns_BR: Tensor | None
    weights: Tensor | None = None
    """[B, R] or [B], as the ratio's level is: of samples that another policy has drawn."""

    def rows(self, index: Tensor) -> _Batch:
        sequences = self.sequences.rows(index)
        width = sequences.response_mask_BR.shape[1]

        def cut(tensor_BR: Tensor) -> Tensor:
            return tensor_BR[index, :width]

        return _Batch(
            sequences,
            cut(self.old_logprobs_BR),
            cut(self.ref_logprobs_BR),
            cut(self.advantages_BR),
            None if self.old_values_BR is None else cut(self.old_values_BR),
            None if self.returns_BR is None else cut(self.returns_BR),
            None
            if self.weights is None
            else self.weights[index][..., :width]
            if self.weights.dim() > 1
            else self.weights[index],
        )

    def without_tokens(self) -> _Batch:
        """Its first row as one that nothing is learned from: for a rank that has no row, but takes part."""
        row = self.rows(torch.zeros(1, dtype=torch.int64))
        mask_BR = torch.zeros_like(row.sequences.response_mask_BR)
        return replace(row, sequences=replace(row.sequences, response_mask_BR=mask_BR, supports=None))


@dataclass(frozen=True)
class _Setting:
    """What an optimiser step needs to know besides the section `ppo`."""

    temperature: float
    max_response_len: int
    warming_up: bool
    """The critic learns alone."""


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
    check_aligned(rollouts.sample_ids, experience.sample_ids)
    check_as_long(rollouts.sample_ids, rollouts.response_mask_BR, advantages=experience.response_mask_BR)
    device = trainer.actor_critic.policy.device
    batch = _Batch(
        Sequences.build(prompts, rollouts).to(device),
        rollouts.logprobs_BR.to(device),
        (rollouts.logprobs_BR - experience.token_kl_BR).to(device),
        experience.advantages_BR.to(device),
        None if rollouts.values_BR is None else rollouts.values_BR.to(device),
        None if experience.returns_BR is None else experience.returns_BR.to(device),
    )
    sampler: dict[str, float] = {}
    if importance_cap is not None:
        batch, sampler = _as_of_now(trainer, batch, config, temperature, importance_cap)
    setting = _Setting(temperature, max_response_len, warming_up=iteration < config.critic_warmup_iterations)
    learning_rate = _set_learning_rate(trainer, config, iteration, num_iterations)
    steps: list[Record] = []
    skipped_in_a_row = 0
    for epoch in range(config.num_ppo_epochs):
        order = seeded_generator(seed, "ppo_update", iteration, epoch).permutation(len(batch.sequences))
        for minibatch, index in enumerate(torch.from_numpy(order).chunk(config.num_minibatches)):
            record = _optimizer_step(trainer, batch.rows(index), config, setting, is_first=not steps)
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


def _as_of_now(
    trainer: Trainer, batch: _Batch, config: PPOConfig, temperature: float, cap: float
) -> tuple[_Batch, dict[str, float]]:
    """A batch that another policy has drawn, with the log-probs and weights of the policy that is about to move."""
    rows, mask_BR = len(batch.sequences), batch.sequences.response_mask_BR
    now_BR = torch.zeros_like(batch.old_logprobs_BR)
    with torch.no_grad():
        for index in trainer.ranks.passes(rows, config.micro_batch_size or -(-rows // config.num_minibatches)):
            part = batch.rows(index) if len(index) else batch.without_tokens()
            logprobs_BR = trainer.actor_critic.evaluate(part.sequences, temperature).logprobs_BR
            if len(index):
                now_BR[index[:, None], torch.arange(logprobs_BR.shape[1])] = logprobs_BR
        now_BR = trainer.ranks.filled(now_BR)
    weights = importance_weights(now_BR, batch.old_logprobs_BR, mask_BR, level=config.level, cap=cap)
    metrics = sampler_metrics(now_BR, batch.old_logprobs_BR, mask_BR, weights, cap=cap)
    is_off = metrics["sampler/logprob_gap_avg"] > config.importance_threshold
    return replace(batch, old_logprobs_BR=now_BR, weights=weights if is_off else None), metrics


def _optimizer_step(trainer: Trainer, batch: _Batch, config: PPOConfig, setting: _Setting, *, is_first: bool) -> Record:
    """Accumulate the gradient over micro-batches, check it, clip it, step."""
    rows, ranks = len(batch.sequences), trainer.ranks
    step = _Step(trainer, config, setting, rows, int(batch.sequences.response_mask_BR.sum()))
    sums: dict[str, float] = {}
    max_log_ratio = 0.0
    trainer.optimizer.zero_grad(set_to_none=True)
    for index in ranks.passes(rows, config.micro_batch_size):
        statistics = step.accumulate(batch.rows(index) if len(index) else batch.without_tokens())
        worst = ranks.largest(statistics.pop("max_abs_log_ratio"))
        if is_first:
            _check_ratio(worst, trainer.actor_critic.policy.dtype)
        max_log_ratio = max(max_log_ratio, worst)
        for name, value in statistics.items():
            sums[name] = sums.get(name, 0.0) + (value if len(index) else 0.0)
    sums = ranks.total(sums)
    grad_norm, critic_grad_norm = _clip_gradients(trainer, config.max_grad_norm)
    skipped = not all(map(math.isfinite, (sums["loss"], grad_norm, critic_grad_norm)))
    if not skipped:
        trainer.optimizer.step()
    norms = {"grad_norm": grad_norm, "critic_grad_norm": critic_grad_norm, "max_abs_log_ratio": max_log_ratio}
    return {"num_tokens": step.num_tokens, "skipped": skipped, **sums, **norms}


@dataclass(frozen=True)
class _Step:
    """One optimiser step: what its micro-batches share."""

    trainer: Trainer
    config: PPOConfig
    setting: _Setting
    num_samples: int
    num_tokens: int

    def accumulate(self, batch: _Batch) -> dict[str, float]:
        """Add a micro-batch's gradient; returns its share of the step's statistics, and its largest |log ρ|.

        A critic with a trunk of its own shares nothing with the policy: both go forward and backward side by side.
        """
        critic = self.trainer.actor_critic.critic
        if critic is None or batch.old_values_BR is None or batch.returns_BR is None:
            loss, statistics, _ = self._policy_loss(batch)
            self._backward(loss)
            return {"value_loss": 0.0, "value_clip_fraction": 0.0, **statistics}
        if critic.trunk is None:
            loss, statistics, hidden_ND = self._policy_loss(batch)
            value_loss, of_values = self._value_loss(batch, critic, hidden_ND)
            self._backward(value_loss if self.setting.warming_up else loss + value_loss)
        else:
            (statistics, of_values) = self.trainer.ranks.each([
                lambda: self._policy_alone(batch),
                lambda: self._critic_alone(batch, critic),
            ])  # fmt: skip
        loss = statistics["loss"] + self.config.vf_coef * of_values["value_loss"]
        return {**statistics, **of_values, "loss": loss}

    def _policy_alone(self, batch: _Batch) -> dict[str, float]:
        loss, statistics, _ = self._policy_loss(batch)
        self._backward(loss)
        return statistics

    def _critic_alone(self, batch: _Batch, critic: Critic) -> dict[str, float]:
        loss, statistics = self._value_loss(batch, critic, None)
        loss.backward()
        return statistics

    def _backward(self, loss: Tensor) -> None:
        """Without a graph where the policy stays as it is: AdamW leaves it alone then, moments included."""
        if loss.requires_grad:
            loss.backward()

    def _policy_loss(self, batch: _Batch) -> tuple[Tensor, dict[str, float], Tensor]:
        """(loss, statistics, the trunk's output before each response token)."""
        config, mask_BR = self.config, batch.sequences.response_mask_BR
        with torch.set_grad_enabled(not self.setting.warming_up):
            now = self.trainer.actor_critic.evaluate(batch.sequences, self.setting.temperature)
        ratios = log_ratio(now.logprobs_BR, batch.old_logprobs_BR, mask_BR, level=config.level)
        by_token = config.level == "token"
        mask = mask_BR if by_token else torch.ones_like(ratios, dtype=torch.bool)
        count = self.num_tokens if by_token else self.num_samples
        surrogate, is_clipped = clipped_surrogate(
            ratios,
            batch.advantages_BR if by_token else batch.advantages_BR[:, 0],
            clip_range=config.clip_range,
            clip_range_high=config.clip_range_high or config.clip_range,
            dual_clip=config.dual_clip,
        )
        if batch.weights is not None:
            surrogate = batch.weights * surrogate
        policy_loss = self._mean(surrogate, mask_BR) if by_token else surrogate.sum() / self.num_samples
        loss = policy_loss
        if config.entropy_coef:
            loss = loss - config.entropy_coef * self._mean(now.entropies_BR, mask_BR)
        if config.kl_loss_coef:
            kl_BR = token_kl(now.logprobs_BR, batch.ref_logprobs_BR, mask_BR, estimator=config.kl_loss_estimator)
            loss = loss + config.kl_loss_coef * self._mean(kl_BR, mask_BR)
        with torch.no_grad():
            worst = torch.where(mask_BR, now.logprobs_BR - batch.old_logprobs_BR, 0.0).abs().max()
            by_token_BR = log_ratio(now.logprobs_BR, batch.old_logprobs_BR, mask_BR, level="token")
            k3_BR = token_kl(now.logprobs_BR, batch.ref_logprobs_BR, mask_BR, estimator="k3")
            statistics = {
                "loss": torch.zeros_like(loss) if self.setting.warming_up else loss,
                "policy_loss": policy_loss,
                "entropy": masked_sum(now.entropies_BR, mask_BR) / self.num_tokens,
                "ref_k3": masked_sum(k3_BR, mask_BR) / self.num_tokens,
                "approx_kl": masked_sum(approx_kl(by_token_BR), mask_BR) / self.num_tokens,
                "clip_fraction": (is_clipped & mask).sum() / count,
                "ratio_mean": masked_sum(ratios.exp(), mask) / count,
                "max_abs_log_ratio": worst,
            }
        return loss, _numbers(statistics), now.hidden_ND

    def _value_loss(self, batch: _Batch, critic: Critic, hidden_ND: Tensor | None) -> tuple[Tensor, dict[str, float]]:
        """(c_v · L_value, statistics)."""
        assert batch.old_values_BR is not None, "a critic has said what it expects"
        assert batch.returns_BR is not None, "a critic learns from returns"
        mask_BR = batch.sequences.response_mask_BR
        values_BR = batch.sequences.scatter(critic.values(batch.sequences, hidden_ND))
        errors_BR, is_clipped_BR = clipped_value_loss(
            values_BR, batch.old_values_BR, batch.returns_BR, value_clip_range=self.config.value_clip_range
        )
        loss = masked_sum(errors_BR, mask_BR) / self.num_tokens
        with torch.no_grad():
            clipped = (is_clipped_BR & mask_BR).sum() / self.num_tokens
        return self.config.vf_coef * loss, _numbers({"value_loss": loss, "value_clip_fraction": clipped})

    def _mean(self, values_BR: Tensor, mask_BR: Tensor) -> Tensor:
        """This micro-batch's share of a mean over the step, as the config aggregates losses."""
        return aggregate(
            values_BR,
            mask_BR,
            aggregation=self.config.loss_aggregation,
            num_tokens=self.num_tokens,
            num_samples=self.num_samples,
            max_response_len=self.setting.max_response_len,
        )


def _numbers(statistics: dict[str, Tensor]) -> dict[str, float]:
    """Scalars on the device, fetched in one go."""
    values = cast("list[float]", torch.stack([value.detach().float() for value in statistics.values()]).tolist())
    return dict(zip(statistics, values, strict=True))


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
