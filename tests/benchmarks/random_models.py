"""Policies of any size with random weights, in memory, and the stages on made-up tokens: no files, no text."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, cast

import torch

from rlhf_core.contracts.batches import Experience, Prompts, Rollouts
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config
from rlhf_core.models.activations import fuse_activations
from rlhf_core.models.actor_critic import ActorCritic, new_optimizer
from rlhf_core.models.checkpoints import Trainer
from rlhf_core.models.critic import Critic, ValueHead
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.tokenizers import PolicyTokenizer
from rlhf_core.stages.generate import generate
from rlhf_core.stages.ppo_update import ppo_update

PROMPT_LEN = 8


@dataclass(frozen=True)
class Size:
    """What is measured. The defaults are the middle of every series."""

    batch: int = 64
    response_len: int = 24
    vocabulary: int = 4096
    hidden_size: int = 256
    layers: int = 4
    heads: int = 4


class Wordless:
    """A tokenizer that nobody reads, without special tokens."""

    def __init__(self) -> None:
        self.all_special_ids: list[int] = []
        self.all_special_tokens: list[str] = []
        self.added_tokens_decoder: dict[int, Any] = {}

    def decode(self, *_: Any, **__: Any) -> str:
        """Nothing."""
        return ""


class Bench:
    """A policy with a value head on its trunk, and prompts.

    Args:
        size: of everything.
        device: where it lives.
        dtype: float32 or bfloat16, of the computation.
        config: changes of the run's config, ``a.b=c``.
    """

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype, config: tuple[str, ...] = ()) -> None:
        torch.manual_seed(0)
        self.size = size
        self.config = _config(size, config)
        model = gpt2(size)
        fuse_activations(model)  # as a model that is loaded has them
        self.policy = LanguageModel(model, dtype=dtype, device=device)
        critic = Critic(ValueHead(self.policy.hidden_size), None, dtype=dtype).to(device)
        actor_critic = ActorCritic(self.policy, critic)
        self.trainer = Trainer(actor_critic, new_optimizer(actor_critic, self.config), 0)
        nothing_ends = frozenset({size.vocabulary})  # outside of the vocabulary: every response has full length
        self.tokenizer = PolicyTokenizer(cast("Any", Wordless()), nothing_ends, pad_id=0)
        self.prompts = _prompts(size)

    def generate(self) -> tuple[Rollouts, float]:
        """Responses, and the seconds they took."""
        _settle(self.policy.device)
        started = time.perf_counter()
        rollouts = generate(
            self.trainer.actor_critic,
            self.tokenizer,
            self.prompts,
            self.config.generation,
            samples_per_prompt=1,
            seed=0,
            iteration=self.trainer.iteration,
        ).batch
        _settle(self.policy.device)
        return rollouts, time.perf_counter() - started

    def update(self, rollouts: Rollouts) -> float:
        """Seconds of one update on made-up advantages."""
        experience = _experience(rollouts)
        _settle(self.policy.device)
        started = time.perf_counter()
        ppo_update(
            self.trainer,
            self.prompts,
            rollouts,
            experience,
            self.config.ppo,
            temperature=1.0,
            max_response_len=self.size.response_len,
            seed=0,
            iteration=0,
            num_iterations=1,
        )
        _settle(self.policy.device)
        return time.perf_counter() - started


def gpt2(size: Size) -> Any:
    """A GPT-2 with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=size.vocabulary,
            n_positions=PROMPT_LEN + size.response_len,
            n_embd=size.hidden_size,
            n_layer=size.layers,
            n_head=size.heads,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()


def _config(size: Size, changes: tuple[str, ...]) -> RunConfig:
    tree = {
        "prompts": {"source": "none", "batch_size": size.batch},
        "policy": {"model": "none", "critic": {"kind": "shared"}},
        "reward": {"components": [{"kind": "function", "function": "length"}]},
        "generation": {"max_new_tokens": size.response_len},
        "ppo": {"learning_rate": 1e-6, "num_minibatches": 4, "lr_schedule": "constant"},
    }
    return build_config(tree, list(changes))


def _prompts(size: Size) -> Prompts:
    tokens_QP = torch.randint(size.vocabulary, (size.batch, PROMPT_LEN), generator=torch.Generator().manual_seed(1))
    rows = range(size.batch)
    return Prompts(
        prompt_ids=list(rows),
        texts=["" for _ in rows],
        messages=[[] for _ in rows],
        tokens_QP=tokens_QP,
        mask_QP=torch.ones_like(tokens_QP, dtype=torch.bool),
        num_truncated=[0 for _ in rows],
        columns=[{} for _ in rows],
    )


def _experience(rollouts: Rollouts) -> Experience:
    """Random advantages and returns; the reference is the policy itself."""
    mask_BR = rollouts.response_mask_BR
    random_BR = torch.randn(mask_BR.shape, generator=torch.Generator().manual_seed(2)) * mask_BR
    none_B, none_BR = torch.zeros(len(mask_BR)), torch.zeros(mask_BR.shape)
    return Experience(
        sample_ids=rollouts.sample_ids,
        score_B=none_B,
        score_normalized_B=none_B,
        score_clipped_B=none_B,
        score_shaped_B=none_B,
        kl_B=none_B,
        k3_B=none_B,
        rlhf_reward_B=none_B,
        token_kl_BR=none_BR,
        rewards_BR=none_BR,
        advantages_BR=random_BR,
        returns_BR=random_BR,
        response_mask_BR=mask_BR,
    )


def _settle(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
