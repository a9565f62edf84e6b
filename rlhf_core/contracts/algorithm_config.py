"""The sections `kl`, `shaping` and `ppo` of the config: the mathematics of an iteration."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf_core.contracts.section import Fraction, Positive, PositiveFloat, Section


class KLConfig(Section):
    """The KL penalty and the controller of its coefficient β."""

    coef: Annotated[float, Field(ge=0)] = Field(default=0.15, description="β at the first iteration")
    controller: Literal["fixed", "adaptive", "log_pi"] = Field(
        default="adaptive", description="adaptive: Ziegler et al. 2019; log_pi: holds the target more tightly"
    )
    target: PositiveFloat = Field(default=6.0, description="nats per response, summed over its tokens")
    horizon: PositiveFloat = Field(
        default=10_000.0, description="adaptive: episodes, at least batch_size; smaller moves β faster"
    )
    proportional_gain: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="log_pi: β moves against the climb of log KL, this much"
    )
    integral_gain: Annotated[float, Field(ge=0)] = Field(
        default=0.25,
        description="log_pi: log β moves by this x log(KL / target), bounded by ± 0.2, an iteration; at most 1",
    )
    estimator: Literal["k1", "k2", "k3"] = Field(
        default="k1",
        description="form of the penalty; only k1 has the gradient of the KL there, k2 and k3 hold with next to no "
        "force near the reference; k1 and k3 are logged",
    )

    @property
    def held_at(self) -> float | None:
        """The KL that the controller holds; None where β is fixed."""
        return None if self.controller == "fixed" else self.target

    @model_validator(mode="after")
    def _beta_can_move(self) -> Self:
        if self.controller != "fixed" and self.coef == 0:
            raise ValueError(
                f"kl.coef is 0 and kl.controller is {self.controller}: β would stay 0; use kl.controller fixed"
            )
        return self


class ShapingConfig(Section):
    """From scores and KL to rewards and advantages."""

    level: Literal["token", "sequence"] = Field(
        default="token",
        description="token: -β·kl on each token, the score on the last; sequence: all of it on the last",
    )
    estimator: Literal["gae", "value", "reward", "rloo", "group", "reinforce++"] = Field(
        default="gae",
        description="advantage estimator; gae and value have a critic, rloo and group need samples_per_prompt ≥ 2",
    )
    group_std: bool = Field(default=True, description="group: divide by the std of the prompt's responses")
    gamma: Fraction = Field(default=1.0, description="discount per token")
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = Field(default=0.9, description="λ of gae")
    score_normalization: Literal["none", "running", "reference"] = Field(
        default="none",
        description="running: mean and std so far; reference: of the first batch, sampled from the reference",
    )
    score_clip: PositiveFloat | None = Field(default=None, description="bound of |score| after normalisation")
    missing_eos_penalty: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="for a response cut at the length limit"
    )
    missing_eos_mode: Literal["subtract", "set"] = Field(
        default="subtract", description="subtract the penalty from the score, or set the score to -penalty"
    )
    length_penalty: Annotated[float, Field(ge=0)] = Field(default=0.0, description="subtracted per response token")
    whiten_rewards: bool = Field(
        default=False,
        description="rewards to std 1 around their mean, which stays: (x - mean) / std + mean, over tokens (level "
        "sequence: over responses)",
    )
    whiten_advantages: bool = Field(default=True, description="mean 0, std 1 over the whole batch")


class PPOConfig(Section):
    """The clipped-surrogate update."""

    learning_rate: PositiveFloat = Field(default=1e-5, description="peak learning rate of the policy")
    embedding_lr_factor: PositiveFloat = Field(
        default=3.0, description="learning rate of the token embeddings and the output head, over learning_rate"
    )
    critic_learning_rate: PositiveFloat | None = Field(default=None, description="null: learning_rate")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        default="linear", description="decay to 0 over num_iterations"
    )
    warmup_iterations: Annotated[int, Field(ge=0)] = Field(default=0, description="linear warm-up")
    critic_warmup_iterations: Annotated[int, Field(ge=0)] = Field(
        default=0, description="first iterations that train the critic alone"
    )
    num_ppo_epochs: Positive = Field(default=1, description="passes over the batch")
    num_minibatches: Positive = Field(default=4, description="optimiser steps in a pass")
    micro_batch_size: Positive | None = Field(
        default=None, description="responses per forward pass (gradient accumulation); null: the whole minibatch"
    )
    level: Literal["token", "sequence"] = Field(
        default="token",
        description="one ratio per token, or per response: then the surrogate, clip fraction and ratio are means over "
        "responses, everything else stays a mean over tokens",
    )
    clip_range: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.2, description="ε (below 1)")
    clip_range_high: PositiveFloat | None = Field(default=None, description="ε above 1; null: clip_range")
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        default=None, description="c: bounds the loss at -c·A where A < 0; 3 is usual; null: off"
    )
    value_clip_range: PositiveFloat | None = Field(default=0.2, description="null: no value clipping")
    vf_coef: Annotated[float, Field(ge=0)] = Field(default=0.1, description="weight of the value loss")
    entropy_coef: Annotated[float, Field(ge=0)] = Field(default=0.0, description="weight of the entropy bonus")
    kl_loss_coef: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="weight of the KL to the reference in the loss, beside the KL in the reward"
    )
    kl_loss_estimator: Literal["k3", "k2", "k3+"] = Field(
        default="k3",
        description="of that KL; k3 has the gradient of KL(reference ‖ policy), k2 that of KL(policy ‖ reference), k3+ "
        "the value of k3 with the gradient of k2",
    )
    loss_aggregation: Literal["token_mean", "sequence_mean", "fixed_length"] = Field(
        default="token_mean",
        description="mean over tokens; over responses of their token means; or sums divided by max_new_tokens",
    )
    max_grad_norm: PositiveFloat | None = Field(default=1.0, description="gradient clipping; null: off")
    target_kl: PositiveFloat | None = Field(
        default=None,
        description="skip the remaining epochs once an epoch's KL to the behaviour policy exceeds this: nats per "
        "token, at either level",
    )
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_eps: PositiveFloat = Field(default=1e-5, description="PyTorch's 1e-8 makes first steps far too large")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    importance_cap: Annotated[float, Field(ge=1)] = Field(
        default=2.0,
        description="largest importance weight of a token (or response, at sequence level) that another policy or "
        "arithmetic has drawn: execution.overlap, generation.engine",
    )
    importance_threshold: Annotated[float, Field(ge=0)] = Field(
        default=0.01,
        description="mean gap between a token's log-prob by its sampler and by the policy above which weights are used",
    )
    max_skipped_steps: Positive = Field(default=3, description="non-finite steps in a row that stop the run")
