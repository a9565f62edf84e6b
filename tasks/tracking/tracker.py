"""MLflow: a replayable log of what the run folder says. The only file that imports mlflow.

What is sent, and how it is found again after a lost answer; `outbox.py` decides when. A run that died stays RUNNING
in MLflow, which asks nobody: the next resume corrects it.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Self

from rlhf_core.contracts.config import PromptsConfig
from rlhf_core.contracts.config_io import config_template
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.secrets import without_credentials
from rlhf_core.contracts.trust import check_door, tracker
from rlhf_core.inspection import extension_sentence
from rlhf_core.store.address import shown
from tasks.lifecycle.guards import GuardRecord
from tasks.tracking import notes as tracker_notes
from tasks.tracking import sqlite_store
from tasks.tracking.doubles import OUTBOX_TAG, remove_double_runs, runs_of_outbox
from tasks.tracking.files import send_text
from tasks.tracking.metrics import SENTINEL, batch_of_metrics, missing_metrics, result_metrics
from tasks.tracking.models import TrackedModels
from tasks.tracking.outbox import GoneError, Ledger, Outbox, Patient, Sending, store_lock
from tasks.tracking.refusals import check_experiment, check_run, check_version, find_experiment, is_final, refusal
from tasks.tracking.results import send_results
from tasks.tracking.store import artifact_location, kept_experiment, shown_tracking_uri, tracking_uri
from tasks.tracking.traces import TrackedTraces

logger = logging.getLogger(__name__)

MAX_PARAMS = 100
"""MLflow takes no more at a time."""
MAX_LINKS = 100
"""Likewise, of traces that a run is linked to."""
LIMITS: Final = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds without an answer
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would print the password
}
"""Of MLflow, where the user has set nothing else."""
ONCE: Final = (
    "create_experiment",
    "create_run",
    "log_batch",
    "log_metric",
    "create_logged_model",
    "create_model_version",
    "log_outputs",
)
"""Calls that are not simply repeated when their answer is lost."""
OK = 200
"""HTTP status."""


class Tracker:
    """Sends a run to MLflow from a thread of its own.

    Args:
        run: the run folder.
        prefect_run: id and page of the flow run, for the link back; empty outside Prefect.
    """

    def __init__(self, run: RunFolder, prefect_run: Mapping[str, str]) -> None:
        self.run = run
        self.uri = shown_tracking_uri(run)
        self._outbox = Outbox(
            lambda is_over: _Sender(run, prefect_run, is_over),
            run.path,
            logger,
            refusal=lambda error: refusal(error, run.path),
        )

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once the tracker has answered."""
        return self._outbox.run_id

    @property
    def page(self) -> str | None:
        """Address of the run in the MLflow UI, where the tracker is a server."""
        return self._outbox.page(self.uri)

    def __enter__(self) -> Self:
        """Begin sending; earlier iterations that have not arrived go first."""
        if self.run.config.tracking.enabled:
            self._outbox.start(self.run.num_finished())
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Wait a bounded time for what is left, a second where a signal ends the run; say what has not arrived."""
        if self.run.config.tracking.enabled:
            self._outbox.close(brief=error is not None and not issubclass(error, Exception))

    def iteration_done(self, iteration: int) -> None:
        """Send an iteration that is committed; returns at once."""
        self._outbox.put(iteration + 1)


class _Sender:
    """The conversation with one tracker. Every method may raise whatever the tracker raises."""

    def __init__(
        self, run: RunFolder, prefect_run: Mapping[str, str], is_over: Callable[[], bool] = lambda: False
    ) -> None:
        self.run, self.uri = run, shown_tracking_uri(run)
        self.ledger = Ledger.of(run.path).claimed(run.path, self.uri)
        self.client, self.experiment_id = self._connect(is_over)
        self.prefect_run = prefect_run
        self.run_id = self._open_run()
        self.next = self.ledger.sending.first if self.ledger.sending else self._num_arrived()
        self.models = TrackedModels(
            run, self.client, self.run_id, self.experiment_id, self.ledger.outbox,
            lambda links: _link_models(self.client, self.run_id, links),
        )  # fmt: skip
        self.traces = TrackedTraces(run, self.ledger, _Traces(self, is_over), self._traced)

    def send_up_to(self, finished: int) -> None:
        """Send the iterations below ``finished`` that have not arrived, and checkpoints that are new."""
        while self.next < finished:
            sending = self.ledger.sending
            values = batch_of_metrics(self.run, self.next, min(finished, sending.after) if sending else finished)
            after = max(values) + 1
            if sending is None:
                sending = Sending(self.next, after, int(time.time() * 1000))
                self.ledger = self.ledger.change(self.run.path, sending=sending, sent=self.next)
            else:  # whether an earlier try has arrived is not known
                values = missing_metrics(self.client, self.run_id, values)
            log_metrics(self.client, self.run_id, sending.timestamp_ms, values)
            self.next = after  # on disk with the next batch
            rest = replace(sending, first=after) if after < sending.after else None
            self.ledger = replace(self.ledger, sending=rest, sent=after)
        self.models.send_new()
        self.traces.send_due(finished, self.models.ids)

    def finish(self, *, brief: bool) -> None:
        """Results, figure, page, samples, the aliases of the best and last good checkpoint, and the run's end."""
        self.ledger = self.ledger.change(self.run.path)
        if not brief:
            remove_double_runs(self.client, self.experiment_id, self.ledger.outbox, self.run_id)
            self.models.remove_doubles()
            self.models.link_outputs()
            self._log_results()
            send_results(self.client, self.run_id, self.run, self.prefect_run)
            self.traces.send_rest(self.next, self.models.ids)
            self.models.set_aliases()
        stopped_by = GuardRecord.of(self.run).stopped
        self.client.set_tag(self.run_id, "rlhf.stopped_by", stopped_by or "")
        done = self.run.num_finished() == self.run.config.num_iterations and not stopped_by
        self.client.set_terminated(self.run_id, "FINISHED" if done else "KILLED")

    def _traced(self, after: int) -> None:
        self.ledger = self.ledger.change(self.run.path, traced=after)

    def _connect(self, is_over: Callable[[], bool]) -> tuple[Any, str]:
        """A client and the experiment. A folder that was moved away from its tracker begins a run in another one."""
        before = self.ledger
        try:
            client, experiment_id = connect(self.run, is_over, before.experiment_id)
            if before.run_id is not None:
                check_run(client, before.run_id, tracking_uri(self.run), self.run.path)
        except GoneError:
            if not before.was_moved(self.run.path) or before.tracker == self.uri:
                raise
            self.ledger = Ledger(is_described=False).claimed(self.run.path, self.uri)
            return connect(self.run, is_over)
        self.ledger = before.settled(self.run.path, self.uri)
        return client, experiment_id

    def _open_run(self) -> str:
        """The MLflow run of this run folder, made at the first start and found again at the next."""
        tracking, run_id = self.run.config.tracking, self.ledger.run_id
        if run_id is None:
            tags = {OUTBOX_TAG: self.ledger.outbox} | tracker_notes.created_tags(self.run)
            # the answer to an earlier try may have been lost
            there = runs_of_outbox(self.client, self.experiment_id, self.ledger.outbox)
            run_name = tracking.run_name or self.run.path.name
            created = None if there else self.client.create_run(self.experiment_id, run_name=run_name, tags=tags)
            run_id = created.info.run_id if created else there[0]
            self.ledger = self.ledger.change(
                self.run.path, run_id=run_id, experiment_id=self.experiment_id, is_described=False
            )
        self.client.update_run(run_id, status="RUNNING")  # also one that died, and was never told to have ended
        tags = {"rlhf.run_dir": shown(self.run.path.resolve())}  # it may have been moved
        tags |= {f"prefect.{name}": without_credentials(value) for name, value in self.prefect_run.items()}
        for name, value in tags.items():
            self.client.set_tag(run_id, name, value)
        for drift in self.run.drifts:
            self.client.set_tag(run_id, f"rlhf.drift.{drift.iteration:06d}", "; ".join(drift.changes))
        for extension in self.run.extensions:  # params, num_iterations among them, cannot change any more
            self.client.set_tag(run_id, f"rlhf.extension.{extension.iteration:06d}", extension_sentence(extension))
        if not self.ledger.is_described:
            self._describe(run_id)
            tracker_notes.introduce_experiment(self.client, self.experiment_id)
            tracker_notes.leave_note(self.client, run_id, tracker_notes.run_note(self.run, self.prefect_run))
            self.ledger = self.ledger.change(self.run.path, is_described=True)
        return run_id

    def _describe(self, run_id: str) -> None:
        """Params, config, and the prompts as the run's input."""
        from mlflow.entities import Param

        there = self.client.get_run(run_id).data.params  # a param is never changed, whoever has set it
        params = [Param(name, value) for name, value in tracker_notes.params(self.run).items() if name not in there]
        for start in range(0, len(params), MAX_PARAMS):
            self.client.log_batch(run_id, params=params[start : start + MAX_PARAMS])
        send_text(self.client, run_id, config_template(self.run.config), "config.yaml")
        send_text(self.client, run_id, json.dumps(self.run.identity, indent=2, sort_keys=True), "identity.json")
        log_prompts(self.client, run_id, self.run.config.prompts, self.run.identity["prompts"], "training")

    def _num_arrived(self) -> int:
        """Iterations whose sentinel the tracker has."""
        steps = {metric.step for metric in self.client.get_metric_history(self.run_id, SENTINEL)}
        return next(step for step in range(len(steps) + 1) if step not in steps)  # others may log that metric, too

    def _log_results(self) -> None:
        """What came out, with the time stamp of the last iteration: the same, however often it is sent.

        A run that went on has two of each; MLflow shows the later one.
        """
        last = self.run.num_finished() - 1
        for metric in self.client.get_metric_history(self.run_id, SENTINEL):
            if metric.step == last:
                log_metrics(self.client, self.run_id, metric.timestamp, result_metrics(self.run))
                return


