"""A trainer whose weights and moments lie in parts on the ranks of a group: FSDP2's ``fully_shard``.

Each transformer block is gathered when it is needed and let go of behind; so is what lies around the blocks, embeddings
and head included, for as long as a pass takes. Gradients are summed over the ranks, not averaged: a loss is divided by
the tokens or samples of the whole optimiser step already.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from rlhf_core.contracts.config import RunConfig
from rlhf_core.models.actor_critic import ActorCritic, Evaluation, new_optimizer
from rlhf_core.models.checkpoints import Trainer
from rlhf_core.models.critic import Critic
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.ranks import GroupRanks
from rlhf_core.models.sequences import Sequences


class ShardedActorCritic(ActorCritic):
    """Policy and critic in parts. Every rank calls the same at the same time.

    Args:
        policy: whole; sharded in place.
        critic: likewise.
        mesh: of the ranks.
    """

    def __init__(self, policy: LanguageModel, critic: Critic | None, mesh: Any) -> None:
        from torch.distributed.fsdp import register_fsdp_forward_method

        super().__init__(policy, critic)
        self._pass = _Pass(super().evaluate, policy.model)
        policy.leave_to_transformers()
        _shard(self._pass, mesh)
        if critic is not None:
            critic.leave_to_transformers()
            values = critic.values
            # FSDP puts its hook on what comes out, which must be no view
            cast("Any", critic).values = lambda *read: values(*read).clone()
            _shard(critic, mesh)
            register_fsdp_forward_method(critic, "values")

    def evaluate(self, sequences: Sequences, temperature: float) -> Evaluation:
        """Log-probs and entropies of the response tokens; zero where padded."""
        return Evaluation(*self._pass(sequences, temperature))


class _Pass(nn.Module):
    """The policy from tokens to log-probs: what needs its head, which lies outside of the trunk, belongs to it."""

    def __init__(self, evaluate: Any, model: nn.Module) -> None:
        super().__init__()
        self.model, self._evaluate = model, evaluate

    def forward(self, sequences: Sequences, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        found = self._evaluate(sequences, temperature)
        return found.logprobs_BR, found.entropies_BR, found.hidden_ND


def shard_trainer(trainer: Trainer, config: RunConfig, ranks: GroupRanks) -> Trainer:
    """Keep this rank's parts of a trainer, and let go of the rest.

    Args:
        trainer: whole, the same on all ranks; used up.
        config: of its run.
        ranks: of the default process group.
    Returns: a trainer with the same weights and moments.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, distribute_tensor

    moments = {name: trainer.optimizer.state.get(p, {}) for name, p in trainer.actor_critic.named_parameters()}
    whole = trainer.actor_critic
    whole.policy.device = ranks.device
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    actor_critic = ShardedActorCritic(whole.policy, whole.critic, mesh)
    optimizer = new_optimizer(actor_critic, config)
    for name, parameter in actor_critic.named_parameters():
        assert isinstance(parameter, DTensor), f"{name} was left whole"
        for slot, value in moments[name].items():
            is_moment = value.shape == parameter.shape and value.ndim > 0
            optimizer.state[parameter][slot] = (
                distribute_tensor(value, mesh, parameter.placements, src_data_rank=None)
                if is_moment
                else value.to(ranks.device)
            )
    return Trainer(actor_critic, optimizer, trainer.iteration, ranks)


def _shard(root: nn.Module, mesh: Any) -> None:
    """Shard the blocks of a model, then what is left of it."""
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    for block in [module for module in root.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(block, mesh=mesh)
    fully_shard(root, mesh=mesh, reshard_after_forward=True)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
