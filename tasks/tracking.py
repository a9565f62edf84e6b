"""MLflow: a replayable log of what the run folder says. The only file that imports mlflow.

Metrics are on disk (in the stages' manifests) before they are sent. A thread sends them in iteration order;
what has arrived is asked of the tracker itself, so that a resumed run sends the rest and nothing twice. A
tracker that is down or slow never stops training: the loop goes on, and what is missing is sent at the end
or by the next resume.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_core.contracts.config_io import config_digest, config_template, digest_json, flat_params
from rlhf_core.contracts.records import read_record, write_record
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.evaluation.folder import EvaluationFolder
from rlhf_core.evaluation.summary import metrics as evaluation_metrics
from rlhf_core.inspection import before_and_after
from tasks.figures import draw_run
from tasks.guards import GuardRecord, guard_metrics
from tasks.lifecycle import best_checkpoint, checkpoint_value

logger = logging.getLogger(__name__)

SENTINEL = "episode"
"""Sent with every iteration: the steps that have it have arrived."""
MAX_PARAMS = 100
"""MLflow takes no more params at a time."""
CLOSE_TIMEOUT_S = 60.0
"""How long the end of a run waits for the tracker."""
EVALUATION_SAMPLES = 200
"""Rows of an evaluation's sample table."""


def tracking_uri(run: RunFolder) -> str:
    """The configured tracker, MLFLOW_TRACKING_URI, or an sqlite file beside the run folder."""
    default = f"sqlite:///{run.path.resolve().parent / 'mlflow.db'}"
    return run.config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or default


def iteration_metrics(run: RunFolder, iteration: int) -> dict[str, float]:
    """All numbers of a committed iteration, by their MLflow names."""
    manifests = run.manifests(iteration)
    metrics: dict[str, float] = {SENTINEL: float(run.state_before(iteration + 1).episodes)}
    for stage, manifest in manifests.items():
        metrics |= manifest.metrics
        metrics[f"time/{stage}_s"] = manifest.timing["total_s"]
    metrics["time/iteration_s"] = sum(manifest.timing["total_s"] for manifest in manifests.values())
    epochs = metrics["update/num_steps"] / run.config.ppo.num_minibatches
    for stage, passes in (("generate", 1), ("score_rewards", 1), ("reference_logprobs", 1), ("ppo_update", epochs)):
        tokens = passes * metrics["rollout/num_tokens"]
        metrics[f"rate/{stage}_tokens_per_s"] = tokens / max(metrics[f"time/{stage}_s"], 1e-9)
    return metrics | guard_metrics(run, iteration)


class Tracker:
    """Sends a run to MLflow from a thread of its own.

    Args:
        run: the run folder.
        prefect_run: id and page of the flow run, for the link back; empty outside Prefect.
    """

    def __init__(self, run: RunFolder, prefect_run: Mapping[str, str]) -> None:
        self.run, self.prefect_run = run, dict(prefect_run)
        self.uri = tracking_uri(run)
        self.run_id: str | None = None
        self._wanted: queue.Queue[int | None] = queue.Queue()
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    @property
    def page(self) -> str | None:
        """Address of the run in the MLflow UI, where the tracker is a server."""
        recorded = _recorded(self.run)
        if not self.uri.startswith("http") or recorded is None:
            return None
        return f"{self.uri}/#/experiments/{recorded['experiment_id']}/runs/{recorded['run_id']}"

    def start(self) -> None:
        """Begin sending; earlier iterations that have not arrived go first."""
        if self.run.config.tracking.enabled:
            self._thread.start()
            self._wanted.put(self.run.num_finished())

    def iteration_done(self, iteration: int) -> None:
        """Send an iteration that is committed."""
        self._wanted.put(iteration + 1)

    def close(self) -> None:
        """Wait a bounded time for what is left; say what has not arrived."""
        if not self.run.config.tracking.enabled:
            return
        self._wanted.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            self._given_up.set()
            logger.warning("MLflow has not taken everything in %.0f s; `rlhf resume` sends the rest", CLOSE_TIMEOUT_S)

    def _work(self) -> None:
        sender: _Sender | None = None
        finished, closing = 0, False
        while not closing and not self._given_up.is_set():
            wanted = self._wanted.get()
            closing = wanted is None
            finished = finished if wanted is None else wanted
            try:
                sender = sender or _Sender(self.run, self.prefect_run)
                self.run_id = sender.run_id
                sender.send_up_to(finished)
                if closing:
                    sender.finish()
            except Exception as error:  # a tracker's failure must never reach training
                sender = None
                logger.warning("MLflow did not take iteration %d: %s", finished - 1, str(error).split("\n")[0])
                time.sleep(0.5)


