"""The trained half of a run: policy, critic, and the optimizer that moves them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.activations import fuse_activations
from rlhf_core.models.causality import is_causal
from rlhf_core.models.critic import Critic, ValueHead
from rlhf_core.models.critic_start import with_critic_start
from rlhf_core.models.language_model import DTYPES, LanguageModel, load_transformers_model
from rlhf_core.models.policy import initial_trunk, load_policy
from rlhf_core.models.recompute import recompute_activations
from rlhf_core.models.score_heads import linear_of
from rlhf_core.models.sequences import Sequences
from rlhf_core.models.trunk import trunk_of
from rlhf_core.ops.randomness import seeded_generator


@dataclass(frozen=True)
class Evaluation:
    """What the policy says of response tokens. Gradients flow through all three."""

    logprobs_BR: Tensor
    entropies_BR: Tensor
    hidden_ND: Tensor
    """The trunk's output before each real response token, which a shared critic reads."""


class ActorCritic:
    """Policy and critic, evaluated together.

    Args:
        policy: trainable language model.
        critic: None for estimators without a value function.
    """

    def __init__(self, policy: LanguageModel, critic: Critic | None) -> None:
        self.policy, self.critic = policy, critic

    @classmethod
    def initial(cls, config: RunConfig, device: torch.device) -> ActorCritic:
        """Policy and critic as they are before the first iteration. Raises UserError if a model does not load."""
        policy = load_policy(config, device)
        return cls(policy, initial_critic(config, policy, device) if config.uses_critic else None)

    def evaluate(self, sequences: Sequences, temperature: float) -> Evaluation:
        """Log-probs and entropies of the response tokens; zero where padded."""
        hidden_ND = self.policy.hidden_states(sequences.read, sequences.before_response_N)
        logprobs_N, entropies_N = self.policy.response_logprobs(sequences, hidden_ND, temperature)
        return Evaluation(sequences.scatter(logprobs_N), sequences.scatter(entropies_N), hidden_ND)

    def policy_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Named trained parameters of the policy: all, tied ones once; with LoRA the adapter's."""
        return [(f"policy.{name}", p) for name, p in self.policy.model.named_parameters() if p.requires_grad]

    def critic_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Named parameters of the critic; none without one."""
        return [] if self.critic is None else [(f"critic.{name}", p) for name, p in self.critic.named_parameters()]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All trained parameters, in a fixed order."""
        yield from self.policy_parameters()
        yield from self.critic_parameters()


def initial_critic(config: RunConfig, policy: LanguageModel, device: torch.device) -> Critic:
    """The critic before the first iteration.

    A separate critic starts from the policy's trunk or a random one with a zero head, or from the first
    reward model, score head included. Raises UserError if that model does not load or has another width.
    """
    config = with_critic_start(config)
    dtype = DTYPES[config.policy.dtype]
    if config.policy.critic.kind == "shared":
        return Critic(ValueHead(policy.hidden_size), None, dtype=dtype).to(device)
    head = ValueHead(policy.hidden_size)
    if config.critic_init == "reward":
        head, trunk = _from_reward_model(config)
    elif config.critic_init == "policy":
        trunk = initial_trunk(config)
    else:
        trunk = _random_trunk(policy, config.seed)
    return Critic(head, trainable_trunk(trunk, config), dtype=dtype).to(device)


def new_optimizer(actor_critic: ActorCritic, config: RunConfig) -> torch.optim.AdamW:
    """AdamW over policy, its embeddings and the critic: a named group each, for a learning rate of its own."""
    embeddings = actor_critic.policy.embedding_ids()
    named: dict[str, list[nn.Parameter]] = {"policy": [], "embeddings": [], "critic": []}
    for _, parameter in actor_critic.policy_parameters():
        named["embeddings" if id(parameter) in embeddings else "policy"].append(parameter)
    named["critic"] = [p for _, p in actor_critic.critic_parameters()]
    return torch.optim.AdamW(
        [{"name": name, "params": parameters} for name, parameters in named.items() if parameters],
        lr=config.ppo.learning_rate,
        betas=(config.ppo.adam_beta1, config.ppo.adam_beta2),
        eps=config.ppo.adam_eps,
        weight_decay=config.ppo.weight_decay,
        fused=True,
    )


def trainable_trunk(trunk: Any, config: RunConfig) -> Any:
    """A critic's transformer: trained, dropout off. Raises UserError if its activations cannot be recomputed."""
    if config.policy.gradient_checkpointing:
        recompute_activations(trunk, field="the critic's model")
    return cast("nn.Module", trunk).eval().requires_grad_(True)


def _from_reward_model(config: RunConfig) -> tuple[ValueHead, Any]:
    """The first reward model's score head and trunk, if it reads from left to right as a critic must."""
    component = config.reward.first_model
    assert component is not None, "the config was checked"
    field = f"reward.components.{config.reward.components.index(component)}.model"
    model = load_transformers_model("AutoModelForSequenceClassification", component.model, torch.float32, field)
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear) or not is_causal(trunk_of(model)):
        raise UserError(
            f"policy.critic.init is reward, but {field} {component.model!r} ({model.config.model_type}) does not read "
            "from left to right, and a critic must not see the future; use policy.critic.init policy"
        )
    head = ValueHead(score.in_features)
    with torch.no_grad():
        for own, given in zip((head.weight, head.bias), linear_of(score), strict=True):
            own.copy_(given)
    return head, trunk_of(model)


def _random_trunk(policy: LanguageModel, seed: int) -> Any:
    """The policy's architecture with weights drawn from the run's seed, leaving the global generator alone."""
    from transformers import AutoModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seeded_generator(seed, "critic").integers(np.iinfo(np.int64).max)))
        trunk = AutoModel.from_config(policy.config, dtype=torch.float32, trust_remote_code=False)
    fuse_activations(trunk)
    return trunk
