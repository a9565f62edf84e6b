"""Policies on the straight line between a reference and what was trained from it.

    θ(a) = θ_ref + a (θ - θ_ref),    0 <= a <= 1

A run that went far in KL holds, between its reference and itself, a policy for each smaller KL: the share a of the
way is picked after training. Source: Ramé et al. 2024, WARP (arXiv 2406.16768), section 3.3, "linear interpolation
towards the initialization".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.adapters import TRAINED, is_adapter, merged, read_adapter
from rlhf_core.models.language_model import DTYPES, PROBE_TOLERANCE, LanguageModel, load_transformers_model
from rlhf_core.models.policy import load_policy
from rlhf_core.models.tokenizers import drawable_tokens

SECOND_FACTORS = ("lora_B", "lora_embedding_B")
"""An adapter adds B·A: with A as trained, what it adds is linear in B."""


class Interpolation:
    """A trained policy and its reference, and what lies between them: one model in memory that moves along the line.

    Args:
        policy: the model that moves; stands at the policy.
        start: parameter -> its value in the reference. A parameter that is not named here stays.
        end: likewise, in the policy.
    """

    def __init__(self, policy: LanguageModel, start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> None:
        self._policy, self._start, self._end = policy, start, end
        policy.model.requires_grad_(False)

    @classmethod
    def between(cls, config: RunConfig, device: torch.device, checkpoint: Path | None = None) -> Interpolation:
        """The line from a config's reference to its policy.

        A plain adapter whose reference is the bare trunk is scaled, and stays an adapter. Everything else is
        interpolated as whole weights in float32, adapters merged into them: two adapters' B·A are not
        linear in their A and B.

        Args:
            config: of the run; or of an evaluation, whose policy may be a bare model.
            device: where the model lives.
            checkpoint: folder that holds the policy; None: as the config names it.
        Raises: UserError if a model does not load, or policy and reference are not of one architecture.
        """
        if _is_scaled_adapter(config, checkpoint):
            policy = load_policy(config, device, checkpoint)
            end = {name: p.detach().clone() for name, p in policy.model.named_parameters() if _is_second_factor(name)}
            return cls(policy, {name: torch.zeros_like(value) for name, value in end.items()}, end)
        model = _whole_policy(config, checkpoint)
        end = {name: p.detach().clone() for name, p in _parameters(model).items()}
        start = _whole_reference(config, model)
        policy = LanguageModel(model, dtype=DTYPES[config.policy.dtype], device=device)
        policy.checked(config.policy.model, "policy.model")
        return cls(policy.drawing_only(drawable_tokens(config.policy.model, config.policy.adapter)), start, end)

    def at(self, share: float) -> LanguageModel:
        """The policy at a share of the way: 0 is the reference and 1 the policy, bit for bit.

        Args:
            share: a, in [0, 1].
        Returns: the model in memory, which the next call moves on.
        Raises: ValueError for a share outside.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share must be in [0, 1], got {share}")
        with torch.no_grad():
            for name, parameter in self._policy.model.named_parameters():
                if name in self._start:
                    parameter.copy_(_between(self._start[name], self._end[name], share))
        return self._policy

    def save(self, share: float, folder: Path) -> None:
        """Write the policy at a share of the way as a checkpoint's ``policy/`` is: a model, or an adapter alone."""
        policy = self.at(share)
        if policy.adapters is not None:
            policy.adapters.save(folder)
        else:
            cast("Any", policy.model).save_pretrained(folder)


def _between(start: Tensor, end: Tensor, share: float) -> Tensor:
    if share in (0.0, 1.0):
        return end if share else start
    return torch.lerp(start, end, share)


def _is_second_factor(name: str) -> bool:
    parts = name.split(".")
    return TRAINED in parts and any(factor in parts for factor in SECOND_FACTORS)


def _is_scaled_adapter(config: RunConfig, checkpoint: Path | None) -> bool:
    """Whether the policy is an adapter, its reference the bare trunk, and what it adds linear in B."""
    adapter = config.policy.adapter if checkpoint is None else str(checkpoint / "policy")
    if adapter is None or (checkpoint is not None and not is_adapter(adapter)):
        return False
    on_bare_trunk = config.reference_model == config.policy.model and config.reference_adapter is None
    return on_bare_trunk and not read_adapter(adapter, "policy.adapter")[0].use_dora


def _whole_policy(config: RunConfig, checkpoint: Path | None) -> Any:
    """The policy in float32, as a plain model."""
    name, adapter = config.policy.model, config.policy.adapter
    if checkpoint is not None:
        saved = str(checkpoint / "policy")
        name, adapter = (name, saved) if is_adapter(saved) else (saved, None)
    model = load_transformers_model("AutoModelForCausalLM", name, torch.float32, "policy.model")
    return model if adapter is None else merged(model, adapter, "policy.adapter")


def _whole_reference(config: RunConfig, policy: Any) -> dict[str, Tensor]:
    """The reference's parameters in float32, once it is sure that they mean the same in the policy's place.

    ``policy`` is left with the reference's weights. Raises UserError if the two are not of one architecture.
    """
    name, adapter = config.reference_model, config.reference_adapter
    field = "policy.model" if config.reference.model is None else "reference.model"
    reference = load_transformers_model("AutoModelForCausalLM", name, torch.float32, field)
    if adapter is not None:
        reference = merged(reference, adapter, "reference.adapter" if config.reference.adapter else "policy.adapter")
    weights, place = _parameters(reference), _parameters(policy)
    problem = _difference(weights, place)
    if not problem:
        tokens = torch.arange(4)[None, :] % int(policy.config.get_text_config().vocab_size)
        with torch.no_grad():
            for key, parameter in place.items():
                parameter.copy_(weights[key])
            own, ours = (cast("Tensor", m(input_ids=tokens, use_cache=False).logits) for m in (reference, policy))
        if float((own - ours).abs().max()) > PROBE_TOLERANCE * max(1.0, float(own.abs().max())):
            problem = "in the policy's place its weights give other logits than in its own"
    if problem:
        raise UserError(
            f"{field} {name!r} and the policy are not of one architecture, so nothing lies between them: {problem}; "
            "interpolate towards the model that the policy started from"
        )
    return {key: value.detach() for key, value in weights.items()}


def _parameters(model: Any) -> dict[str, nn.Parameter]:
    """By name, tied ones once."""
    return dict(cast("nn.Module", model).named_parameters())


def _difference(reference: Mapping[str, Tensor], policy: Mapping[str, Tensor]) -> str:
    """The first parameter that only one of them has, or that has another shape; empty if there is none."""
    for key in sorted(reference.keys() | policy.keys()):
        if key not in policy or key not in reference:
            return f"only the {'reference' if key in reference else 'policy'} has {key}"
        sizes = [" x ".join(map(str, of[key].shape)) for of in (reference, policy)]
        if sizes[0] != sizes[1]:
            return f"its {key} is {sizes[0]}, the policy's {sizes[1]}"
    return ""