class _Sender:
    """The conversation with one tracker. Every method may raise whatever the tracker raises."""

    def __init__(self, run: RunFolder, prefect_run: Mapping[str, str]) -> None:
        from mlflow.tracking import MlflowClient

        self.run = run
        uri = tracking_uri(run)
        with _store_lock(uri):
            _make_default(uri)
            self.client: Any = MlflowClient(uri)
            self.run_id = self._open_run(prefect_run)
        self.next = self._arrived()
        self.models = self._logged_models()

    def send_up_to(self, finished: int) -> None:
        """Send the iterations below ``finished`` that have not arrived, and checkpoints that are new."""
        from mlflow.entities import Metric

        for iteration in range(self.next, finished):
            now = int(time.time() * 1000)
            values = iteration_metrics(self.run, iteration)
            dropped = sum(not math.isfinite(value) for value in values.values())
            values["guard/dropped_metrics"] = float(dropped)
            metrics = [Metric(k, v, now, iteration) for k, v in sorted(values.items()) if math.isfinite(v)]
            self.client.log_batch(self.run_id, metrics=metrics)
            self.next = iteration + 1
        for iteration in self.run.checkpoints():
            if iteration not in self.models:
                self._log_checkpoint(iteration)

    def finish(self) -> None:
        """The figure, the sample table, the aliases of the best and last good checkpoint, and the run's end."""
        self._log_samples()
        figure = self.run.path / "report.png"
        if figure.is_file() or draw_run(self.run, figure):
            self.client.log_artifact(self.run_id, str(figure))
        name = self.run.config.tracking.registered_model
        for alias, iteration in (("best", best_checkpoint(self.run)), ("last_good", self.run.last_good)):
            if iteration in self.models:
                self.client.set_registered_model_alias(name, alias, self.models[iteration])
        stopped_by = GuardRecord.of(self.run).stopped
        self.client.set_tag(self.run_id, "rlhf.stopped_by", stopped_by or "")
        done = self.run.num_finished() == self.run.config.num_iterations and not stopped_by
        self.client.set_terminated(self.run_id, "FINISHED" if done else "KILLED")

    def _open_run(self, prefect_run: Mapping[str, str]) -> str:
        """The MLflow run of this run folder, made at the first start and found again at the next."""
        tracking = self.run.config.tracking
        recorded = _recorded(self.run)
        if recorded is not None:
            self.client.update_run(recorded["run_id"], status="RUNNING")
            for name, value in prefect_run.items():
                self.client.set_tag(recorded["run_id"], f"prefect.{name}", value)
            return recorded["run_id"]
        experiment_id = _experiment(self.client, self.run)
        tags = {
            "rlhf.run_dir": str(self.run.path.resolve()),
            "rlhf.config_sha256": config_digest(self.run.config),
            **{f"rlhf.{name}": str(self.run.identity[name]) for name in ("source", "prompts", "device")},
            **{f"prefect.{name}": value for name, value in prefect_run.items()},
        }
        created = self.client.create_run(experiment_id, run_name=tracking.run_name or self.run.path.name, tags=tags)
        run_id: str = created.info.run_id
        self._describe(run_id)
        write_record(self.run.path / "mlflow.json", {"run_id": run_id, "experiment_id": experiment_id})
        return run_id

    def _describe(self, run_id: str) -> None:
        """Params, config, and the prompts as the run's input."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        params = [Param(name, json.dumps(value) if isinstance(value, list) else str(value))
                  for name, value in flat_params(self.run.config).items()]  # fmt: skip
        params = [p for p in params if p.value != ""]
        for start in range(0, len(params), MAX_PARAMS):
            self.client.log_batch(run_id, params=params[start : start + MAX_PARAMS])
        self.client.log_text(run_id, config_template(self.run.config), "config.yaml")
        self.client.log_text(run_id, json.dumps(self.run.identity, indent=2, sort_keys=True), "identity.json")
        source = self.run.config.prompts.source
        dataset = Dataset(
            name=Path(source).name or source,
            digest=self.run.identity["prompts"][:16],
            source_type="local" if Path(source).exists() else "hugging_face",
            source=json.dumps({"uri": source}),
        )
        self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "prompts")])])

    def _arrived(self) -> int:
        """Iterations whose sentinel the tracker has."""
        history = self.client.get_metric_history(self.run_id, SENTINEL)
        return max((metric.step for metric in history), default=-1) + 1

    def _logged_models(self) -> dict[int, str]:
        """Iteration of each checkpoint of this run that is registered -> its version."""
        name = self.run.config.tracking.registered_model
        versions = self.client.search_model_versions(f"name = '{name}'")
        return {
            int(version.tags["rlhf.iteration"]): str(version.version)
            for version in versions
            if version.tags.get("rlhf.run_id") == self.run_id
        }

    def _log_checkpoint(self, iteration: int) -> None:
        """A checkpoint's policy folder as a logged model and a registered version."""
        from mlflow.exceptions import MlflowException

        folder = self.run.checkpoint_path(iteration) / "policy"
        if not folder.is_dir():  # retention was faster
            return
        recorded = _recorded(self.run)
        assert recorded is not None
        name = self.run.config.tracking.registered_model
        model = self.client.create_logged_model(
            recorded["experiment_id"],
            name=f"{self.run.path.name}-{iteration:06d}",
            source_run_id=self.run_id,
            params={"iteration": str(iteration)},
            model_type="transformers-policy",
        )
        self.client.log_model_artifacts(model.model_id, str(folder))
        self.client.finalize_logged_model(model.model_id, "READY")
        with contextlib.suppress(MlflowException):  # it exists
            self.client.create_registered_model(name)
        tags = {"rlhf.run_id": self.run_id, "rlhf.iteration": str(iteration)}
        version = self.client.create_model_version(
            name, f"models:/{model.model_id}", run_id=self.run_id, tags=tags, model_id=model.model_id
        )
        self.models[iteration] = str(version.version)
        if iteration == max(self.models):  # the last good one is written late
            self.client.set_registered_model_alias(name, "newest", version.version)
        value = checkpoint_value(self.run, iteration)
        if math.isfinite(value):
            self.client.log_metric(self.run_id, "checkpoint/value", value, step=iteration, model_id=model.model_id)

    def _log_samples(self) -> None:
        """Responses before and after training, as a table."""
        samples = before_and_after(self.run)
        if samples:
            self.client.log_table(self.run_id, {k: [row[k] for row in samples] for k in samples[0]}, "samples.json")


