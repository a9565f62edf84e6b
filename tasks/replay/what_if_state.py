"""The loop state that an iteration under other knobs stands on, where the stored one was made under the run's.

β is the one in force, or the one that is asked for. Score moments are those that the run would have had: they depend on
the scores of earlier iterations alone, which are stored, or computed again on the stored responses.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rlhf_core.contracts.artifacts import ArtifactRef, read_artifact
from rlhf_core.contracts.batches import Scores
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.loop_state import ScoreMoments
from rlhf_core.contracts.records import read_record, write_record
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.ops.rewards import update_moments
from rlhf_core.replay.changes import Changes
from rlhf_core.replay.rewards import stored_components
from tasks.replay.iteration import Progress
from tasks.replay.shadow import compute_stage, manifest_path, put_stage, remove_stage
from tasks.replay.source import Source
from tasks.session.session import Session


def set_state(source: Source, changes: Changes, shadow: RunFolder, session: Session, progress: Progress | None) -> None:
    """Give an iteration of a shadow the β and the score moments that go with the changes.

    Args:
        source: the iteration as it was.
        changes: what is asked.
        shadow: its copy, whose loop state is replaced.
        session: of the shadow.
        progress: told which iteration's scores are computed again.
    Raises: UserError if scores of earlier iterations are needed that are not here.
    """
    values: dict[str, Any] = {} if changes.kl_coef is None else {"kl_coef": changes.kl_coef}
    if changes.moments_of:
        values["moments"] = asdict(_moments(source, changes, shadow, session, progress))
    if values and source.iteration > 0:  # the first one starts from the config
        path = shadow.path / manifest_path(source.iteration - 1, "ppo_update")
        record = read_record(path)
        write_record(path, record | {"state": {**record["state"], **values}})


def _moments(
    source: Source, changes: Changes, shadow: RunFolder, session: Session, progress: Progress | None
) -> ScoreMoments:
    """Of the scores of the iterations that count, in their order."""
    moments = ScoreMoments()
    for iteration in changes.moments_of:
        ref = _artifact(source, changes, "score_rewards", iteration)
        scores = Scores.from_table(read_artifact(source.run.path, ref))
        if changes.is_scored_again:
            if progress is not None:
                progress(f"score_rewards of iteration {iteration}")
            scores = _scored_again(source, changes, shadow, session, iteration, scores)
        moments = update_moments(moments, scores.score_B)
    return moments


def _scored_again(
    source: Source, changes: Changes, shadow: RunFolder, session: Session, iteration: int, scores: Scores
) -> Scores:
    """The stored responses of an earlier iteration, scored as the changes say."""
    if changes.scores_are_stored:
        session.models.keep_rewards(stored_components(scores, changes.config.reward.names))
    refs = {stage: _artifact(source, changes, stage, iteration) for stage in ("sample_prompts", "generate")}
    for stage in refs:
        put_stage(source.run, stage, iteration, shadow.path)
    remove_stage("score_rewards", iteration, shadow.path)
    return session.scores(compute_stage(shadow, "score_rewards", iteration, refs))


def _artifact(source: Source, changes: Changes, stage: str, iteration: int) -> ArtifactRef:
    manifest = source.run.manifest(stage, iteration)
    if manifest is None:
        last, how = changes.moments_of[-1], changes.config.shaping.score_normalization
        key = next(key for key in changes.keys if key.startswith(("reward.", "shaping.score_normalization")))
        where = "ask the run folder" if source.bundle is not None else f"iteration {iteration} is not here any more"
        raise UserError(
            f"--set {key} changes what shaping.score_normalization {how} has measured before iteration "
            f"{source.iteration}, and that takes the scores of {f'iterations 0 to {last}' if last else 'iteration 0'}; "
            + where
        )
    return manifest.artifact
