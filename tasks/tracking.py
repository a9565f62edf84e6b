"""MLflow: a replayable log of what the run folder says. The only file that imports mlflow.

What is sent, and how it is found again after a lost answer; `outbox.py` decides when. A run that died stays RUNNING
in MLflow, which asks nobody: the next resume corrects it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Self

from rlhf_core.contracts.config import PromptsConfig
from rlhf_core.contracts.config_io import config_template, flat_params
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.secrets import without_credentials
from rlhf_core.inspection import before_and_after, extension_sentence
from rlhf_core.viewer.page import NAME as PAGE
from rlhf_core.viewer.page import write_run_page
from tasks import tracker_notes
from tasks.figures import draw_run
from tasks.guards import GuardRecord
from tasks.outbox import Ledger, Outbox, Patient, Sending, store_lock
from tasks.retention import best_checkpoint, checkpoint_value
from tasks.tracked_metrics import SENTINEL, batch_of_metrics, result_metrics
from tasks.tracker_files import send_file, send_model, send_table, send_text
from tasks.tracking_store import artifact_location, kept_experiment, shown_tracking_uri, tracking_uri

logger = logging.getLogger(__name__)

MAX_PARAMS = 100
"""MLflow takes no more at a time."""
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
OUTBOX_TAG = "rlhf.outbox"
_UNFIT: Final = re.compile(r"[/:.%\"']")
"""What MLflow takes in no name of a logged model."""


class Tracker:
    """Sends a run to MLflow from a thread of its own.

    Args:
        run: the run folder.
        prefect_run: id and page of the flow run, for the link back; empty outside Prefect.
    """

    def __init__(self, run: RunFolder, prefect_run: Mapping[str, str]) -> None:
        self.run = run
        self.uri = shown_tracking_uri(run)
        self._outbox = Outbox(lambda is_over: _Sender(run, prefect_run, is_over), run.path, logger)

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
        self.run = run
        self.ledger = Ledger.of(run.path).named(run.path)
        self.client, self.experiment_id = connect(run, is_over)
        self.prefect_run = prefect_run
        self.run_id = self._open_run()
        self.next = self.ledger.sending.first if self.ledger.sending else self._num_arrived()
        self.models = self._registered()

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
                values = self._missing_of(values)
            log_metrics(self.client, self.run_id, sending.timestamp_ms, values)
            self.next = after  # on disk with the next batch
            rest = replace(sending, first=after) if after < sending.after else None
            self.ledger = replace(self.ledger, sending=rest, sent=after)
        if new := [iteration for iteration in self.run.checkpoints() if iteration not in self.models]:
            for iteration in new:
                self._log_checkpoint(iteration)
            self._link_outputs()

    def finish(self, *, brief: bool) -> None:
        """Results, figure, page, samples, the aliases of the best and last good checkpoint, and the run's end."""
        self.ledger = self.ledger.change(self.run.path)
        if not brief:
            self._remove_doubles()
            self._link_outputs()
            self._log_results()
            self._log_samples()
            tracker_notes.leave_note(self.client, self.run_id, tracker_notes.run_note(self.run, self.prefect_run))
            figure = self.run.path / "report.png"
            if figure.is_file() or draw_run(self.run, figure):
                send_file(self.client, self.run_id, figure)
            self._send_page()
            name, newest = self.run.config.tracking.registered_model, max(self.models, default=None)
            for alias, iteration in (
                ("newest", newest), ("best", best_checkpoint(self.run)), ("last_good", self.run.last_good)
            ):  # fmt: skip
                if iteration in self.models:
                    self.client.set_registered_model_alias(name, alias, self.models[iteration])
        stopped_by = GuardRecord.of(self.run).stopped
        self.client.set_tag(self.run_id, "rlhf.stopped_by", stopped_by or "")
        done = self.run.num_finished() == self.run.config.num_iterations and not stopped_by
        self.client.set_terminated(self.run_id, "FINISHED" if done else "KILLED")

    def _missing_of(self, values: Mapping[int, Mapping[str, float]]) -> dict[int, dict[str, float]]:
        """Those that the tracker does not have, metric by metric: a batch may be taken in part."""
        names = sorted(set().union(*values.values()))
        had = {(n, m.step) for n in names for m in self.client.get_metric_history(self.run_id, n)}
        return {step: {k: v for k, v in of.items() if (k, step) not in had} for step, of in values.items()}

    def _open_run(self) -> str:
        """The MLflow run of this run folder, made at the first start and found again at the next."""
        tracking, run_id = self.run.config.tracking, self.ledger.run_id
        if run_id is None:
            tags = {OUTBOX_TAG: self.ledger.outbox} | tracker_notes.created_tags(self.run)
            there = self._runs_of_outbox()  # the answer to an earlier try may have been lost
            run_name = tracking.run_name or self.run.path.name
            created = None if there else self.client.create_run(self.experiment_id, run_name=run_name, tags=tags)
            run_id = created.info.run_id if created else there[0]
            self.ledger = self.ledger.change(
                self.run.path, run_id=run_id, experiment_id=self.experiment_id, is_described=False
            )
        self.client.update_run(run_id, status="RUNNING")  # also one that died, and was never told to have ended
        for name, value in self.prefect_run.items():
            self.client.set_tag(run_id, f"prefect.{name}", without_credentials(value))
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

    def _runs_of_outbox(self) -> list[str]:
        """Runs that this run folder has made in the tracker, the oldest first: more than one if answers came late."""
        found = self.client.search_runs(
            [self.experiment_id],
            f"tags.`{OUTBOX_TAG}` = '{self.ledger.outbox}'",
            order_by=["attributes.start_time ASC"],
        )
        return [run.info.run_id for run in found]

    def _remove_doubles(self) -> None:
        """Undo what was created twice, because a first request was carried out after we had given it up."""
        for run_id in self._runs_of_outbox():
            if run_id != self.run_id:
                self.client.delete_run(run_id)
        self.models = self._registered()
        sources = [str(version.source) for version in self._versions()]
        for iteration in self.models:
            same = self._logged_models(self._model_name(iteration))
            kept = next((m for m in same if any(m.model_id in source for source in sources)), None)
            for model in same:
                if kept is not None and model is not kept:
                    self.client.delete_logged_model(model.model_id)
        for model in self._logged_models():  # retention was faster than the tries to register it
            if int(model.params["iteration"]) not in {*self.models, *self.run.checkpoints()}:
                self.client.delete_logged_model(model.model_id)

    def _describe(self, run_id: str) -> None:
        """Params, config, and the prompts as the run's input."""
        from mlflow.entities import Param

        params = [Param(name, json.dumps(value) if isinstance(value, list) else str(value))
                  for name, value in flat_params(self.run.config).items()]  # fmt: skip
        params = [p for p in params if p.value != ""]
        for start in range(0, len(params), MAX_PARAMS):
            self.client.log_batch(run_id, params=params[start : start + MAX_PARAMS])
        send_text(self.client, run_id, config_template(self.run.config), "config.yaml")
        send_text(self.client, run_id, json.dumps(self.run.identity, indent=2, sort_keys=True), "identity.json")
        log_prompts(self.client, run_id, self.run.config.prompts, self.run.identity["prompts"], "training")

    def _num_arrived(self) -> int:
        """Iterations whose sentinel the tracker has."""
        history = self.client.get_metric_history(self.run_id, SENTINEL)
        return max((metric.step for metric in history), default=-1) + 1

    def _versions(self) -> list[Any]:
        """The registered versions of this run, the oldest first."""
        name = self.run.config.tracking.registered_model
        found = self.client.search_model_versions(f"name = '{name}' and run_id = '{self.run_id}'")
        return sorted(found, key=lambda version: int(version.version))

    def _registered(self) -> dict[int, str]:
        """Iteration of each checkpoint that is registered -> its version; a second one is removed."""
        kept: dict[int, str] = {}
        for version in self._versions():
            iteration = int(version.tags["rlhf.iteration"])
            if iteration in kept:
                self.client.delete_model_version(version.name, str(version.version))
            else:
                kept[iteration] = str(version.version)
        return kept

    def _logged_models(self, *names: str) -> list[Any]:
        """The logged models of this run, or those of a name, the oldest first."""
        named = "".join(f" and name = '{name}'" for name in names)
        order = [{"field_name": "creation_timestamp", "ascending": True}]
        filters = f"source_run_id = '{self.run_id}'{named}"
        return list(self.client.search_logged_models([self.experiment_id], filters, order_by=order))

    def _model_name(self, iteration: int) -> str:
        return f"{_UNFIT.sub('-', self.run.path.name)}-{iteration:06d}"

    def _log_checkpoint(self, iteration: int) -> None:
        """A checkpoint's policy folder as a logged model and a registered version, which says that all is there."""
        folder = self.run.checkpoint_path(iteration) / "policy"
        if not folder.is_dir():  # retention was faster
            return
        there = self._logged_models(self._model_name(iteration))
        model = there[0] if there else self.client.create_logged_model(
            self.experiment_id,
            name=self._model_name(iteration),
            source_run_id=self.run_id,
            params={"iteration": str(iteration)} | tracker_notes.model_tags(self.run),
            model_type="transformers-policy",
        )  # fmt: skip
        send_model(self.client, model.model_id, folder)
        self.client.finalize_logged_model(model.model_id, "READY")
        value = checkpoint_value(self.run, iteration)
        history = self.client.get_metric_history(self.run_id, "checkpoint/value")
        if math.isfinite(value) and iteration not in {metric.step for metric in history}:
            self.client.log_metric(
                self.run_id, "checkpoint/value", value, model.creation_timestamp, iteration, model_id=model.model_id
            )
        name = self.run.config.tracking.registered_model
        _create_registered_model(self.client, name)
        tags = {"rlhf.run_id": self.run_id, "rlhf.iteration": str(iteration)} | tracker_notes.model_tags(self.run)
        if iteration not in (registered := self._registered()):
            version = self.client.create_model_version(
                name,
                f"models:/{model.model_id}",
                run_id=self.run_id,
                tags=tags,
                description=tracker_notes.version_note(self.run, iteration),
                model_id=model.model_id,
                await_creation_for=0,
            )
            registered[iteration] = str(version.version)
        self.models |= registered
        if iteration == max(self.models):  # the last good one is written late
            self.client.set_registered_model_alias(name, "newest", self.models[iteration])

    def _send_page(self) -> None:
        """The page of the run; a run that a guard has stopped, or an error, has written none of this state."""
        page, is_whole = self.run.path / PAGE, (self.run.path / "before_after.json").is_file()
        if (is_whole and page.is_file()) or write_run_page(self.run):
            send_file(self.client, self.run_id, page)

    def _link_outputs(self) -> None:
        """Show the registered models on the run's page; a second time is refused by the tracker."""
        from mlflow.entities import LoggedModelOutput

        outputs = self.client.get_run(self.run_id).outputs
        there = {output.model_id for output in outputs.model_outputs} if outputs else set[str]()
        iterations = {m.model_id: int(m.params["iteration"]) for m in self._logged_models() if m.model_id not in there}
        if links := [LoggedModelOutput(model_id, i) for model_id, i in iterations.items() if i in self.models]:
            self.client.log_outputs(self.run_id, links)

    def _log_results(self) -> None:
        """What came out, with the time stamp of the last iteration, so that it is the same whenever it is sent."""
        values = result_metrics(self.run)
        last = max(self.client.get_metric_history(self.run_id, SENTINEL), key=lambda m: m.step, default=None)
        if last is not None and last.step in values:
            log_metrics(self.client, self.run_id, last.timestamp, self._missing_of(values))

    def _log_samples(self) -> None:
        """Responses before and after training, as a table."""
        if samples := before_and_after(self.run):
            send_table(self.client, self.run_id, samples, "samples.json")


