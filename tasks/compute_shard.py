"""Task of one shard of a stage, so that Prefect shows it, and starts it again alone."""

from __future__ import annotations

from prefect import task

from rlhf_core.contracts.artifacts import ArtifactRef
from rlhf_core.contracts.shards import Shard
from tasks.shards import compute_part
from tasks.stage import FILES_DECIDE
from tasks.workers import workers


@task(task_run_name="{stage}-{iteration}-shard-{number}", **FILES_DECIDE)
def compute_shard(stage: str, run_dir: str, iteration: int, number: int, of: int, refs: list[ArtifactRef]) -> None:
    """Compute a shard of a stage where a worker is idle, or here; its part is in the run folder afterwards."""
    arguments = (stage, run_dir, iteration, Shard(number, of), refs)
    if (there := workers()) is None:
        compute_part(*arguments)
    else:
        there.call(stage, f"{stage} of iteration {iteration}, shard {number} of {of}", compute_part, *arguments)
