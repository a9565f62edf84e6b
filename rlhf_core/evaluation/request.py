"""What to evaluate, on which prompts, with which models: from a run or a bare model to one config and its prompts."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.contracts.batches import Prompts
from rlhf_core.contracts.config import KLConfig, PPOConfig, PromptsConfig, RunConfig, ShapingConfig, TrackingConfig
from rlhf_core.contracts.config_io import build_config, canonical_json, load_config
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.loop_state import Cursor
from rlhf_core.contracts.policy_config import CriticConfig, PolicyConfig, ReferenceConfig
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.trust import accept_overrides, accept_values, recorded
from rlhf_core.models.adapters import is_adapter as is_lora_adapter
from rlhf_core.ops.frontier import MIN_WEIGHTED_SAMPLES
from rlhf_core.preflight import Plan, load_plan, preflight
from rlhf_core.preflight.assembled import read_prompts
from rlhf_core.preflight.pins import pinned
from rlhf_core.prompts.sources import load_prompt_set
from rlhf_core.stages.sample_prompts import sample_prompts

MIN_PROMPTS = 2
MIN_FRONTIER_SAMPLES = 2 * MIN_WEIGHTED_SAMPLES
ROWS_AT_ONCE = 512
"""Responses decoded at a time where generation.batch_size does not say."""


@dataclass(frozen=True)
class Request:
    """What a user asks to evaluate.

    Example: ``Request("runs/a", prompts="held-out.jsonl")``
    """

    target: str
    """A run folder, or a model folder or hub id."""
    prompts: str | None = None
    """Source of prompts; None: the run's own."""
    column: str | None = None
    checkpoint: str = "newest"
    """newest | best | last_good | all | an iteration; of a run."""
    num_prompts: int = 64
    """At most so many; drawn from the source by the seed where it has more."""
    samples: int = 32
    """Responses of each policy to each prompt."""
    frontier_samples: int = 1024
    """Responses of the reference to each prompt."""
    seed: int = 0
    out: str | None = None
    blend: tuple[float, ...] = ()
    """Shares of the way from the reference to each policy, whose interpolations are evaluated beside it."""

    @property
    def reference_samples(self) -> int:
        """Responses of the reference: at least as many as of a policy."""
        return max(self.samples, self.frontier_samples)


@dataclass(frozen=True)
class Prepared:
    """What will be evaluated. Built only when nothing is wrong."""

    config: RunConfig
    """Models, generation, reward and prompts; what only training needs is at its default."""
    plan: Plan
    prompts: Prompts
    num_trained_on: int | None
    """Prompts that stand in the training source too; None where that is not known."""


def check_request(request: Request) -> None:
    """Raise UserError with each number or choice that cannot be."""
    problems: list[str] = []
    if request.samples < 1:
        problems.append(f"--samples is {request.samples}; at least 1 response a prompt is needed")
    if request.frontier_samples < MIN_FRONTIER_SAMPLES:
        problems.append(
            f"--frontier-samples is {request.frontier_samples}; a frontier needs at least {MIN_FRONTIER_SAMPLES} "
            "responses of the reference a prompt"
        )
    if request.num_prompts < MIN_PROMPTS:
        problems.append(
            f"--num-prompts is {request.num_prompts}; confidence intervals are over prompts, so at least "
            f"{MIN_PROMPTS} are needed"
        )
    if not 0 <= request.seed < 2**63:
        problems.append(f"--seed is {request.seed}; it must be in 0 .. 2^63 - 1")
    if request.checkpoint not in ("newest", "best", "last_good", "all") and not request.checkpoint.isdecimal():
        problems.append(f"--checkpoint is {request.checkpoint!r}; choose newest, best, last_good, all or an iteration")
    problems += [
        f"--blend names {share:g}; a share lies between 0 (the reference) and 1 (the policy), evaluated anyway"
        for share in request.blend
        if not 0 < share < 1
    ]
    if problems:
        raise UserError(*problems)


def parse_shares(text: str | None) -> tuple[float, ...]:
    """``0.5,0.7`` as numbers; none of None. Raises UserError if it is anything else."""
    try:
        return () if text is None else tuple(float(share) for share in text.split(","))
    except ValueError:
        raise UserError(f"--blend is {text!r}; give shares between 0 and 1 with commas: 0.5,0.7,0.85") from None


def request_config(target: str, config: Path | None, overrides: Sequence[str]) -> RunConfig | None:
    """The config that a command line gives: a file's, a run's own one with changes, or None.

    Raises: UserError if it is refused, or a run is given a file.
    """
    run = Path(target)
    if not (run / "run.json").is_file():
        return load_config(config, overrides) if config is not None else None
    if config is not None:
        raise UserError(f"--config {config} is for a bare model; {target} is a run and brings its own: use --set")
    if not overrides:
        return None
    changed = build_config(RunFolder.open(run).config.model_dump(), overrides)
    accept_overrides(overrides, changed)
    recorded(changed, run)
    return changed


def accept_of_run(target: str, trust: Sequence[str] | None) -> None:
    """Accept what a person has typed of a run. Raises UserError if it names no such thing, or there is no run."""
    if trust and not (Path(target) / "run.json").is_file():
        raise UserError(f"--trust {trust[0]!r} is for a run, and {target} is none; a config of yours is trusted")
    if trust:
        accept_values(trust, RunFolder.open(Path(target)).config, Path(target))


