"""From nothing to a trained policy: build the embedded world, or a real chat model, then run the full flow on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from flows.calling import call, flow_body, run_flow
from flows.commands.training import refuse_mixed, watch_run
from flows.console import Console
from flows.links import own_run_dir
from flows.ppo import SIDE_BY_SIDE, begin, iterate, train
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config
from rlhf_core.textworld import TextWorld
from tasks.worlds.chat_world import chat_world, prepare_chat_world
from tasks.worlds.text_world import prepare_text_world, text_world

if TYPE_CHECKING:
    from rlhf_core.chatworld import ChatWorld

SETTINGS: dict[str, Any] = {
    "num_iterations": 40,
    "generation": {"max_new_tokens": 32},
    "kl": {"coef": 0.2, "controller": "log_pi", "target": 4.0},
    "ppo": {"learning_rate": 6e-4, "warmup_iterations": 3},
    "checkpoint": {"every": 20},
}
"""What the quickstart sets; everything else is the default."""


REAL_SETTINGS: dict[str, Any] = {
    "num_iterations": 30,
    "prompts": {"batch_size": 32},
    "policy": {"lora": {"rank": 16}, "critic": {"kind": "shared"}},
    "generation": {"max_new_tokens": 40},
    "kl": {"coef": 0.05, "controller": "log_pi", "target": 5.0},
    "ppo": {"learning_rate": 3e-4, "critic_learning_rate": 1e-3, "num_minibatches": 4},
    "checkpoint": {"every": 15},
}
"""The same for the real chat model."""
ONE_SENTENCE = r"(?:[^\s.!?]+\s+){2,24}[^\s.!?]+[.!?]"
"""Three to 25 words with one mark at their end."""
REWARDS: dict[str, dict[str, Any]] = {
    "function": {
        "components": [
            {"kind": "function", "name": "positive", "function": "sentiment"},
            {
                "kind": "function", "name": "one_sentence", "function": "regex",
                "params": {"mode": "whole", "pattern": ONE_SENTENCE},
            },
            {"kind": "function", "name": "repetition", "function": "repetition"},
        ]
    },
    "model": {"components": [{"kind": "model", "name": "taste"}]},
}  # fmt: skip
"""What the real chat model is rewarded for."""


def quickstart(folder: Path, console: Console) -> None:
    """Build the world in ``folder/world`` (once), run PPO on it in ``folder/runs/<time>``, show the result."""
    _run(folder, quickstart_config(folder, console))


def real_quickstart(folder: Path, console: Console, *, reward: str, reviews: Path | None) -> None:
    """Do the same with a real chat model, built in ``folder/real`` (once).

    Args:
        folder: of the worlds and runs.
        console: shows progress.
        reward: a key of ``REWARDS``.
        reviews: sentences for the reward model.
    """
    with _shown(console, "chat model") as show:
        world, said = prepare_chat_world(folder / "real", reviews, show)
    console.print(said, highlight=False, soft_wrap=True)
    _run(folder, real_config(world, reward))


def real_config(world: ChatWorld, reward: str, **changes: object) -> RunConfig:
    """The config of a training of the real chat model."""
    paths: dict[str, Any] = {
        "prompts": {**REAL_SETTINGS["prompts"], "source": str(world.prompts)},
        "policy": {**REAL_SETTINGS["policy"], "model": str(world.policy)},
        "reward": copy.deepcopy(REWARDS[reward]),
    }
    if world.reward is not None and reward == "model":
        paths["reward"]["components"][0]["model"] = str(world.reward)
        # its scores lie around 12, and the critic begins at 0: under a smaller λ the end of a response has the credit
        paths["shaping"] = {"missing_eos_penalty": 1.0, "gae_lambda": 1.0}
    return build_config({**REAL_SETTINGS, **paths, **changes})


def _run(folder: Path, config: RunConfig) -> None:
    run_dir = folder / "runs" / f"{datetime.now():%Y%m%d-%H%M%S}"
    watch_run(run_dir, config, lambda: run_flow(train, config, str(run_dir)))


@flow(
    name="quickstart",
    flow_run_name="quickstart · {model}",
    task_runner=SIDE_BY_SIDE,
    persist_result=False,
    result_serializer="json",
)
def build_and_train(
    folder: str = ".quickstart",
    num_iterations: int | None = None,
    model: str = "embedded",
    reward: str = "function",
    reviews: str = "",
) -> str:
    """Build a world, once, then train on it: the quickstart for a worker.

    Args:
        folder: where the worlds and their runs are kept.
        num_iterations: of the training; None: 40 in the embedded world, 30 of the real model.
        model: embedded, or real: a chat model of 135 M parameters.
        reward: with real: function, or model, which is fitted to the reviews.
        reviews: with a reward model: a folder of sentences of praise (.pos) and blame (.neg).
    Returns: the run folder.
    """
    with flow_body() as ended_with:
        refuse_mixed(model, reward, reviews)
        changes: dict[str, Any] = {} if num_iterations is None else {"num_iterations": num_iterations}
        if model == "real":
            config = real_config(call(chat_world, str(Path(folder) / "real"), reviews), reward, **changes)
        else:
            config = world_config(call(text_world, str(Path(folder) / "world")), **changes)
        run_dir = own_run_dir(str(Path(folder) / "runs"))
        begin(config, run_dir)
        return ended_with(iterate(run_dir))


def quickstart_config(folder: Path, console: Console) -> RunConfig:
    """The quickstart's config, its models and prompts built if need be."""
    with _shown(console, "text world") as show:
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


@contextmanager
def _shown(console: Console, what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Within: a bar for each phase of what is built."""
    phases: dict[str, TaskID] = {}
    columns = (TextColumn("{task.description:28}", markup=False), BarColumn(bar_width=30), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def show(phase: str, done: int, total: int) -> None:
            if phase not in phases:
                phases[phase] = progress.add_task(f"{what}: {phase}", total=total)
            progress.update(phases[phase], completed=done, total=total)

        yield show
