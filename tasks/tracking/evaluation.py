"""An evaluation in MLflow: metrics, figure and samples, once for each result."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from rlhf_core.contracts.config_io import digest_json
from rlhf_core.contracts.records import read_record, write_record
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.evaluation.folder import EvaluationFolder
from rlhf_core.evaluation.summary import metrics as evaluation_metrics
from tasks.tracking.files import send_file, send_table
from tasks.tracking.outbox import CLOSE_TIMEOUT_S, LEDGER, Ledger, RefusalError, reason
from tasks.tracking.refusals import check_run
from tasks.tracking.store import shown_tracking_uri, tracking_uri
from tasks.tracking.tracker import connect, log_metrics, log_prompts, logger

EVALUATION_SAMPLES = 200
"""Rows of an evaluation's sample table."""


def log_evaluation(folder: str) -> None:
    """Send an evaluation to its run's MLflow run, or a bare model's to one of its own: metrics, figure, samples.

    Once for each result. A tracker that is down or slow is a warning: the results are in the folder.
    """
    there = EvaluationFolder.open(Path(folder))
    if not there.config.tracking.enabled:
        return

    def work() -> None:
        try:
            _send(there)
        except Exception as error:  # a tracker's failure must never fail an evaluation
            why = str(error) if isinstance(error, RefusalError) else reason(error)
            logger.warning("MLflow did not take the evaluation: %s; evaluate again to send it", why)

    thread = threading.Thread(target=work, name="mlflow", daemon=True)
    thread.start()
    thread.join(CLOSE_TIMEOUT_S)
    if thread.is_alive():
        logger.warning("MLflow has not taken the evaluation in %.0f s; evaluate again to send it", CLOSE_TIMEOUT_S)


def _send(there: EvaluationFolder) -> None:
    """Send what has not arrived. The record says durably what is being sent, with its time stamp, before it is."""
    run = RunFolder.open(there.run_dir) if there.run_dir else RunFolder(there.path, there.config, there.identity)
    numbers, record = there.summary(), there.path / LEDGER
    before: dict[str, Any] = read_record(record) if record.is_file() else {}
    result = digest_json({"uri": shown_tracking_uri(run), "numbers": numbers})
    if before.get("result") == result:
        return
    client, experiment_id = connect(run, experiment_id=Ledger.of(run.path).experiment_id if there.run_dir else None)
    run_id = before.get("run_id") or _run_of(client, experiment_id, there, run)
    check_run(client, run_id, tracking_uri(run), run.path)
    if before.get("sending") != result:
        before = {"run_id": run_id, "sending": result, "timestamp": int(time.time() * 1000)}
        write_record(record, before)
    for policy, values in numbers["policies"].items():
        if values["blend"] < 1:  # one policy a step: an interpolation is in the summary and the picture
            continue
        step = int(policy) if policy.isdecimal() else 0
        log_metrics(client, run_id, before["timestamp"], {step: evaluation_metrics(values)})
    log_prompts(client, run_id, there.config.prompts, there.identity["prompts"], "evaluation")
    place = "/".join(("evaluations", there.path.resolve().name))
    for file in ("evaluation.png", "summary.json", "frontier.arrow"):
        send_file(client, run_id, there.path / file, place)
    send_table(client, run_id, there.side_by_side(EVALUATION_SAMPLES), f"{place}/samples-{result[:8]}.json")
    if there.run_dir is None:
        client.set_terminated(run_id, "FINISHED")
    write_record(record, {"run_id": run_id, "result": result})


def _run_of(client: Any, experiment_id: str, there: EvaluationFolder, run: RunFolder) -> str:
    """The MLflow run of the evaluated run; a bare model has one of its own, found again if its answer was lost."""
    if there.run_dir is not None:
        run_id = Ledger.of(run.path).run_id
        if run_id is None:
            raise ValueError(f"it does not have the run {run.path.name}; `rlhf resume {run.path}` sends it")
        return run_id
    tags = {"rlhf.evaluation": str(there.path.resolve()), "rlhf.evaluation_of": digest_json(dict(there.identity))}
    wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    if found := client.search_runs([experiment_id], wanted):
        return str(found[0].info.run_id)
    return str(client.create_run(experiment_id, run_name=there.path.resolve().name, tags=tags).info.run_id)
