"""Task of one shard of a stage, so that Prefect shows it, and starts it again alone."""

from __future__ import annotations

from pathlib import Path

from prefect import task

from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.shards import Shard
from rlhf_core.store.helping import compute_at
from tasks.shards.stages import compute_part
from tasks.shards.workers import workers
from tasks.stage import FILES_DECIDE


@task(task_run_name="{stage}-{iteration}-shard-{number}", **FILES_DECIDE)
def compute_shard(stage: str, run_dir: str, iteration: int, number: int, of: int, refs: list[ArtifactRef]) -> None:
    """Compute a shard of a stage where a worker is idle, or here; its part is in the run folder afterwards."""
    shard = Shard(number, of)
    if (there := workers()) is None:
        compute_part(stage, run_dir, iteration, shard, refs)
    else:
        what = f"{stage} of iteration {iteration}, shard {number} of {of}"
        there.call(stage, what, compute_part, stage, compute_at(Path(run_dir)), iteration, shard, refs)
