"""From nothing to a trained policy: build the embedded world, then run the full flow on it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from prefect import flow
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from flows.calling import call, flow_body, run_flow
from flows.commands.training import watch_run
from flows.console import Console
from flows.links import own_run_dir
from flows.ppo import SIDE_BY_SIDE, begin, iterate, train
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config
from rlhf_core.textworld import TextWorld
from tasks.text_world import prepare_text_world, text_world

SETTINGS: dict[str, Any] = {
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
    watch_run(run_dir, config, lambda: run_flow(train, config, str(run_dir)))


@flow(
    name="quickstart",
    flow_run_name="quickstart · text world",
    task_runner=SIDE_BY_SIDE,
    persist_result=False,
    result_serializer="json",
)
def build_and_train(folder: str = ".quickstart", num_iterations: int = 40) -> str:
    """The same for a worker: build the embedded text world, once, then train on it.

    Args:
        folder: where the world and its runs are kept.
        num_iterations: of the training.
    Returns: the run folder.
    """
    with flow_body() as ended_with:
        config = world_config(call(text_world, str(Path(folder) / "world")), num_iterations=num_iterations)
        run_dir = own_run_dir(str(Path(folder) / "runs"))
        begin(config, run_dir)
        return ended_with(iterate(run_dir))


def quickstart_config(folder: Path, console: Console) -> RunConfig:
    """The quickstart's config, its models and prompts built if need be."""
    phases: dict[str, TaskID] = {}
    columns = (TextColumn("{task.description:28}", markup=False), BarColumn(bar_width=30), TimeElapsedColumn())
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
    return world_config(world)


def world_config(world: TextWorld, **changes: object) -> RunConfig:
    """The config of a training in a text world, with other settings where they are given."""
    paths = {
        "prompts": {"source": str(world.prompts)},
        "policy": {"model": str(world.policy)},
        "reward": {"components": [{"kind": "model", "name": "taste", "model": str(world.reward)}]},
    }
    return build_config({**SETTINGS, **paths, **changes})
