"""`rlhf feedback`: writes what people have said about a run's traces as preference rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.console import Console
from rlhf_core.contracts.durable import write_file
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.run_folder import RunFolder
from tasks.tracking.feedback import Feedback, feedback_of
from tasks.tracking.outbox import Ledger, RefusalError, reason
from tasks.tracking.traces import RUN_TAG
from tasks.tracking.tracker import connect


def write_feedback(console: Console, path: Path, to: Path, labels: Path | None) -> None:
    """Write pairs, and single judgements where they are asked for. Nothing is written if anything is wrong.

    Raises: UserError where MLflow does not have the run, or nobody has judged anything.
    """
    found = read_feedback(RunFolder.open(path))
    if not found.num_judged:
        raise UserError(
            f"nobody has judged a trace of {path} yet: open Traces in MLflow, choose one, and add a feedback (yes or "
            "no, or a number) or an expectation (the response that it should have been)"
        )
    if not found.pairs and labels is None:
        raise UserError(
            f"the {found.num_judged} judged responses of {path} make no pair: two responses to one prompt need "
            "different grades, or one response an expectation; --labels FILE writes single judgements"
        )
    write_file(to, _lines(found.pairs))
    told = f"pairs: {len(found.pairs)}, of {found.num_judged} judged responses: {to}"
    if labels is not None:
        write_file(labels, _lines(found.labels))
        told += f"; single judgements: {len(found.labels)}: {labels}"
    if found.unread:
        told += f"; not read as a judgement: {', '.join(found.unread)}"
    console.print(told, highlight=False, markup=False, soft_wrap=True)


def read_feedback(run: RunFolder) -> Feedback:
    """What people have said, from MLflow. Raises UserError if it does not have the run."""
    if not run.config.tracking.enabled or Ledger.of(run.path).run_id is None:
        raise UserError(f"MLflow does not know {run.path}: people judge a run's traces there; `rlhf resume` sends it")
    try:
        return feedback_of(judged_traces(run))
    except RefusalError as error:
        raise UserError(f"MLflow does not give the traces of {run.path}: {error}") from None
    except Exception as error:  # MLflow's own, which only tasks/tracking/tracker.py knows
        raise UserError(f"MLflow does not give the traces of {run.path}: {reason(error)}") from None


def judged_traces(run: RunFolder) -> Iterator[dict[str, Any]]:
    """The traces of a run as MLflow's dictionaries, those with an assessment alone, the oldest first.

    Raises: RefusalError if the run is not in the tracker, or whatever MLflow raises.
    """
    ledger = Ledger.of(run.path)
    client, experiment_id = connect(run, experiment_id=ledger.experiment_id)
    wanted, token = f"tags.`{RUN_TAG}` = '{ledger.outbox}'", None
    while True:
        page = client.search_traces(
            locations=[experiment_id], filter_string=wanted, order_by=["timestamp_ms ASC"], page_token=token
        )
        yield from (trace.to_dict() for trace in page if trace.info.assessments)
        if not (token := page.token):
            return


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
