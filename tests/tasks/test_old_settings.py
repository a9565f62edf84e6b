"""Run folders from before a setting was refused: they open, resume and are replayed."""

from __future__ import annotations

from pathlib import Path

import pytest
from replays import without_drawing
from tiny_world import Tiny
from torture.runs import battery_config, go_on, start

from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.identity import run_identity
from rlhf_core.preflight import preflight
from tasks.replay.iteration import replay_iteration


def test_a_run_whose_horizon_is_refused_today(tiny: Tiny, tmp_path: Path) -> None:
    """Horizon 2 for 8 responses: β moves by 80 % an iteration, until a thousandth of the first one is left."""
    config = battery_config(
        tiny, {"num_iterations": 6, "kl": {"coef": 0.1, "horizon": 2.0, "target": 50.0}, "checkpoint": {"every": 3}}
    )
    with pytest.raises(UserError, match=r"kl\.horizon 2 is below prompts\.batch_size 8"):
        start(config, tmp_path / "new")
    old = tmp_path / "old"
    RunFolder.create(old, config, run_identity(config, preflight(config, begun=True).prompt_set))
    with without_drawing():
        go_on(old)
    run = RunFolder.open(old)
    betas = [run.state_before(iteration).kl_coef for iteration in range(7)]
    assert betas == pytest.approx([0.1, 0.02, 0.004, 0.0008, 0.00016, 0.0001, 0.0001])
    assert replay_iteration(str(old), 4).is_identical
