"""Tasks of an evaluation: what will be evaluated, the samples of each policy in parts, and the results."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from rlhf_core.contracts.batches import Prompts, Rollouts
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import digest_json
from rlhf_core.contracts.durable import hash_file
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.run_places import runs_near
from rlhf_core.contracts.trust import SCORING, accept_config, check_recorded
from rlhf_core.evaluation import summary
from rlhf_core.evaluation.folder import (
    BLENDED,
    EVALUATIONS,
    MODEL,
    REFERENCE,
    EvaluationFolder,
    check_free,
    new_record,
    split_name,
)
from rlhf_core.evaluation.request import Prepared, Request, check_request, folder_name, prepare
from rlhf_core.evaluation.samples import draw_part, part_sizes
from rlhf_core.identity import identity_digest, run_identity
from rlhf_core.inspection import iteration_rows
from rlhf_core.models.devices import using_threads
from rlhf_core.models.interpolation import Interpolation
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.rewards.foreign import check_functions
from rlhf_core.stages.score_rewards import score_rewards
from tasks.lifecycle.retention import named_checkpoints
from tasks.reports.figures import draw_evaluation
from tasks.session.session import Session

EVALUATED = (*SCORING, "tracker", "store")
"""Kinds of what an evaluation uses of a run: its numbers go to the run's tracker."""


@dataclass(frozen=True)
class PlannedEvaluation:
    """What an evaluation consists of: references only.

    Example: ``PlannedEvaluation("runs/a/evaluations/b", {"reference": "", "000060": "9f2c…"}, 32, 1024, 48, 48)``
    """

    folder: str
    policies: dict[str, str]
    """Name -> digest of its weights; the reference first."""
    samples: int
    reference_samples: int
    num_prompts: int
    num_trained_on: int | None
    """Prompts that stand in the training source too; None where that is not known."""

    @property
    def parts(self) -> list[tuple[str, int, int]]:
        """(policy, part, samples a prompt), in order."""
        counts = {name: self.reference_samples if name == REFERENCE else self.samples for name in self.policies}
        return [(name, i, size) for name, count in counts.items() for i, size in enumerate(part_sizes(count))]


def check_evaluation(request: Request, config: RunConfig | None) -> PlannedEvaluation:
    """What would be evaluated. Writes nothing.

    Args:
        request: what the user asks.
        config: of a bare model; for a run, its own one with changes, or None.
    Raises: UserError with every problem found.
    """
    return _plan(request, config)[0]


def start_evaluation(request: Request, config: RunConfig | None) -> PlannedEvaluation:
    """Check everything, then create the folder, or find it again. Nothing is written if anything is wrong.

    Args:
        request: what the user asks.
        config: of a bare model; for a run, its own one with changes, or None.
    Raises: UserError with every problem found.
    """
    planned, evaluation, record = _plan(request, config)
    EvaluationFolder.create(Path(planned.folder), record, evaluation.prompts)
    evaluation_resources.cache_clear()
    evaluation_resources(planned.folder).keep_plan(evaluation.plan)
    return planned


@task(
    task_run_name="draw_samples-{policy}-{part}", cache_policy=NO_CACHE, persist_result=False, result_serializer="json"
)
def draw_samples(folder: str, policy: str, digest: str, part: int, num_samples: int) -> None:
    """Commit one part of a policy's samples, unless it is there."""
    there = EvaluationFolder.open(Path(folder))
    key = there.key(digest, part, num_samples)
    if there.has(policy, part, key):
        return
    session = evaluation_resources(folder)
    with using_threads(session.num_threads):
        reference = session.models.reference
        model = reference if policy == REFERENCE else _policy(there, session, policy)

        def score(prompts: Prompts, rollouts: Rollouts) -> Tensor:
            scores = score_rewards(session.models.reward_components, prompts, rollouts, session.run.config.reward).batch
            session.models.stage_done("score_rewards")
            return scores.score_B

        samples = draw_part(
            model,
            reference,
            score,
            session.tokenizer,
            there.prompts(),
            session.run.config,
            part=part,
            num_samples=num_samples,
        )
    there.commit(policy, part, samples, key)


@task(task_run_name="write_evaluation", cache_policy=NO_CACHE, persist_result=False, result_serializer="json")
def write_evaluation(planned: PlannedEvaluation) -> None:
    """Write samples.arrow, frontier.arrow, evaluation.png and summary.json, from the committed parts."""
    there = EvaluationFolder.open(Path(planned.folder))
    prompts = there.prompts()
    reference = there.samples(REFERENCE, planned.policies[REFERENCE], planned.reference_samples)
    policies = {
        name: there.samples(name, digest, planned.samples)
        for name, digest in planned.policies.items()
        if name != REFERENCE
    }
    rows = summary.frontier_rows(reference)
    numbers: dict[str, Any] = {
        "run": None if there.run_dir is None else there.run_dir.resolve().name,
        "policy_model": there.config.policy.model,
        "reference_model": there.config.reference_model,
        "prompts": {
            "source": there.config.prompts.source,
            "num_prompts": len(prompts.prompt_ids),
            "num_trained_on": there.num_trained_on,
        },
        "samples": planned.samples,
        "reference_samples": planned.reference_samples,
        "reference": summary.description(reference, planned.samples),
        "policies": {
            name: summary.comparison(samples, reference) | {"blend": split_name(name)[1]}
            for name, samples in policies.items()
        },
        "best_of_n": summary.best_of_n_rows(reference),
        "trusted_kl": summary.trusted_kl(reference.num_samples),
    }
    path = [] if there.run_dir is None else iteration_rows(RunFolder.open(there.run_dir))
    there.write_results(
        summary.side_by_side(policies, reference, prompts),
        summary.frontier_table(rows),
        numbers,
        draw_evaluation(numbers, rows, [(row["kl"], row["score"]) for row in path]),
    )