class _Traces:
    """What TrackedTraces asks of MLflow: each call with the same traces again changes nothing."""

    def __init__(self, sender: _Sender, is_over: Callable[[], bool]) -> None:
        from mlflow.tracing.client import TracingClient

        self._sender = sender
        self._client: Any = Patient(TracingClient(tracking_uri(sender.run)), (), is_over, is_final)

    def start(self, trace: Mapping[str, Any]) -> None:
        """Make a trace whose metadata says which logged model has answered: nothing else can say it later."""
        from mlflow.entities import TraceInfo, TraceLocation, TraceState

        location = TraceLocation.from_experiment_id(self._sender.experiment_id)
        self._client.start_trace(TraceInfo(trace_location=location, state=TraceState.OK, **trace))

    def log(self, spans: Sequence[Mapping[str, Any]]) -> None:
        """Send the spans of many traces at once, and show the traces on the run's page."""
        from mlflow.entities import Span

        self._client.log_spans(self._sender.experiment_id, [Span.from_dict(dict(span)) for span in spans])
        ids = [str(span["trace_id"]) for span in spans]
        for start in range(0, len(ids), MAX_LINKS):
            self._sender.client.link_traces_to_run(ids[start : start + MAX_LINKS], self._sender.run_id)


def connect(
    run: RunFolder, is_over: Callable[[], bool] = lambda: False, experiment_id: str | None = None
) -> tuple[Any, str]:
    """A client of the run's tracker, and the run's experiment there, made if it is not.

    A try takes as long as ``LIMITS`` says, and fails for us to see: MLflow's own retries would create things twice.
    The tracker also becomes MLflow's default, because a version's source ``models:/...`` is looked up there. MLflow
    writes its default into MLFLOW_TRACKING_URI too, where the next run of this process would take it for the
    user's choice: that is undone.

    Args:
        run: the run folder.
        is_over: whether nothing more may be sent.
        experiment_id: of a run that was begun there: the experiment may have another name by now.
    Raises: RefusalError where a person has to do something first, or whatever the tracker raises.
    """
    for use in tracker(run.config):
        check_door(use)
    import mlflow
    from mlflow.tracking import MlflowClient

    prepare_client()
    uri, chosen = tracking_uri(run), os.environ.get("MLFLOW_TRACKING_URI")
    with store_lock(uri):
        if database := sqlite_store.database_of(uri):
            sqlite_store.make_ready(database, _make_store, is_over)
            if before := sqlite_store.follow_move(database):
                logger.warning("%s was in %s: its places of files there are now those beside it", database, before)
                _forget_places()
        mlflow.set_tracking_uri(uri)
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if chosen is not None:
            os.environ["MLFLOW_TRACKING_URI"] = chosen
        check_version(server_version(uri), uri)
        client: Any = Patient(MlflowClient(uri), ONCE, is_over, is_final)
        if experiment_id is not None:
            return client, kept_experiment(run, find_experiment(client, experiment_id, uri, run.path))
        return client, kept_experiment(run, _named_experiment(client, run, uri))


