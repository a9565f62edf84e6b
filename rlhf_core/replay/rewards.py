"""Reward components of a run that is replayed: which are here, and what they said then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.contracts.batches import Scores
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.reward_config import FunctionReward, HttpReward, ModelReward
from rlhf_core.contracts.trust import refused, sentence
from rlhf_core.models.reward_text import Conversation
from rlhf_core.rewards.foreign import changed_functions, module_file
from rlhf_core.rewards.ready_made import READY_MADE
from rlhf_core.rewards.scoring import Failure

STAND_IN = {"kind": "function", "function": "length"}
"""A component that is always there, for a config whose own ones are not."""


class StoredScores:
    """A component that says again what it said: no model, function or service is asked.

    Args:
        values: raw scores, one a response, None where it was left out.
    """

    def __init__(self, values: Sequence[float | None]) -> None:
        self.values = values

    def score(self, conversations: Sequence[Conversation]) -> list[float | Failure]:
        """What is stored, in the order of the responses."""
        assert len(conversations) == len(self.values), "they are the responses of that artifact"
        return [Failure("had no score") if value is None else value for value in self.values]


def stored_components(scores: Scores, names: Sequence[str]) -> list[StoredScores]:
    """The components of an iteration, as its artifact has them.

    Args:
        scores: of the iteration.
        names: of the components, in the order of the config.
    """
    columns = {name: column for column, name in enumerate(scores.names)}
    nothing: list[float | None] = [None] * len(scores.sample_ids)
    found: list[StoredScores] = []
    for name in names:
        column = columns.get(name)
        if column is None:  # it was left out of every response
            found.append(StoredScores(nothing))
            continue
        values, kept = scores.components_BC[:, column].tolist(), scores.components_mask_BC[:, column].tolist()
        found.append(StoredScores([value if is_kept else None for value, is_kept in zip(values, kept, strict=True)]))
    return found


def unavailable_rewards(
    config: RunConfig, identity: Mapping[str, Any], run_dir: Path, *, calls_services: bool
) -> list[str]:
    """Why the scores cannot be computed here, one line a component. Imports and calls nothing.

    Args:
        config: of the run.
        identity: as it recorded it.
        run_dir: its folder, from which no function is imported.
        calls_services: whether responses may be sent to the addresses that the config names.
    Raises: UserError if a function would be imported from the run folder.
    """
    if closed := refused(config, run_dir, ("function", *(("service",) if calls_services else ()))):
        return [sentence(use, run_dir) for use in closed]
    lines = [
        f"the function is not the one of the run: {change}" for change in changed_functions(config, identity, run_dir)
    ]
    for name, component in zip(config.reward.names, config.reward.components, strict=True):
        if isinstance(component, HttpReward) and not calls_services:
            lines.append(f"{name} is a service, and a bundle's responses are sent to nobody")
        if isinstance(component, FunctionReward) and component.function not in READY_MADE:
            module = component.function.partition(":")[0]
            if module_file(module, component.folder) is None:
                lines.append(f"{name} is the function {component.function}, and there is no module {module} here")
    return lines


def with_models_alone(config: RunConfig) -> RunConfig:
    """The config with those reward components that are models: nothing of it imports or calls anything."""
    tree = config.model_dump()
    models = [
        tree["reward"]["components"][i]
        for i, component in enumerate(config.reward.components)
        if isinstance(component, ModelReward)
    ]
    tree["reward"] |= {"components": models or [STAND_IN], "allowed_hosts": []}
    return build_config(tree)
