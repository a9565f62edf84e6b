"""The head of a reward model: under which name a folder stores it, and what the score is made of.

transformers' classifiers of decoders have a linear layer ``score`` without a bias. Other trainers store more:

    OpenRLHF            {value_head_prefix}.weight; with normalize_reward the score is (logit - mean) / std
    verl                a token classifier: score.weight and score.bias
    TRL, LLaMA-Factory  a language model with v_head.summary.weight and .bias, the latter in value_head.safetensors
    DeepSpeed-Chat      v_head.weight beside a trunk named rwtransformer
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import linear

from rlhf_core.contracts.errors import UserError
from rlhf_core.models.stored_weights import StoredWeights

OWN: Final = "score"
PREFIXES: Final = (OWN, "value_head", "v_head.summary", "v_head", "reward_head")
"""Names of a head, the usual one first."""


@dataclass(frozen=True)
class ScoreHead:
    """Where a folder stores the head of its reward model."""

    weight: str
    bias: str | None
    num_labels: int
    mean: float = 0.0
    std: float = 1.0

    @property
    def is_normalized(self) -> bool:
        """Whether the score is not the logit itself."""
        return (self.mean, self.std) != (0.0, 1.0)

    @property
    def is_plain(self) -> bool:
        """Whether transformers loads it as it is."""
        return self.weight == f"{OWN}.weight" and self.bias is None and not self.is_normalized

    @property
    def keys(self) -> set[str]:
        """Its tensors."""
        return {self.weight} if self.bias is None else {self.weight, self.bias}

    def install(self, model: Any, stored: StoredWeights) -> None:
        """Give a loaded classifier this head."""
        own = cast("nn.Linear", model.score)
        head = NormalizedHead(own.in_features, bias=self.bias is not None, mean=self.mean, std=self.std)
        head = head.to(own.weight.dtype)
        with torch.no_grad():
            head.weight.copy_(_tensor(stored, self.weight))
            if self.bias is not None:
                head.bias.copy_(_tensor(stored, self.bias).reshape(1))
        model.score = head


class NormalizedHead(nn.Linear):
    """From a hidden state to (logit - mean) / std."""

    def __init__(self, width: int, *, bias: bool, mean: float, std: float) -> None:
        super().__init__(width, 1, bias=bias, device="cpu")
        self.mean, self.std = mean, std

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear has
        """[..., 1]."""
        logits = linear(input, self.weight, self.bias)
        return logits if (self.mean, self.std) == (0.0, 1.0) else (logits.float() - self.mean) / self.std


def linear_of(head: nn.Linear) -> tuple[Tensor, Tensor]:
    """(weight [1, D], bias [1]) of the one linear map that a head computes, in float32."""
    weight = head.weight.detach().float()
    bias = torch.zeros(1) if cast("Tensor | None", head.bias) is None else head.bias.detach().float()
    if isinstance(head, NormalizedHead):
        return weight / head.std, (bias - head.mean) / head.std
    return weight, bias


def find_score_head(stored: StoredWeights, values: Mapping[str, Any], named: str) -> ScoreHead | None:
    """The head that a folder stores, or None.

    Args:
        stored: its tensors.
        values: its config.json.
        named: field and value, for errors.
    Raises: UserError if config.json names a head that is not there, or a mean and std that normalise nothing.
    """
    shapes, own = stored.everywhere, values.get("value_head_prefix")
    if own is not None and f"{own}.weight" not in shapes:
        raise UserError(
            f"{named} names its head {own!r} (value_head_prefix in its config.json), but stores no {own}.weight; take "
            "config.json and weights from where the model was saved"
        )
    for prefix in (own,) if own is not None else PREFIXES:
        weight, bias = f"{prefix}.weight", f"{prefix}.bias"
        if weight in shapes and len(shapes[weight]) == 2:
            mean, std = _moments(values, named)
            return ScoreHead(weight, bias if bias in shapes else None, shapes[weight][0], mean, std)
    return None


def _moments(values: Mapping[str, Any], named: str) -> tuple[float, float]:
    """(mean, std) that a score is normalised with; (0, 1) without ``normalize_reward``."""
    if not values.get("normalize_reward"):
        return 0.0, 1.0
    found: list[float] = []
    for key, default in (("mean", 0.0), ("std", 1.0)):
        value = values.get(key, default)
        value = cast("list[Any]", value)[0] if isinstance(value, list) and len(cast("list[Any]", value)) == 1 else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(
                f"{named} asks for normalize_reward with {key} {value!r} in its config.json; it must be a finite number"
            )
        found.append(float(value))
    if found[1] <= 0:
        raise UserError(
            f"{named} asks for normalize_reward with std {found[1]:g} in its config.json; it must be above 0"
        )
    return found[0], found[1]


def _tensor(stored: StoredWeights, key: str) -> Tensor:
    with safe_open(stored.file_of(key), "pt") as tensors:
        return cast("Tensor", tensors.get_tensor(key))
