"""The beginning of a run, its resumption, and its checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import DriftError, IntegrityError, UserError
from rlhf_core.contracts.generation_config import VllmConfig
from rlhf_core.contracts.locking import is_lock
from rlhf_core.contracts.run_folder import Drift, RunFolder, check_vacant
from rlhf_core.contracts.trust import accept_overrides, accept_values, check_recorded
from rlhf_core.identity import identity_drift, run_identity
from rlhf_core.models.devices import using_threads
from rlhf_core.models.vllm_engine import vllm_version
from rlhf_core.preflight import preflight
from rlhf_core.preflight.pins import moved_branches, pinned
from rlhf_core.preflight.probe import Loaded, probe
from rlhf_core.rewards.foreign import changed_functions
from rlhf_core.verification.run import verify_run
from tasks.lifecycle.retention import drop_expired_checkpoints
from tasks.session.session import Session, open_session

logger = logging.getLogger(__name__)

INTERPRETER = "generation.vllm.python"
"""The one knob that names a program."""
MAX_SHOWN = 10
"""Findings that a refusal names."""


def start_run(config: RunConfig, run_dir: str) -> None:
    """Check everything, load and try the models, then create the run folder. Nothing is written if anything is wrong.

    The run's config has the commit of each hub id, and the day that chat templates take for today.

    Raises: UserError with every problem found.
    """
    check_vacant(Path(run_dir))
    held = pinned(config)
    plan, loaded = preflight(held.config), Loaded()
    probe(held.config, plan, loaded)
    identity = run_identity(held.config, plan.prompt_set)
    RunFolder.create(Path(run_dir), held.config, identity, held.before)
    session = open_session(run_dir)
    session.keep_plan(plan)
    session.keep_loaded(loaded)


def consent(run_dir: str, trust: Sequence[str] = (), vllm_python: str | None = None) -> None:
    """What a person says about a run before it is looked at: what they accept of it, and which vLLM is theirs.

    Args:
        run_dir: its folder.
        trust: programs, functions and addresses that the run names, as its refusal shows them.
        vllm_python: interpreter of an environment with vLLM, in the place of the recorded one; changes no number.
    Raises: UserError if the run names no such thing, or there is no vLLM.
    """
    run = RunFolder.open(Path(run_dir))
    accept_values(trust, run.config, run.path)
    if vllm_python is not None:
        changed = named_interpreter(run, vllm_python)
        with run.locked():
            changed.with_interpreter(changed.config.generation.vllm.interpreter, write=True)


def named_interpreter(run: RunFolder, python: str) -> RunFolder:
    """The run with an interpreter that the person has named. Raises UserError if it has no vLLM, or none is asked."""
    if run.config.generation.engine != "vllm":
        raise UserError(f"{INTERPRETER} is set, but {run.path} has the engine {run.config.generation.engine}")
    changed = run.with_interpreter(VllmConfig(python=python).interpreter, write=False)
    accept_overrides([INTERPRETER], changed.config)
    vllm_version(changed.config.generation.vllm.interpreter)
    return changed


def check_resumable(run_dir: str, *, accept_drift: bool) -> RunConfig:
    """The config of a stopped run, if resuming it here would give the same run.

    Everything that the run wrote is read again: what is damaged is refused, or told where the resume itself cures it.

    Raises:
        UserError: no run there, its models or prompts are gone, or it names what nobody here has accepted.
        DriftError: machine, libraries, models, prompts or source differ, and the drift is not accepted.
        IntegrityError: it is damaged; the message says what, and how it is recovered.
    """
    path = Path(run_dir)
    run = RunFolder.open(path)
    check_recorded(run.config, path)
    if not accept_drift:
        check_identity(run, "resuming")
    _refuse_damage(path)
    _tell_moved(run)
    return run.config


def check_identity(run: RunFolder, doing: str) -> None:
    """Raise DriftError if the run would not be the same here. ``doing``: resuming or repairing."""
    # first without importing what the run names: it may be somebody else's
    check_recorded(run.config, run.path)
    drift = changed_functions(run.config, run.identity, run.path) or _drift(run)[1]
    if drift:
        raise DriftError(
            f"{run.path} was started under other conditions, so that {doing} it would not give the same run:\n  "
            + "\n  ".join(drift)
            + "\nresume it where it was started, or pass --accept-drift to go on all the same"
        )


def record_drift(run_dir: str, set_update: Sequence[str] = (), *, accepted: bool = True) -> list[str]:
    """Give a run the identity that it has here from its next iteration on, and record that in its ``run.json``.

    The weights are computed again under the new conditions where no checkpoint holds them, so that their bits may
    differ: they are recorded, and kept as a checkpoint if they do. From here on a resume is exact again. Stages of an
    unfinished iteration have another key now, and are computed again.

    Args:
        run_dir: of the run.
        set_update: changes of who makes its updates, as ``execution.update.nproc_per_node=2``.
        accepted: a person accepts what differs.
    Returns: what has changed, one line each; nothing if the run would be the same here.
    Raises: DriftError if that is not accepted; UserError if a change is wrong.
    """
    unlocked = RunFolder.open(Path(run_dir))
    check_recorded(unlocked.config, unlocked.path)
    changed_functions(unlocked.config, unlocked.identity, unlocked.path)  # refuses code of the run folder itself
    with unlocked.locked():
        run = RunFolder.open(Path(run_dir))
        if set_update:
            update = build_config(run.config.model_dump(), set_update).execution.update
            run = run.with_update(update, write=False)
        identity, changes = _drift(run)
        if changes and not accepted:
            raise DriftError(
                f"--set {set_update[0].partition('=')[0]} changes last bits of the run:\n  "
                + "\n  ".join(changes)
                + "\npass --accept-drift as well, to go on with that all the same"
            )
        if not changes:
            run.with_update(run.config.execution.update, write=True)
            open_session.cache_clear()
            return []
        iteration, committed = run.num_finished(), Session(run).policy_digest(run.num_finished())
        drift = Drift(iteration, run.identity, changes, weights="")
        session = Session(run.with_drift(identity, drift, write=False))
        weights = committed
        if iteration > 0:
            with using_threads(session.num_threads):
                weights = session.policy.trainer(iteration).digest()
        session.run = run.with_drift(identity, replace(drift, weights=weights), write=True)
        if weights != committed and iteration not in run.checkpoints():
            save_state(session, iteration)
        open_session.cache_clear()
    return changes


def _drift(run: RunFolder) -> tuple[dict[str, Any], list[str]]:
    """The identity that the run would have here, and how it differs from the recorded one."""
    identity = run_identity(run.config, preflight(run.config, begun=True).prompt_set)
    return identity, identity_drift(run.identity, identity)


_told: set[str] = set()
"""What this process has told of branches that moved: the command line and the flow both ask."""


def _tell_moved(run: RunFolder) -> None:
    for moved in moved_branches(run.config, run.unpinned):
        if moved not in _told:
            _told.add(moved)
            logger.warning("%s", moved)


_verified: dict[str, int] = {}
"""Run folder -> fingerprint of its files when this process read them all: the command line and the flow both ask."""


def _refuse_damage(path: Path) -> None:
    before = _fingerprint(path)
    if _verified.get(str(path)) == before:
        return
    found = verify_run(path, load_weights=False)
    if found.obstacles:
        shown = [
            f"  {f.path} ({f.kind}): {f.problem}" + ("" if f.recoverable else f"; {f.remedy}")
            for f in found.obstacles[:MAX_SHOWN]
        ]
        if len(found.obstacles) > MAX_SHOWN:
            shown.append(f"  and {len(found.obstacles) - MAX_SHOWN} more: `rlhf verify {path}` shows all")
        raise IntegrityError("\n".join([f"{path} is damaged, and was not resumed:", *shown, found.summary()]))
    for finding in found.damage:
        logger.warning("%s (%s): %s; %s", finding.path, finding.kind, finding.problem, finding.remedy)
    _verified[str(path)] = before


def _fingerprint(path: Path) -> int:
    """Names, sizes and times of every file of a run: another one means that something has changed."""
    about: list[tuple[str, int, int, int]] = []
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):  # of a process that is at work, and will be refused for that
            found = file.lstat()
            if not is_lock(file):
                about.append((str(file), found.st_ino, found.st_size, found.st_mtime_ns))
    return hash(tuple(sorted(about)))


@task(
    task_run_name="save_checkpoint-{iteration}", cache_policy=NO_CACHE, persist_result=False, result_serializer="json"
)
def save_due_checkpoint(run_dir: str, iteration: int) -> str | None:
    """Save the state before ``iteration`` if it is due and not saved yet, then drop what retention lets go.

    Returns: the checkpoint's folder if one was written now.
    """
    session = open_session(run_dir)
    config, run = session.run.config, session.run
    is_due = iteration % config.checkpoint.every == 0 or iteration == config.num_iterations
    if iteration == 0 or not is_due:
        return None
    is_new = iteration not in run.checkpoints()
    if is_new:
        save_state(session, iteration)
    drop_expired_checkpoints(run)  # also what a process that was killed between the two has left
    return str(run.checkpoint_path(iteration)) if is_new else None


@task(task_run_name="keep_last_good-{iteration}", cache_policy=NO_CACHE, persist_result=False, result_serializer="json")
def keep_last_good(run_dir: str, iteration: int) -> None:
    """Keep the state before ``iteration`` as ``RUN/checkpoints/last_good``, out of reach of retention."""
    session = open_session(run_dir)
    if iteration not in session.run.checkpoints():
        save_state(session, iteration)
    session.run.keep_as_last_good(iteration)
    drop_expired_checkpoints(session.run)


def save_state(session: Session, iteration: int) -> None:
    """Commit the state before an iteration as a checkpoint."""
    session.policy.save(iteration, session.run.checkpoint_path(iteration))