def log_evaluation(folder: str) -> None:
    """Send an evaluation to its run's MLflow run, or a bare model's to one of its own: metrics, figure, samples.

    Once for each result. A tracker that is down or slow is a warning: the results are in the folder.
    """
    there = EvaluationFolder.open(Path(folder))
    if not there.config.tracking.enabled:
        return

    def work() -> None:
        try:
            _send_evaluation(there)
        except Exception as error:  # a tracker's failure must never fail an evaluation
            logger.warning("MLflow did not take the evaluation: %s", str(error).split("\n")[0])

    thread = threading.Thread(target=work, name="mlflow", daemon=True)
    thread.start()
    thread.join(CLOSE_TIMEOUT_S)
    if thread.is_alive():
        logger.warning("MLflow has not taken the evaluation in %.0f s; evaluate again to send it", CLOSE_TIMEOUT_S)


def _send_evaluation(there: EvaluationFolder) -> None:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    run = RunFolder.open(there.run_dir) if there.run_dir else RunFolder(there.path, there.config, there.identity)
    uri, numbers, sent = tracking_uri(run), there.summary(), there.path / "mlflow.json"
    before = read_record(sent) if sent.is_file() else {}
    result = digest_json({"uri": uri, "numbers": numbers})
    if before.get("result") == result:
        return
    with _store_lock(uri):
        _make_default(uri)
        client: Any = MlflowClient(uri)
        experiment_id = _experiment(client, run)
    if there.run_dir is None:
        name, tags = there.path.resolve().name, {"rlhf.evaluation": str(there.path.resolve())}
        run_id = before.get("run_id") or client.create_run(experiment_id, run_name=name, tags=tags).info.run_id
    else:
        recorded = _recorded(run)
        if recorded is None:
            raise ValueError(f"it does not have the run {run.path.name}; `rlhf resume` sends it")
        run_id = recorded["run_id"]
    now = int(time.time() * 1000)
    for policy, values in numbers["policies"].items():
        if values["blend"] < 1:  # one policy a step: an interpolation is in the summary and the picture
            continue
        step = int(policy) if policy.isdecimal() else 0
        found = evaluation_metrics(values)
        client.log_batch(run_id, metrics=[Metric(k, v, now, step) for k, v in sorted(found.items())])
    place = "/".join(("evaluations", there.path.resolve().name))
    for file in ("evaluation.png", "summary.json", "frontier.arrow"):
        client.log_artifact(run_id, str(there.path / file), artifact_path=place)
    rows = there.side_by_side(EVALUATION_SAMPLES)
    client.log_table(run_id, {k: [row[k] for row in rows] for k in rows[0]}, f"{place}/samples-{result[:8]}.json")
    if there.run_dir is None:
        client.set_terminated(run_id, "FINISHED")
    write_record(sent, {"run_id": run_id, "result": result})


def _experiment(client: Any, run: RunFolder) -> str:
    """The run's experiment, made if it is not there."""
    from mlflow.exceptions import MlflowException

    name = run.config.tracking.experiment
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    folder = run.path.resolve().parent / "mlartifacts"
    location = folder.as_uri() if tracking_uri(run).startswith("sqlite:") else None
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:  # another run created it in between
        return str(client.get_experiment_by_name(name).experiment_id)


def _recorded(run: RunFolder) -> dict[str, str] | None:
    path = run.path / "mlflow.json"
    return read_record(path) if path.is_file() else None


def _make_default(uri: str) -> None:
    """Make a tracker MLflow's default: it looks up a version's source ``models:/...`` there.

    MLflow writes its default into MLFLOW_TRACKING_URI too, where the next run of this process would take it
    for the user's choice: that is undone.
    """
    import mlflow

    chosen = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if chosen is not None:
        os.environ["MLFLOW_TRACKING_URI"] = chosen


@contextlib.contextmanager
def _store_lock(uri: str) -> Iterator[None]:
    """One process at a time creates and migrates a fresh sqlite store: two of them crash each other."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with (database.parent / f".{database.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
