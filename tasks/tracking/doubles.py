"""Runs of the tracker that were created twice, because the answer to a first request was lost. Knows no tracker."""

from __future__ import annotations

from typing import Any, Final

OUTBOX_TAG: Final = "rlhf.outbox"
"""Our own name of a run, by which it is found again."""


def runs_of_outbox(client: Any, experiment_id: str, outbox: str) -> list[str]:
    """Runs that a run folder has made in the tracker, the oldest first: more than one if answers came late."""
    found = client.search_runs(
        [experiment_id], f"tags.`{OUTBOX_TAG}` = '{outbox}'", order_by=["attributes.start_time ASC"]
    )
    return [str(run.info.run_id) for run in found]


def remove_double_runs(client: Any, experiment_id: str, outbox: str, kept: str) -> None:
    """Remove what a first request has made after it was given up: a run with nothing but the tags it is created with.

    A run with our tags and anything in it is a person's copy of ours, and stays.
    """
    for run_id in runs_of_outbox(client, experiment_id, outbox):
        if run_id == kept:
            continue
        data = client.get_run(run_id).data
        if not data.metrics and not data.params:
            client.delete_run(run_id)