def prepare(request: Request, config: RunConfig, *, trained_on: PromptsConfig, model: str | None) -> Prepared:
    """Check models, rewards and prompts of an evaluation; load no weights.

    Args:
        request: already checked in itself.
        config: of the run, or of the bare model.
        trained_on: the prompts of training.
        model: the bare model; None for a run, whose policy is ``config.policy``.
    Returns: the evaluation's own config, its plan and its prompts, tokenized.
    Raises: UserError with every problem found.
    """
    source = config.prompts
    if request.prompts is not None:
        changes: dict[str, Any] = {"source": request.prompts, "column": request.column or config.prompts.column}
        if Path(request.prompts).exists():  # what a dataset of the hub has
            changes |= {name: PromptsConfig.model_fields[name].default for name in ("subset", "split")}
        source = PromptsConfig(**{**config.prompts.model_dump(), **changes})
    elif request.column is not None:
        raise UserError(f"--column is {request.column!r}, but --prompts names no source; give both, or neither")
    try:
        return _prepare(request, config, trained_on, model, source)
    except UserError as error:
        if request.prompts is None:
            raise
        named = (p.replace("prompts.source", "--prompts") for p in error.problems)
        raise UserError(*(re.sub(r"prompts\.column\b", "--column", p) for p in named)) from None


def _prepare(
    request: Request, config: RunConfig, trained_on: PromptsConfig, model: str | None, source: PromptsConfig
) -> Prepared:
    size = len(load_prompt_set(source).entries)
    if size < MIN_PROMPTS:
        raise UserError(
            f"prompts.source {source.source!r} has {size} prompt; confidence intervals are over prompts, so at least "
            f"{MIN_PROMPTS} are needed"
        )
    ours = evaluation_config(config, _of_size(source, min(size, request.num_prompts), size), model, request.seed)
    ours = pinned(ours).config
    plan = load_plan(ours)
    count = min(ours.prompts.num_prompts, _num_usable(ours, plan))
    if count < MIN_PROMPTS:
        raise UserError(
            f"prompts.source {source.source!r} has {count} prompts that fit; at least {MIN_PROMPTS} are needed"
        )
    usable = _of_size(ours.prompts, count, size)
    preflight(ours.model_copy(update={"prompts": usable}))
    drawn = sample_prompts(
        plan.prompt_set,
        plan.tokenizer,
        usable,
        cursor=Cursor(),
        seed=request.seed,
        max_prompt_len=plan.max_prompt_len,
    ).batch
    entries = [canonical_json(plan.prompt_set.entries[row]) for row in drawn.prompt_ids]
    training = _training_entries(canonical_json(trained_on.model_dump()))
    known = None if training is None else sum(entry in training for entry in entries)
    return Prepared(ours, plan, drawn, known)


def evaluation_config(config: RunConfig, prompts: PromptsConfig, model: str | None, seed: int) -> RunConfig:
    """The part of a training config that decides an evaluation's numbers; the rest is at its default.

    Args:
        config: of the run, or of the bare model.
        prompts: where the prompts are, and how many.
        model: a bare model in the place of the policy; the reference stays what it was.
        seed: of the evaluation.
    """
    policy, reference = config.policy, config.reference
    if model is not None:
        adapter = reference.adapter or (policy.adapter if reference.model is None else None)
        reference = reference.model_copy(update={"model": config.reference_model, "adapter": adapter})
        is_adapter = is_lora_adapter(model)
        policy = PolicyConfig(
            model=policy.model if is_adapter else model,
            adapter=model if is_adapter else None,
            dtype=policy.dtype,
            pad_token=policy.pad_token,
            chat_template=policy.chat_template,
        )
    generation = config.generation
    if generation.batch_size is None:
        generation = generation.model_copy(update={"batch_size": ROWS_AT_ONCE})
    return RunConfig(
        seed=seed,
        num_iterations=1,
        device=config.device,
        num_threads=config.num_threads,
        frozen_models=config.frozen_models,
        prompts=prompts,
        policy=policy.model_copy(update={"critic": CriticConfig()}),
        reference=ReferenceConfig(**reference.model_dump()),
        reward=config.reward,
        generation=generation,
        kl=KLConfig(controller="fixed"),
        shaping=ShapingConfig(estimator="reward"),  # no critic
        ppo=PPOConfig(num_minibatches=1),
        tracking=TrackingConfig(**config.tracking.model_dump()),
    )


def folder_name(source: str, digest: str) -> str:
    """``prompts-eval-1a2b3c4d``: readable, and different for different settings."""
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(source).stem or source).strip("-.")
    return f"{stem[:40] or 'prompts'}-{digest[:8]}"


def _of_size(prompts: PromptsConfig, count: int, size: int) -> PromptsConfig:
    """The same source with one response each; shuffled only where not all of them are taken."""
    changes: dict[str, Any] = {"batch_size": count, "samples_per_prompt": 1, "shuffle": count < size}
    return PromptsConfig(**{**prompts.model_dump(), **changes})


def _num_usable(config: RunConfig, plan: Plan) -> int:
    """Prompts of the source that are short enough, where over-long ones are dropped; else all."""
    size = len(plan.prompt_set.entries)
    if config.prompts.over_long != "drop":
        return size
    return size - len(read_prompts(plan.prompt_set, plan.tokenizer, config.prompts, plan.max_prompt_len).over_long)


@functools.lru_cache(maxsize=1)
def _training_entries(source: bytes) -> frozenset[bytes] | None:
    """All prompts of a training source, given as the JSON of its section; None where it cannot be read."""
    try:
        prompts = PromptsConfig.model_validate_json(source)
        return frozenset(canonical_json(entry) for entry in load_prompt_set(prompts).entries)
    except UserError:
        return None
