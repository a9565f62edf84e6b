"""From nothing to a trained policy: build the embedded world, then run the full flow on it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from flows.commands.training import watch_run
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config
from tasks.text_world import prepare_text_world

SETTINGS = {
    "num_iterations": 40,
    "generation": {"max_new_tokens": 32},
    "kl": {"coef": 0.2, "controller": "log_pi", "target": 4.0},
    "ppo": {"learning_rate": 6e-4, "warmup_iterations": 3},
    "checkpoint": {"every": 20},
}
"""What the quickstart sets; everything else is the default."""


def quickstart(folder: Path, console: Console) -> None:
    """Build the world in ``folder/world`` (once), run PPO on it in ``folder/runs/<time>``, show the result."""
    config = quickstart_config(folder, console)
    run_dir = folder / "runs" / f"{datetime.now():%Y%m%d-%H%M%S}"
    from flows.calling import run_flow
    from flows.ppo import train

    watch_run(run_dir, config, lambda: run_flow(train, config, str(run_dir)))


def quickstart_config(folder: Path, console: Console) -> RunConfig:
    """The quickstart's config, its models and prompts built if need be."""
    phases: dict[str, TaskID] = {}
    columns = (TextColumn("{task.description:28}"), BarColumn(bar_width=30), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def show(phase: str, done: int, total: int) -> None:
            if phase not in phases:
                phases[phase] = progress.add_task(f"text world: {phase}", total=total)
            progress.update(phases[phase], completed=done, total=total)

        world = prepare_text_world(folder / "world", show)
    console.print(
        f"text world in {folder / 'world'}: a policy of {world.metrics['heldout_loss']:.2f} nats a token, "
        f"a reward model right on {world.metrics['reward_pair_accuracy']:.0%} of held-out pairs",
        highlight=False,
    )
    paths = {
        "prompts": {"source": str(world.prompts)},
        "policy": {"model": str(world.policy)},
        "reward": {"components": [{"kind": "model", "name": "taste", "model": str(world.reward)}]},
    }
    return build_config({**SETTINGS, **paths})
