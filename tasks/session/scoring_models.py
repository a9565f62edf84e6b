"""The models that are only read: the reference π_ref, and what scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from rlhf_core.contracts.config import RunConfig
from rlhf_core.models.frozen import FrozenModels, move_models
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.policy import load_reference
from rlhf_core.models.tokenizers import vocabulary_digest
from rlhf_core.preflight.probe import Loaded
from rlhf_core.rewards.loading import load_component
from rlhf_core.rewards.scoring import Component

if TYPE_CHECKING:
    from tasks.session.session import Session

Value = TypeVar("Value")
_USED_BY = {"score_rewards": "reward_components", "reference_logprobs": "reference"}


class ScoringModels:
    """Reference and reward components of a run, loaded at first use; one copy in memory of the same weights."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._models = FrozenModels()
        self._loaded: dict[str, Any] = {}
        self.has_given_rewards = False
        """Whether other components score than those of the config: workers have none of them."""

    @property
    def _config(self) -> RunConfig:
        return self._session.run.config

    @property
    def reference(self) -> LanguageModel:
        """π_ref, frozen. With LoRA it is the trunk of the policy in memory, which training does not change."""
        config, device = self._config, self._session.device
        if not config.reference_shares_trunk:
            return self._frozen("reference", lambda: load_reference(config, device, None, self._models))
        with self._session.lock:
            return load_reference(config, device, self._session.policy.trunk())

    @property
    def reward_components(self) -> list[Component]:
        """What scores: frozen models r_θ, functions and services."""

        def load() -> list[Component]:
            vocabulary = vocabulary_digest(self._session.tokenizer.tokenizer)
            return [
                load_component(
                    component,
                    field=f"reward.components.{i}",
                    columns=self._config.prompts.columns,
                    policy_vocabulary=vocabulary,
                    device=self._session.device,
                    frozen=self._models,
                    template_date=self._config.prompts.template_date,
                )
                for i, component in enumerate(self._config.reward.components)
            ]

        return self._frozen("reward_components", load)

    def keep_loaded(self, loaded: Loaded) -> None:
        """Use the models that a probe has loaded."""
        self._models = loaded.frozen
        if loaded.reference is not None and not self._config.reference_shares_trunk:
            self._loaded["reference"] = loaded.reference
        if len(loaded.rewards) == len(self._config.reward.components):
            self._loaded["reward_components"] = loaded.rewards

    def keep_rewards(self, components: Sequence[Component]) -> None:
        """Let these score, instead of those that the config names."""
        self._loaded["reward_components"] = list(components)
        self.has_given_rewards = True

    def stage_done(self, stage: str) -> None:
        """Send a stage's models away until they are needed again, as ``frozen_models`` says."""
        name = _USED_BY.get(stage)
        if name is None or self._config.frozen_models == "keep":
            return
        with self._session.lock:
            if self._config.frozen_models == "disk":
                self._loaded.pop(name, None)
            elif name in self._loaded:
                move_models(self._loaded[name], torch.device("cpu"))

    def _frozen(self, name: str, make: Callable[[], Value]) -> Value:
        """Frozen models, back on the device wherever they were."""
        with self._session.lock:
            if name not in self._loaded:
                self._loaded[name] = self._session.same_files(make())
            if self._config.frozen_models == "cpu":
                move_models(self._loaded[name], self._session.device)
            return cast("Value", self._loaded[name])
