"""Runs of the tiny world to replay, and machines that compute something else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from tiny_world import Tiny
from torture.runs import A_PICTURE, battery_config, start
from zoo import copy_of_run

from rlhf_core.contracts.batches import Experience, StageResult
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.durable import hash_file, write_file
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.models.checkpoints import Trainer
from rlhf_core.stages.ppo_update import ppo_update
from rlhf_core.stages.shape_rewards import shape_rewards
from tasks.reports import report

CHECKPOINTS: Mapping[str, Any] = {"checkpoint": {"every": 2, "keep_last": 2}}
ROW, POSITION = 3, 0
"""Where :func:`another_advantage` plants its change."""


def run_of(tiny: Tiny, path: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """A finished run of three iterations, with checkpoints 2 and 3."""
    if changes is None:
        return copy_of_run(battery_config(tiny, CHECKPOINTS), path, _start_without_drawing)
    _start_without_drawing(battery_config(tiny, {**CHECKPOINTS, **changes}), path)
    return path


def _start_without_drawing(config: RunConfig, path: Path) -> None:
    with without_drawing():
        start(config, path)


def without_drawing() -> AbstractContextManager[object]:
    """A run's picture is one pixel: drawing is a third of a tiny run."""
    return mock.patch.object(report, "draw_run", _draw_a_pixel)


def _draw_a_pixel(_run: RunFolder, path: Path) -> bool:
    write_file(path, A_PICTURE)
    return True


def state_of(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Digest, time of change and links of every file and link: what a replay must leave alone."""
    found: dict[str, tuple[str, int, int]] = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        digest = str(path.readlink()) if path.is_symlink() else hash_file(path) if path.is_file() else ""
        found[str(path.relative_to(folder))] = (digest, about.st_mtime_ns, about.st_nlink)
    return found


def another_advantage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose shaping gives one advantage one ulp larger."""

    def shape(*arguments: Any, **settings: Any) -> StageResult[Experience]:
        result = shape_rewards(*arguments, **settings)
        advantages_BR = result.batch.advantages_BR.clone()
        value = np.float32(advantages_BR[ROW, POSITION])
        advantages_BR[ROW, POSITION] = float(np.nextafter(value, np.float32(np.inf)))
        return replace(result, batch=replace(result.batch, advantages_BR=advantages_BR))

    monkeypatch.setattr("tasks.shape_rewards.core.shape_rewards", shape)


def another_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose update leads elsewhere, though its statistics are the same."""

    def update(trainer: Trainer, *arguments: Any, **settings: Any) -> Any:
        result = ppo_update(trainer, *arguments, **settings)
        with torch.no_grad():
            next(parameter for _, parameter in trainer.actor_critic.named_parameters()).add_(1e-6)
        return result

    monkeypatch.setattr("tasks.session.policy_state.ppo_update", update)


def refuse(*_: Any, **__: Any) -> Any:
    """Stands where nothing may be called."""
    raise AssertionError("this must not be called")


def on_other_machine(monkeypatch: pytest.MonkeyPatch, real: Callable[..., dict[str, Any]]) -> None:
    """As far as a replay can tell, another version of torch."""

    def identity(*arguments: Any) -> dict[str, Any]:
        found = real(*arguments)
        return found | {"versions": {**found["versions"], "torch": "99.0"}}

    monkeypatch.setattr("tasks.replay.source.run_identity", identity)
