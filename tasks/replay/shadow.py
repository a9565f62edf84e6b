"""Stages computed again beside a run: in a copy of its folder that is made of links, so that nothing of it changes.

The tasks themselves do the work, as in training: whoever compares afterwards compares what training would write.
Repairing puts what has come back in its place; a replay only looks at it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from prefect.tasks import Task

from rlhf_core.contracts.archive import Segment, find_segment
from rlhf_core.contracts.artifacts import ArtifactRef, artifact_path, encode_archived, parse_manifest
from rlhf_core.contracts.durable import write_file
from rlhf_core.contracts.records import write_record
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.stage_graph import READS, STAGES
from tasks.generate import generate
from tasks.ppo_update import ppo_update
from tasks.reference_logprobs import reference_logprobs
from tasks.sample_prompts import sample_prompts
from tasks.score_rewards import score_rewards
from tasks.session.session import open_session
from tasks.shape_rewards import shape_rewards

TASKS: Mapping[str, Task[..., ArtifactRef]] = {
    "sample_prompts": sample_prompts,
    "generate": generate,
    "score_rewards": score_rewards,
    "reference_logprobs": reference_logprobs,
    "shape_rewards": shape_rewards,
    "ppo_update": ppo_update,
}


def compute_stage(shadow: RunFolder, stage: str, iteration: int, refs: Mapping[str, ArtifactRef]) -> ArtifactRef:
    """Let a stage's task work in a shadow, unless its artifact is there.

    Args:
        shadow: the copy.
        stage: its name.
        iteration: from 0.
        refs: the artifacts of the stages before it.
    """
    return TASKS[stage].fn(str(shadow.path), iteration, *(refs[name] for name in READS[stage]))


def manifest_path(iteration: int, stage: str) -> str:
    """Path of a stage's manifest, relative to the run folder."""
    return str(Path(artifact_path(iteration, stage)).with_suffix(".json"))


def take_out(segment: Segment, stage: str, iteration: int, folder: Path) -> None:
    """Write a stage that is archived into another folder, as the loose files that it was. Raises IntegrityError."""
    record = segment.record(stage, iteration)
    manifest = parse_manifest(record, stage, iteration, origin=str(segment.path))
    write_file(folder / artifact_path(iteration, stage), encode_archived(segment, manifest.artifact))
    write_file(folder / manifest_path(iteration, stage), segment.manifest(stage, iteration))


def put_stage(run: RunFolder, stage: str, iteration: int, folder: Path) -> None:
    """Put a stage into another folder as it is stored: links to its files, or what the archive holds of it.

    What stands there is replaced; what the run does not have is left out.
    """
    remove_stage(stage, iteration, folder)
    names = artifact_path(iteration, stage), manifest_path(iteration, stage)
    if (run.path / names[1]).is_file():
        for name in names:
            if (run.path / name).is_file():
                _symlink(run.path / name, folder / name)
    elif (segment := find_segment(run.path, iteration)) is not None:
        take_out(segment, stage, iteration, folder)


def remove_stage(stage: str, iteration: int, folder: Path) -> None:
    """Take a stage out of a shadow."""
    for name in (artifact_path(iteration, stage), manifest_path(iteration, stage)):
        (folder / name).unlink(missing_ok=True)


def as_it_was(run: RunFolder, iteration: int) -> RunFolder:
    """The run under the identity that an iteration was computed with, without the drifts and extensions after it."""
    return replace(
        run,
        config=run.config_at(iteration),
        identity=run.identity_at(iteration),
        drifts=tuple(drift for drift in run.drifts if drift.iteration <= iteration),
        extensions=tuple(extension for extension in run.extensions if extension.iteration <= iteration),
    )


@contextmanager
def shadow_of(run: RunFolder, iteration: int) -> Iterator[RunFolder]:
    """A copy of what a finished iteration was computed from, and of itself; gone afterwards, and what was in memory.

    Args:
        run: as it was then (:func:`as_it_was`); its config may be another one than that in its folder.
        iteration: finished.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf-replay-") as name:
        folder = Path(name)
        record = run.record()
        record.pop("unpinned", None)
        write_record(folder / "run.json", record)
        begin = max((i for i in run.checkpoints() if i <= iteration), default=0)
        for before in range(max(begin - 1, 0), iteration + 1):
            for stage in STAGES:
                put_stage(run, stage, before, folder)
        if begin in run.checkpoints():
            _symlink(run.checkpoint_path(begin), folder / "checkpoints" / run.checkpoint_path(begin).name)
        open_session.cache_clear()
        try:
            yield RunFolder.open(folder)
        finally:
            open_session.cache_clear()


def _symlink(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source.resolve())