@functools.lru_cache(maxsize=1)
def evaluation_resources(folder: str) -> Session:
    """Reference, reward models and tokenizer of an evaluation, loaded at first use; the policy of a bare model."""
    there = EvaluationFolder.open(Path(folder))
    return Session(RunFolder(there.path, there.config, there.identity))


def _policy(there: EvaluationFolder, session: Session, policy: str) -> LanguageModel:
    checkpoint, share = split_name(policy)
    if share < 1:
        path = None if there.run_dir is None else RunFolder.open(there.run_dir).checkpoint_path(int(checkpoint))
        return Interpolation.between(there.config, session.device, path).at(share)
    if there.run_dir is None:
        return session.policy.trainer(0).actor_critic.policy
    # resources of its own: the run's may be training, and nothing of a checkpoint stays once its part is drawn
    return Session(RunFolder.open(there.run_dir)).policy.trainer(int(policy)).actor_critic.policy


def _plan(request: Request, config: RunConfig | None) -> tuple[PlannedEvaluation, Prepared, dict[str, Any]]:
    check_request(request)
    target = Path(request.target)
    run = RunFolder.open(target) if (target / "run.json").is_file() else None
    if run:
        check_recorded(config or run.config, run.path, EVALUATED)
        check_functions(run.config, run.identity, run.path)
    elif config:
        accept_config(config)
    evaluated = _checkpoints(run, request) if run else _bare_model(request, config)
    policies = {REFERENCE: ""} | _with_blends(evaluated, request.blend)
    ours = config or (run.config if run else RunConfig())
    trained_on = run.config.prompts if run else ours.prompts
    evaluation = prepare(request, ours, trained_on=trained_on, model=None if run else request.target)
    identity = run_identity(evaluation.config, evaluation.plan.prompt_set)
    name = folder_name(evaluation.config.prompts.source, identity_digest(identity))
    default = run.path / EVALUATIONS / name if run else Path("evaluations") / f"{target.name}-{name}"
    folder = Path(request.out) if request.out else default
    record = new_record(folder, evaluation.config, identity, run.path if run else None, evaluation.num_trained_on)
    check_free(folder, record)
    planned = PlannedEvaluation(
        folder=str(folder),
        policies=policies,
        samples=request.samples,
        reference_samples=request.reference_samples,
        num_prompts=len(evaluation.prompts.prompt_ids),
        num_trained_on=evaluation.num_trained_on,
    )
    return planned, evaluation, record


def _checkpoints(run: RunFolder, request: Request) -> dict[str, str]:
    """Name and digest of each checkpoint asked for, ascending. Raises UserError if there is none of it."""
    chosen = named_checkpoints(run, request.checkpoint)
    return {f"{i:06d}": hash_file(run.checkpoint_path(i) / "manifest.json") for i in chosen}


def _with_blends(policies: dict[str, str], shares: Sequence[float]) -> dict[str, str]:
    """Each policy, and before it what lies between the reference and it, ascending."""
    return {
        name if share == 1 else f"{name}{BLENDED}{share}": digest
        if share == 1
        else digest_json({"policy": digest, "share": share})
        for name, digest in policies.items()
        for share in (*sorted(set(shares)), 1.0)
    }


def _bare_model(request: Request, config: RunConfig | None) -> dict[str, str]:
    """A bare model as the one policy. Raises UserError if it is neither run nor model, or brings no config."""
    target = Path(request.target)
    is_model = (target / "config.json").is_file() or (target / "adapter_config.json").is_file()
    if target.exists() and not is_model:
        raise UserError(
            f"{request.target} is neither a run folder (it has no run.json) nor a model folder (no config.json)"
            f"{runs_near(target)}"
        )
    if not target.exists() and (config is None or _looks_local(request.target)):
        needs = "" if _looks_local(request.target) else "; a model of the hub needs --config"
        raise UserError(
            f"{request.target} does not exist: there is no such run and no such model folder here"
            f"{runs_near(target)}{needs}"
        )
    if config is None:
        raise UserError(
            f"{request.target} is no run folder, so --config is needed: reward, reference and generation come from it"
        )
    if request.checkpoint != "newest":
        raise UserError(f"--checkpoint is {request.checkpoint}, but {request.target} is no run folder: leave it out")
    return {MODEL: ""}


def _looks_local(target: str) -> bool:
    """Whether a target that does not exist names a place of this machine, and no model of the hub: ``runs/typo``."""
    slashes = target.count("/")
    return target.startswith((".", "/", "~")) or slashes > 1 or (slashes == 1 and Path(target).parent.is_dir())