def server_version(uri: str, timeout_s: float | None = None) -> str:
    """What a server says is its version; empty for a store, and for a server that does not say."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    if not uri.startswith(("http://", "https://")):
        return ""
    answer: Any = http_request(get_default_host_creds(uri), "/version", "GET", timeout=timeout_s, max_retries=0)
    return answer.text if answer.status_code == OK else ""


def prepare_client() -> None:
    """Import MLflow, and set its limits where the user has set nothing else."""
    import mlflow.tracking  # noqa: F401 - seconds

    for limit, value in LIMITS.items():
        os.environ.setdefault(limit, value)


def ask_server(uri: str, name: str, timeout_s: float) -> Any:
    """The experiment of a name on a server, None if it has none. Makes nothing.

    Raises: RefusalError if the server is too old or the experiment is deleted, or whatever MLflow raises.
    """
    from mlflow.tracking import MlflowClient

    check_version(server_version(uri, timeout_s), uri)
    found: Any = MlflowClient(uri).get_experiment_by_name(name)
    if found is not None:
        check_experiment(found, uri)
    return found


def _make_store(database: Path) -> None:
    """Make MLflow's tables in a new sqlite file."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    uri = f"sqlite:///{database}"
    SqlAlchemyStore(uri, str(database.parent / sqlite_store.ARTIFACTS)).engine.dispose()
    SqlAlchemyStore._engine_map.pop(uri, None)


