"""What `rlhf blend` does: a policy between a checkpoint and the run's reference, by its share of the way or its KL."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rlhf_core.contracts.artifacts import check_folder, commit_folder
from rlhf_core.contracts.config_io import canonical_json
from rlhf_core.contracts.durable import hash_file, write_file
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.trust import SCORING, check_recorded
from rlhf_core.evaluation.blending import NUM_PROMPTS, NUM_SAMPLES, kl_to_reference, share_at_kl
from rlhf_core.evaluation.request import Prepared, Request, prepare
from rlhf_core.evaluation.summary import MIN_KL
from rlhf_core.models.devices import resolve_device, resolve_num_threads, using_threads
from rlhf_core.models.interpolation import Interpolation
from rlhf_core.models.policy import load_reference
from rlhf_core.models.tokenizers import load_tokenizer
from rlhf_core.ops.comparison import Interval
from rlhf_core.rewards.foreign import check_functions
from tasks.lifecycle.retention import named_checkpoints

RECORD = "blend.json"


@dataclass(frozen=True)
class Blend:
    """A policy folder between a checkpoint and the reference.

    Example: ``Blend("mild", 60, 0.7, Interval(3.02, 2.91, 3.13), 64, 16)``
    """

    folder: str
    iteration: int
    """Of the checkpoint."""
    share: float
    """Of the way from the reference to the checkpoint."""
    kl: Interval | None
    """To the reference; measured only where it was asked for. With the prompts and responses it is measured on:"""
    num_prompts: int = 0
    num_samples: int = NUM_SAMPLES


def blend(run_dir: str, out: str, *, share: float | None, kl: float | None, checkpoint: str = "newest") -> Blend:
    """Write the policy that lies a share of the way from the reference to a checkpoint.

    Args:
        run_dir: of the run.
        out: a folder to appear.
        share: in [0, 1]; or
        kl: the KL to the reference that the policy shall have, nats, on prompts of training.
        checkpoint: newest, best, last_good, or an iteration.
    Raises: UserError if the choice cannot be; then nothing is written. IntegrityError if the checkpoint is damaged.
    """
    _check(out, share, kl, checkpoint)
    run = RunFolder.open(Path(run_dir))
    (iteration,) = named_checkpoints(run, checkpoint)
    path = run.checkpoint_path(iteration)
    check_folder(path)
    prepared = None if kl is None else _prompts(run)
    device = resolve_device(run.config.device)
    with using_threads(resolve_num_threads(run.config.num_threads)):
        line = Interpolation.between(run.config, device, path)
        found = None
        if kl is not None and prepared is not None:
            share, found = _share_at(kl, line, run, prepared, iteration)
        assert share is not None, "one of the two was given"
        _write(Path(out), line, run, iteration, share, found)
    return Blend(out, iteration, share, found, 0 if prepared is None else len(prepared.prompts.prompt_ids))


def _check(out: str, share: float | None, kl: float | None, checkpoint: str) -> None:
    problems: list[str] = []
    if (share is None) == (kl is None):
        problems.append(f"{'neither' if share is None else 'both'} of --share and --kl given; give one of them")
    if share is not None and not 0 <= share <= 1:
        problems.append(f"--share is {share:g}; it must be in 0 (the reference) .. 1 (the checkpoint)")
    if kl is not None and not (math.isfinite(kl) and kl >= MIN_KL):
        problems.append(f"--kl is {kl:g}; it must be at least {MIN_KL} nats; the reference itself is --share 0")
    if checkpoint == "all":
        problems.append("--checkpoint is 'all'; choose one: newest, best, last_good or an iteration")
    if Path(out).exists():
        problems.append(f"--out {out} exists already; choose a new folder")
    if problems:
        raise UserError(*problems)


def _prompts(run: RunFolder) -> Prepared:
    """Prompts of training, drawn by the seed 0."""
    request = Request(str(run.path), num_prompts=NUM_PROMPTS)
    check_recorded(run.config, run.path, SCORING)
    check_functions(run.config, run.identity, run.path)
    return prepare(request, run.config, trained_on=run.config.prompts, model=None)


def _share_at(
    kl: float, line: Interpolation, run: RunFolder, prepared: Prepared, iteration: int
) -> tuple[float, Interval]:
    policy = line.at(1.0)
    reference = load_reference(run.config, policy.device, policy)
    tokenizer, prompts, config = prepared.plan.tokenizer, prepared.prompts, prepared.config

    def kl_of(share: float) -> Interval:
        return kl_to_reference(line.at(share), reference, tokenizer, prompts, config)

    own = kl_of(1.0)
    if kl > own.mean:
        raise UserError(
            f"--kl is {kl:g}, but checkpoint {iteration} itself is {own.mean:.2f} nats from the reference (on "
            f"{len(prompts.prompt_ids)} prompts x {NUM_SAMPLES} responses); choose less, or a later checkpoint"
        )
    return share_at_kl(kl, kl_of, own)


def _write(
    out: Path, line: Interpolation, run: RunFolder, iteration: int, share: float, found: Interval | None
) -> None:
    checkpoint = run.checkpoint_path(iteration)
    tokenizer = load_tokenizer(str(checkpoint / "policy"), field="policy.model")
    record = {
        "checkpoint": iteration,
        "checkpoint_digest": hash_file(checkpoint / "manifest.json"),
        "share": share,
        "kl": None if found is None else found.mean,
    }

    def fill(folder: Path) -> None:
        line.save(share, folder)
        tokenizer.save_pretrained(folder)
        write_file(folder / RECORD, canonical_json(record) + b"\n")

    commit_folder(out, fill, {})
