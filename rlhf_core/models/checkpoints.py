"""Checkpoints: everything a run needs to go on, as safetensors and JSON, in one commit.

checkpoints/000010/policy/               loads with AutoModelForCausalLM.from_pretrained; tokenizer beside it
                                         (with LoRA the adapter alone: AutoPeftModelForCausalLM.from_pretrained)
checkpoints/000010/adapter/              the adapter, where policy.lora.save is merged and policy/ a whole model
checkpoints/000010/critic/               critic.safetensors (+ config.json of a separate trunk)
checkpoints/000010/optimizer.safetensors exp_avg, exp_avg_sq and step of every parameter
checkpoints/000010/state.json            the loop state: iteration, β, cursor, moments, episodes
checkpoints/000010/manifest.json         sha256 of each file above, of all weights, and of the run's identity
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_core.contracts.artifacts import check_folder, commit_folder
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import canonical_json
from rlhf_core.contracts.errors import IntegrityError, NumericalError
from rlhf_core.contracts.loop_state import LoopState
from rlhf_core.contracts.records import read_json
from rlhf_core.models.actor_critic import ActorCritic, new_optimizer, trainable_trunk
from rlhf_core.models.critic import Critic, ValueHead
from rlhf_core.models.language_model import DTYPES
from rlhf_core.models.policy import load_policy, save_policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Trainer:
    """Policy, critic and optimizer after some updates: what only ``ppo_update`` changes."""

    actor_critic: ActorCritic
    optimizer: torch.optim.AdamW
    iteration: int
    """Updates done."""

    def digest(self) -> str:
        """sha256 over every trained parameter: the identity of the weights."""
        digest = hashlib.sha256()
        for name, parameter in self.actor_critic.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()


def new_trainer(config: RunConfig, device: torch.device) -> Trainer:
    """The trainer before the first iteration. Raises UserError if a model does not load."""
    actor_critic = ActorCritic.initial(config, device)
    return Trainer(actor_critic, new_optimizer(actor_critic, config), iteration=0)


def save_checkpoint(
    path: Path,
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    state: LoopState,
    *,
    identity: str = "",
    merge_adapter: bool = False,
) -> dict[str, str]:
    """Commit a checkpoint folder.

    Args:
        path: must not exist yet.
        trainer: after ``state.iteration`` updates.
        tokenizer: saved beside the policy, so that the folder is complete.
        state: the loop state of the next iteration.
        identity: digest of the run's identity.
        merge_adapter: ``policy.lora.save`` is merged.
    Returns: each file -> sha256.
    Raises: NumericalError if a parameter is not finite: such a checkpoint is never committed.
    """
    for name, parameter in trainer.actor_critic.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NumericalError(f"parameter {name} is not finite after iteration {state.iteration - 1}; not saved")

    def fill(folder: Path) -> None:
        save_policy(trainer.actor_critic.policy, folder, merge=merge_adapter)
        tokenizer.save_pretrained(folder / "policy")
        critic = trainer.actor_critic.critic
        if critic is not None:
            (folder / "critic").mkdir()
            if critic.trunk is not None:
                critic.trunk.config.save_pretrained(folder / "critic")
            save_file(_contiguous(dict(critic.named_parameters())), folder / "critic" / "critic.safetensors")
        save_file(_optimizer_tensors(trainer), folder / "optimizer.safetensors")
        (folder / "state.json").write_bytes(canonical_json(state.to_json()) + b"\n")

    record = {"iteration": state.iteration, "identity": identity, "weights": trainer.digest()}
    return commit_folder(path, fill, record)


def load_checkpoint(path: Path, config: RunConfig, device: torch.device) -> tuple[Trainer, LoopState]:
    """Read a checkpoint folder after checking every digest. Raises IntegrityError if it is damaged."""
    record = check_folder(path)
    state = LoopState.from_json(read_json((path / "state.json").read_bytes(), origin=str(path / "state.json")))
    policy = load_policy(config, device, checkpoint=path)
    critic = _load_critic(path / "critic", config, device) if config.uses_critic else None
    actor_critic = ActorCritic(policy, critic)
    trainer = Trainer(actor_critic, new_optimizer(actor_critic, config), state.iteration)
    _restore_optimizer(trainer, load_file(path / "optimizer.safetensors"))
    if trainer.digest() != record.get("weights"):
        raise IntegrityError(f"{path} gives other weights than were saved: it does not belong to this config")
    return trainer, state


def _load_critic(path: Path, config: RunConfig, device: torch.device) -> Critic:
    from transformers import AutoConfig, AutoModel

    tensors = load_file(path / "critic.safetensors")
    trunk: Any = None
    if (path / "config.json").is_file():
        trunk = trainable_trunk(AutoModel.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32), config)
    critic = Critic(ValueHead(tensors["head.weight"].shape[1]), trunk, dtype=DTYPES[config.policy.dtype])
    parameters = dict(critic.named_parameters())
    if parameters.keys() != tensors.keys():
        raise IntegrityError(f"{path} does not hold the weights of this critic")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return critic.to(device)


def _optimizer_tensors(trainer: Trainer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainer.actor_critic.named_parameters():
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            tensors[f"{name}|{key}"] = value.detach().cpu().contiguous()
    return tensors


def _restore_optimizer(trainer: Trainer, tensors: dict[str, Tensor]) -> None:
    parameters: dict[str, nn.Parameter] = dict(trainer.actor_critic.named_parameters())
    for key, value in tensors.items():
        name, _, slot = key.rpartition("|")
        parameter = parameters.get(name)
        if parameter is None:
            raise IntegrityError(f"the optimizer state names {name}, which this model does not have")
        trainer.optimizer.state[parameter][slot] = value.to(parameter.device)


def _contiguous(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
