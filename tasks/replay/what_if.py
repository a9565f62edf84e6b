"""An iteration under other knobs: computed again on the same responses from the first stage that is affected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pyarrow as pa

from rlhf_core.contracts.artifacts import read_artifact
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import flat_params
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.loop_state import LoopState
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.trust import accept_overrides
from rlhf_core.contracts.update_config import UpdateConfig
from rlhf_core.models.checkpoints import Trainer
from rlhf_core.preflight import Plan
from rlhf_core.replay.changes import BETA, Changes, changes_of
from rlhf_core.replay.rewards import stored_components
from rlhf_core.replay.tokens import check_sample, token_rows
from rlhf_core.replay.what_if import WhatIf, advantages_of, quantities_of, with_optimizer_of
from tasks.replay.iteration import Progress
from tasks.replay.shadow import compute_stage, remove_stage, shadow_of
from tasks.replay.source import Source, load_weights, opened
from tasks.replay.what_if_state import set_state
from tasks.session.session import Session, open_session


def ask_what_if(
    path: str,
    iteration: int | None,
    overrides: Sequence[str],
    *,
    sample: str | None = None,
    progress: Progress | None = None,
    trust: Sequence[str] = (),
) -> WhatIf:
    """Compute an iteration again under other knobs, and tell what moves.

    Args:
        path: a run folder, or a bundle.
        iteration: finished; of a bundle it may be left out.
        overrides: ``a.b=c`` each; ``kl.coef`` is β in force in that iteration.
        sample: show this response token by token.
        progress: told which stage begins.
        trust: programs, functions and addresses that it names, and that the person accepts.
    Returns: the numbers as they were and as they would have been.
    Raises:
        UserError: no such run or iteration, or a key that cannot be asked.
        IntegrityError: what is stored is damaged, or the weights before the iteration cannot be had here.
        NumericalError: under these knobs a stage would have failed.
    """
    with opened(path, iteration, trust=trust) as source:
        state = source.run.state_before(source.iteration)
        changes = changes_of(source.run.config, overrides, iteration=source.iteration, kl_coef=state.kl_coef)
        stored = {stage: read_artifact(source.run.path, m.artifact) for stage, m in source.manifests.items()}
        if sample is not None:
            check_sample(stored["generate"], sample, source.iteration)
        skipped = _skipped(source, changes)
        accept_overrides(overrides, changes.config)
        config = _here(source.located(changes.config, own=changes.keys))
        plan = _plan(source, changes, config)
        trainer = None if "ppo_update" in skipped else _trainer(source, config)
        with shadow_of(replace(source.run, config=config), source.iteration) as shadow:
            session = open_session(str(shadow.path))
            session.needs_same_files = False
            session.keep_plan(plan)
            if trainer is not None:
                session.policy.keep_trainer(trainer)
            stages = [stage for stage in changes.stages if stage not in skipped]
            set_state(source, changes, shadow, session, progress)
            what_if = _compute(source, changes, shadow, session, stages, progress)
            update = shadow.manifest("ppo_update", source.iteration) if "ppo_update" in what_if else None
        return WhatIf(
            run=source.name,
            iteration=source.iteration,
            changes=_told(source.run.config, changes, state),
            computed=stages,
            skipped=skipped,
            notes=changes.notes,
            quantities=quantities_of(
                stored,
                what_if,
                kl_coef=(state.kl_coef, state.kl_coef if changes.kl_coef is None else changes.kl_coef),
                next_kl_coef=(
                    float(source.manifests["ppo_update"].state["kl_coef"]),
                    None if update is None or not changes.has_next_kl_coef else float(update.state["kl_coef"]),
                ),
            ),
            advantages=advantages_of(stored, what_if),
            sample=sample,
            tokens=() if sample is None else token_rows(stored, what_if, sample, source.decode, name="what_if"),
        )


def _compute(
    source: Source,
    changes: Changes,
    shadow: RunFolder,
    session: Session,
    stages: Sequence[str],
    progress: Progress | None,
) -> Mapping[str, pa.Table]:
    """The tables of some stages, each from those before it."""
    iteration = source.iteration
    if changes.scores_are_stored:
        scores = session.scores(source.manifests["score_rewards"].artifact)
        session.models.keep_rewards(stored_components(scores, changes.config.reward.names))
    for stage in stages:
        remove_stage(stage, iteration, shadow.path)
    refs = {stage: manifest.artifact for stage, manifest in source.manifests.items()}
    for stage in stages:
        if progress is not None:
            progress(stage)
        refs[stage] = compute_stage(shadow, stage, iteration, refs)
    return {stage: read_artifact(shadow.path, refs[stage]) for stage in stages}


def _skipped(source: Source, changes: Changes) -> dict[str, str]:
    """The update, if it cannot be computed here. Raises UserError if more cannot."""
    skipped = {stage: source.missing[stage] for stage in changes.stages if stage in source.missing}
    if changes.scores_are_stored:
        skipped.pop("score_rewards", None)
    if needed := [stage for stage in skipped if stage != "ppo_update"]:
        raise UserError(
            f"--set {changes.keys[0]} needs {needed[0]}, which cannot be computed here: {skipped[needed[0]]}"
        )
    if list(changes.stages) == list(skipped):
        raise UserError(
            f"--set {changes.keys[0]} moves the update alone, and that needs models: {skipped['ppo_update']}"
        )
    return skipped


def _plan(source: Source, changes: Changes, config: RunConfig) -> Plan:
    """The plan of the run; of the changed config where other models are named."""
    loads_others = "reference_logprobs" in changes.stages or not changes.scores_are_stored
    return source.plan_of(source.without_foreign(config)) if loads_others else source.plan


def _trainer(source: Source, config: RunConfig) -> Trainer:
    """Policy, critic and moments as the run had them, with the optimizer of another config."""
    then = Session(replace(source.run, config=source.config))
    then.needs_same_files = False
    then.keep_plan(source.plan)
    load_weights(then, source.iteration)
    return with_optimizer_of(then.policy.trainer(source.iteration), config)


def _here(config: RunConfig) -> RunConfig:
    """This process makes the update in question, whoever made the run's: ranks differ in last bits."""
    execution = config.execution.model_copy(update={"update": UpdateConfig()})
    return config.model_copy(update={"execution": execution})


def _told(config: RunConfig, changes: Changes, state: LoopState) -> list[str]:
    """One line a change: the value that was in force, and the one that was asked for."""
    then, now = flat_params(config), flat_params(changes.config)
    lines = [f"{key}: {_text(then, key)} -> {_text(now, key)}" for key in changes.keys if key != BETA]
    if changes.kl_coef is not None:
        lines.append(
            f"β in force in iteration {state.iteration} (--set {BETA}): {state.kl_coef:g} -> {changes.kl_coef:g}"
        )
    return lines


def _text(params: Mapping[str, object], key: str) -> str:
    value = params.get(key, "absent")
    return "null" if value is None else str(value)
