"""The plan of a run, in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from flows.console import Console
from flows.displays.terminal import print_warning
from rlhf_core.contracts.config import RunConfig

if TYPE_CHECKING:
    from rlhf_core.disk_use import DiskUse
    from rlhf_core.preflight import Plan


def show_plan(console: Console, config: RunConfig, plan: Plan, run_dir: Path) -> None:
    """Print the batch arithmetic, optimiser steps, memory and disk use of a run."""
    from rlhf_core.disk_use import free_bytes, predict_disk_use  # torch, which inspecting a run does without
    from rlhf_core.models.tokenizers import token_names

    disk, free = predict_disk_use(config, plan), free_bytes(run_dir)
    prompts, ppo = config.prompts, config.ppo
    minibatch = prompts.batch_size // ppo.num_minibatches
    steps = ppo.num_ppo_epochs * ppo.num_minibatches
    epochs = config.num_iterations * prompts.num_prompts / len(plan.prompt_set.entries)
    table = Table(title="Plan", title_justify="left", show_header=False)
    for label, text in (
        ("device", f"{plan.device}, {plan.num_threads} CPU threads, policy in {config.policy.dtype}"),
        ("prompts", f"{len(plan.prompt_set.entries)} in the source, up to {plan.max_prompt_len} tokens each"),
        (
            "an iteration",
            f"{prompts.num_prompts} prompts x {prompts.samples_per_prompt} = {prompts.batch_size} responses "
            f"of up to {config.generation.max_new_tokens} tokens",
        ),
        (
            "an update",
            f"{ppo.num_ppo_epochs} epochs x {ppo.num_minibatches} minibatches of {minibatch} = {steps} optimiser "
            f"steps, {-(-minibatch // (ppo.micro_batch_size or minibatch))} micro-batches each",
        ),
        (
            "the run",
            f"{config.num_iterations} iterations = {config.num_iterations * prompts.batch_size} episodes "
            f"= {epochs:.2f} epochs of prompts, {config.num_iterations * steps} optimiser steps",
        ),
        ("a response ends", f"at {token_names(plan.tokenizer.tokenizer, plan.tokenizer.eos_ids)}"),
        ("β", f"{config.kl.coef:g}, {config.kl.controller}" + _target(config)),
        ("parameters", ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in plan.parameters.items())),
        ("memory", _memory(plan)),
        ("disk", _disk(disk, free)),
        *(("note", note) for note in plan.notes),
    ):
        table.add_row(Text(label, style="bold"), text)
    console.print(table)
    if disk.run > free:
        print_warning(
            console,
            f"the run may take {disk.run / 1e9:,.2f} GB, and the disk of {run_dir} has {free / 1e9:,.2f} GB free: free "
            "some, or set artifacts.keep_iterations or a larger checkpoint.every",
        )
        return
    console.print("no problem found", style="green")


def _target(config: RunConfig) -> str:
    if config.kl.controller == "fixed":
        return ""
    return f", target {config.kl.target:g} nats a response, horizon {config.kl.horizon:g} episodes"


def _disk(disk: DiskUse, free: int) -> str:
    parts = [
        f"about {disk.run / 1e9:,.2f} GB at most, of {free / 1e9:,.2f} GB free, of which",
        f"{disk.loose} iterations x {disk.iteration / 1e6:,.2f} MB",
        f"{disk.archived} in the archive x {disk.archived_iteration / 1e6:,.2f} MB",
        f"{disk.checkpoints} checkpoints x {disk.checkpoint / 1e6:,.2f} MB",
    ]
    return "\n".join(part for part in parts if not part.startswith("0 "))


def _memory(plan: Plan) -> str:
    parts = [f"{name} {count / 1e6:,.0f} MB" for name, count in plan.memory_bytes.items()]
    return "\n".join([f"about {plan.peak_bytes / 1e9:,.2f} GB at most, of which", *parts])
