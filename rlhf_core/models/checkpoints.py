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

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_core.contracts.artifacts import check_folder, commit_folder
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import canonical_json, digest_json
from rlhf_core.contracts.durable import read_file
from rlhf_core.contracts.errors import IntegrityError, NumericalError, UserError
from rlhf_core.contracts.loop_state import LoopState
from rlhf_core.contracts.records import MAX_BYTES, read_json
from rlhf_core.models.activations import fuse_activations
from rlhf_core.models.actor_critic import ActorCritic, new_optimizer, trainable_trunk
from rlhf_core.models.critic import Critic, ValueHead
from rlhf_core.models.language_model import DTYPES
from rlhf_core.models.policy import load_policy, policy_tensors, save_policy
from rlhf_core.models.ranks import ALONE, Ranks
from rlhf_core.models.untrusted import check_is_data, check_size, transformers_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SLOTS = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW keeps of a parameter."""


@dataclass
class Trainer:
    """Policy, critic and optimizer after some updates: what only ``ppo_update`` changes."""

    actor_critic: ActorCritic
    optimizer: torch.optim.AdamW
    iteration: int
    """Updates done."""
    ranks: Ranks = ALONE
    """Who has the weights and moments: this process, or each rank of a group a part of them."""

    def digest(self) -> str:
        """sha256 over every trained parameter: the identity of the weights."""
        named = list(self.actor_critic.named_parameters())
        digests = self.ranks.digests([parameter.detach() for _, parameter in named])
        return digest_json([[name, digest] for (name, _), digest in zip(named, digests, strict=True)])

    def check_finite(self) -> None:
        """Raise NumericalError naming the first weight or optimizer moment that is not finite."""
        if (name := self.first_not_finite()) is not None:
            raise NumericalError(
                f"{name} is not finite after {self.iteration} updates: nothing of it is saved, and the checkpoints and "
                "artifacts before it are intact; begin again with a lower ppo.learning_rate"
            )

    def first_not_finite(self) -> str | None:
        """The first weight or optimizer moment that is not finite."""
        named = [(name, parameter.detach()) for name, parameter in self.actor_critic.named_parameters()]
        for name, parameter in self.actor_critic.named_parameters():
            moments = self.optimizer.state.get(parameter, {})
            named += [(f"{slot} of {name}", value) for slot, value in moments.items()]
        return self.ranks.first([(name, self.ranks.part(tensor)) for name, tensor in named])


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
    Returns: each file -> sha256; on the first rank, which alone writes.
    Raises: NumericalError if a weight or moment is not finite: such a checkpoint is never committed.
    """
    trainer.check_finite()
    policy, critic = trainer.actor_critic.policy, trainer.actor_critic.critic
    of_policy = trainer.ranks.gathered(policy_tensors(policy).items())
    of_critic = {} if critic is None else trainer.ranks.gathered(critic.named_parameters())
    of_optimizer = trainer.ranks.gathered(_optimizer_tensors(trainer).items())
    record = {"iteration": state.iteration, "identity": identity, "weights": trainer.digest()}
    if trainer.ranks.rank > 0:
        return {}

    def fill(folder: Path) -> None:
        save_policy(policy, folder, merge=merge_adapter, tensors=of_policy)
        tokenizer.save_pretrained(folder / "policy")
        if critic is not None:
            (folder / "critic").mkdir()
            if critic.trunk is not None:
                critic.trunk.config.save_pretrained(folder / "critic")
            save_file(of_critic, folder / "critic" / "critic.safetensors")
        save_file(of_optimizer, folder / "optimizer.safetensors")
        (folder / "state.json").write_bytes(canonical_json(state.to_json()) + b"\n")

    return commit_folder(path, fill, record)


def load_checkpoint(
    path: Path, config: RunConfig, device: torch.device, *, identities: Collection[str] | None = None
) -> tuple[Trainer, LoopState]:
    """Read a checkpoint folder after checking every digest.

    Args:
        path: of the folder; one that is named by a number holds the state before that iteration.
        config: of its run.
        device: for the models.
        identities: digests of those that the run has had; None where any run's checkpoint will do.
    Raises: IntegrityError if it is damaged, or another one than its place says.
    """
    record = check_folder(path)
    if path.name.isdecimal() and record.get("iteration") != int(path.name):
        raise IntegrityError(f"{path} holds the checkpoint of iteration {record.get('iteration')}: it was moved there")
    if identities is not None and record.get("identity") not in identities:
        raise IntegrityError(f"{path} is a checkpoint of another run: its identity is not that of run.json")
    state = LoopState.from_json(read_json(read_file(path / "state.json", MAX_BYTES), origin=str(path / "state.json")))
    try:
        policy = load_policy(config, device, checkpoint=path)
        critic = _load_critic(path / "critic", config, device) if config.uses_critic else None
    except UserError as error:
        raise IntegrityError(f"{path} does not load, though its digests hold: {error}") from None
    actor_critic = ActorCritic(policy, critic)
    trainer = Trainer(actor_critic, new_optimizer(actor_critic, config), state.iteration)
    _restore_optimizer(trainer, _tensors(path / "optimizer.safetensors"))
    if (broken := trainer.first_not_finite()) is not None:
        raise IntegrityError(
            f"{path} holds a number that is not finite, in {broken}: this release never saves such a checkpoint; "
            "delete it and resume, which starts from the one before"
        )
    if trainer.digest() != record.get("weights"):
        raise IntegrityError(f"{path} gives other weights than were saved: it does not belong to this config")
    return trainer, state


def _load_critic(path: Path, config: RunConfig, device: torch.device) -> Critic:
    from transformers import AutoModel

    tensors = _tensors(path / "critic.safetensors")
    trunk: Any = None
    if (path / "config.json").is_file():
        check_is_data(str(path), "critic")
        check_size("AutoModel", str(path), "critic")
        model_config = transformers_config(path)
        trunk = AutoModel.from_config(model_config, dtype=torch.float32, trust_remote_code=False)
        fuse_activations(trunk)
        trunk = trainable_trunk(trunk, config)
    width = tensors["head.weight"].shape[-1] if "head.weight" in tensors else 0
    critic = Critic(ValueHead(width), trunk, dtype=DTYPES[config.policy.dtype])
    parameters = dict(critic.named_parameters())
    if {n: p.shape for n, p in parameters.items()} != {n: t.shape for n, t in tensors.items()}:
        raise IntegrityError(f"{path} does not hold the weights of this critic; delete this checkpoint and resume")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return critic.to(device)


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise IntegrityError(f"{path} is no safetensors file: {error}; delete this checkpoint and resume") from None


def _optimizer_tensors(trainer: Trainer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainer.actor_critic.named_parameters():
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            tensors[f"{name}|{key}"] = value
    return tensors


def _restore_optimizer(trainer: Trainer, tensors: dict[str, Tensor]) -> None:
    parameters: dict[str, nn.Parameter] = dict(trainer.actor_critic.named_parameters())
    for key, value in tensors.items():
        name, _, slot = key.rpartition("|")
        parameter = parameters.get(name)
        if parameter is None:
            raise IntegrityError(f"the optimizer state names {name}, which this model does not have")
        if slot not in SLOTS or value.shape not in (parameter.shape, torch.Size([])):
            raise IntegrityError(
                f"the optimizer state has {key}, which does not fit; delete this checkpoint and resume"
            )
        trainer.optimizer.state[parameter][slot] = value.to(parameter.device)
