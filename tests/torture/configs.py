"""Configurations that keep some state of their own from iteration to iteration: each must resume exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tiny_world import Tiny
from torture.runs import battery_config

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config

CASES: Final[dict[str, Sequence[str]]] = {
    "gae with a critic of its own, from the policy": (),
    "a critic of its own, from the reward model, with a warm-up": (
        "policy.critic.init=reward",
        "ppo.critic_warmup_iterations=1",
    ),
    "gae with a critic on the policy's trunk": ("policy.critic.kind=shared", "policy.critic.init=null"),
    "value, with a critic from nothing": ("shaping.estimator=value", "policy.critic.init=zero"),
    "rloo": ("shaping.estimator=rloo", "prompts.samples_per_prompt=2"),
    "group": ("shaping.estimator=group", "prompts.samples_per_prompt=4"),
    "LoRA, adapter saved": ("policy.lora.rank=2", "ppo.learning_rate=1e-2"),
    "LoRA, merged": ("policy.lora.rank=2", "policy.lora.save=merged", "ppo.learning_rate=1e-2"),
    "LoRA, critic on the trunk": ("policy.lora.rank=2", "policy.critic.kind=shared", "policy.critic.init=null"),
    "reinforce++, with β by log_pi": ("shaping.estimator=reinforce++", "kl.controller=log_pi"),
    "running normalisation of scores": ("shaping.score_normalization=running", "shaping.score_clip=3"),
    "normalisation by the first batch, whitened rewards": (
        "shaping.score_normalization=reference",
        "shaping.whiten_rewards=true",
        "shaping.missing_eos_penalty=1",
    ),
    "gradients accumulated, a schedule with a warm-up, and weight decay": (
        "ppo.micro_batch_size=2",
        "ppo.lr_schedule=cosine",
        "ppo.warmup_iterations=2",
        "ppo.weight_decay=0.1",
    ),
    "by shards": ("execution.num_shards=3", "execution.num_workers=0"),
    "by shards, which answer ahead": ("execution.num_shards=2", "execution.num_workers=0", "execution.overlap=true"),
    "iterations go into the archive": ("artifacts.keep_iterations=1",),
    "prompts run out and begin again, frozen models are read again": ("prompts.batch_size=16", "frozen_models=disk"),
}
"""Name -> changes of the battery's config. β is adaptive and every second iteration has a checkpoint, as there."""

COMBINED: Final[dict[str, Sequence[str]]] = {
    "gae, the reward model's critic in warm-up, running scores, a schedule, archive": (
        *CASES["a critic of its own, from the reward model, with a warm-up"],
        *CASES["running normalisation of scores"],
        *CASES["gradients accumulated, a schedule with a warm-up, and weight decay"],
        *CASES["iterations go into the archive"],
    ),
    "LoRA merged, value on the trunk, first batch's scores, shards ahead": (
        *CASES["LoRA, merged"],
        *CASES["LoRA, critic on the trunk"],
        "shaping.estimator=value",
        *CASES["normalisation by the first batch, whitened rewards"],
        *CASES["by shards, which answer ahead"],
    ),
    "rloo, LoRA adapter, running scores, prompts begin again, shards, archive": (
        *CASES["rloo"],
        *CASES["LoRA, adapter saved"],
        *CASES["running normalisation of scores"],
        *CASES["prompts run out and begin again, frozen models are read again"],
        *CASES["by shards"],
        *CASES["iterations go into the archive"],
    ),
    "reinforce++ with β by log_pi, a schedule, shards, frozen models from disk": (
        *CASES["reinforce++, with β by log_pi"],
        *CASES["gradients accumulated, a schedule with a warm-up, and weight decay"],
        "frozen_models=disk",
        "execution.num_shards=2",
        "execution.num_workers=0",
    ),
}
"""A few configurations that together hold the kinds of state of all the cases, several in each: the fast tier's."""


def config_of(tiny: Tiny, case: str) -> RunConfig:
    """The config of a case."""
    return build_config(battery_config(tiny).model_dump(), list((CASES | COMBINED)[case]))