def _forget_places() -> None:
    """Let MLflow look up again where a run's files are; this process may have known the store at another place."""
    from mlflow.tracking._tracking_service import utils

    utils._artifact_repos_cache.clear()


def _named_experiment(client: Any, run: RunFolder, uri: str) -> Any:
    name = run.config.tracking.experiment
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.get_experiment(client.create_experiment(name, artifact_location=artifact_location(run)))
        except Exception as error:  # another run created it in between, or an answer was lost
            found = client.get_experiment_by_name(name)
            if found is None:
                raise error from None
    check_experiment(found, uri)
    return found


def _link_models(client: Any, run_id: str, links: Mapping[str, int]) -> None:
    """Show models as outputs of a run, each at its step."""
    from mlflow.entities import LoggedModelOutput

    client.log_outputs(run_id, [LoggedModelOutput(model_id, step) for model_id, step in links.items()])


def log_metrics(client: Any, run_id: str, timestamp_ms: int, values: Mapping[int, Mapping[str, float]]) -> None:
    """Send metrics by step in one batch. The same metrics with the same time stamp arrive once."""
    from mlflow.entities import Metric

    metrics = [Metric(k, v, timestamp_ms, step) for step, of in values.items() for k, v in sorted(of.items())]
    if metrics:
        client.log_batch(run_id, metrics=metrics)


def log_prompts(client: Any, run_id: str, prompts: PromptsConfig, digest: str, context: str) -> None:
    """Say which prompts a run has read, and what for. The same ones again change nothing."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(**tracker_notes.prompts_dataset(prompts, digest))
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])


def download_registered(run: RunFolder, name: str, version: str, folder: Path) -> None:
    """Fetch the files of a version of a registered model from a run's tracker."""
    import mlflow

    connect(run)
    mlflow.artifacts.download_artifacts(f"models:/{name}/{version}", dst_path=str(folder))