def connect(run: RunFolder, is_over: Callable[[], bool] = lambda: False) -> tuple[Any, str]:
    """A client of the run's tracker, and the run's experiment there, made if it is not.

    A try takes as long as ``LIMITS`` says, and fails for us to see: MLflow's own retries would create things twice.
    The tracker also becomes MLflow's default, because a version's source ``models:/...`` is looked up there. MLflow
    writes its default into MLFLOW_TRACKING_URI too, where the next run of this process would take it for the
    user's choice: that is undone.
    """
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    for limit, value in LIMITS.items():
        os.environ.setdefault(limit, value)
    uri, name, chosen = tracking_uri(run), run.config.tracking.experiment, os.environ.get("MLFLOW_TRACKING_URI")
    with store_lock(uri):
        mlflow.set_tracking_uri(uri)
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if chosen is not None:
            os.environ["MLFLOW_TRACKING_URI"] = chosen
        client: Any = Patient(MlflowClient(uri), ONCE, is_over)
        if found := client.get_experiment_by_name(name):
            return client, kept_experiment(run, found)
        try:
            return client, str(client.create_experiment(name, artifact_location=artifact_location(run)))
        except MlflowException:  # another run created it in between, or an answer was lost
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
            return client, kept_experiment(run, found)


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


def _create_registered_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def download_registered(run: RunFolder, name: str, version: str, folder: Path) -> None:
    """Fetch the files of a version of a registered model from a run's tracker."""
    import mlflow

    connect(run)
    mlflow.artifacts.download_artifacts(f"models:/{name}/{version}", dst_path=str(folder))
