"""Weights that the process of a run hands to its workers, before the iteration that they answer with.

A folder that commits itself, with every trained parameter and the digest that its update committed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rlhf_core.contracts.artifacts import check_folder, commit_folder
from rlhf_core.contracts.durable import remove_folder
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.models.actor_critic import ActorCritic
from rlhf_core.models.ranks import ALONE, Ranks

FILE = "weights.safetensors"


def hand_out(path: Path, actor_critic: ActorCritic, digest: str, ranks: Ranks = ALONE) -> None:
    """Write the trained parameters of policy and critic, unless the folder holds them already.

    Args:
        path: of the folder; whatever else stands there is replaced.
        actor_critic: as the iteration finds it.
        digest: of these weights, as ``Trainer.digest`` has it.
        ranks: who has them; the first one writes.
    """
    tensors = ranks.gathered(actor_critic.named_parameters())
    if ranks.rank > 0:
        return
    if is_handed_out(path, digest):
        return
    if path.is_dir():
        remove_folder(path)
    commit_folder(path, lambda folder: save_file(tensors, folder / FILE), {"weights": digest})


def is_handed_out(path: Path, digest: str) -> bool:
    """Whether a folder holds weights of this digest, undamaged."""
    try:
        return path.is_dir() and check_folder(path).get("weights") == digest
    except IntegrityError:
        return False


@torch.no_grad()
def take_up(path: Path, actor_critic: ActorCritic, digest: str) -> None:
    """Give a policy and critic the weights that were handed out, in place.

    Raises: IntegrityError if they are missing, damaged, or of another digest or shape.
    """
    if check_folder(path).get("weights") != digest:
        raise IntegrityError(f"{path} holds other weights than the iteration begins with; resume hands them out again")
    tensors, named = load_file(path / FILE), dict(actor_critic.named_parameters())
    if tensors.keys() != named.keys() or any(tensors[name].shape != p.shape for name, p in named.items()):
        raise IntegrityError(f"{path} holds the weights of another model than the run's")
    for name, parameter in named.items():
        parameter.copy_(tensors[name])
