"""A sweep in MLflow: a run of its own, which its runs are nested under, with grid, results, picture and best config.

It goes through the outbox, as a run does: FOLDER/mlflow.json is the ledger, training waits for nothing, and what an
outage has kept back is sent by the same command again. The sweep's own run carries no metrics: it is counted in runs
that the tracker has, each of which gets the tag that nests it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Final, Self

from rlhf_core.contracts.config_io import config_template
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.secrets import without_credentials
from rlhf_core.sweeping.folder import SweepFolder
from rlhf_core.sweeping.grid import SweepRun, value_text
from tasks.tracking.doubles import OUTBOX_TAG, remove_double_runs, runs_of_outbox
from tasks.tracking.files import send_file, send_table, send_text
from tasks.tracking.outbox import Ledger, Outbox
from tasks.tracking.refusals import check_run, refusal
from tasks.tracking.store import shown_tracking_uri
from tasks.tracking.tracker import connect, logger

PARENT_TAG: Final = "mlflow.parentRunId"
"""MLflow's own: nests a run under another."""


class SweepTracker:
    """Sends a sweep to MLflow from a thread of its own.

    Args:
        there: the sweep.
        prefect_run: id and page of the flow run, for the link back; empty outside Prefect.
    """

    def __init__(self, there: SweepFolder, prefect_run: Mapping[str, str]) -> None:
        self._there, self._enabled = there, there.config.tracking.enabled
        self.uri = shown_tracker(there)
        self._known: dict[str, str] = {}
        self._outbox = Outbox(
            lambda is_over: _Sender(there, prefect_run, self._known, is_over),
            there.path,
            logger,
            item="run",
            remedy="the same command again",
            refusal=lambda error: refusal(error, there.path),
        )

    @property
    def run_id(self) -> str | None:
        """The MLflow run of the sweep, once the tracker has answered."""
        return self._outbox.run_id

    @property
    def page(self) -> str | None:
        """Address of the sweep in the MLflow UI, where the tracker is a server."""
        return self._outbox.page(self.uri)

    def __enter__(self) -> Self:
        """Begin sending."""
        if self._enabled:
            for run in self._there.runs:
                self._look_at(run)
            self._outbox.start(len(self._known))
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Wait a bounded time for what is left, a second where a signal ends the sweep; say what has not arrived."""
        if self._enabled:
            self._outbox.close(brief=error is not None and not issubclass(error, Exception))

    def look(self, run: SweepRun) -> None:
        """Nest a run, once its own process has made it known to the tracker; returns at once."""
        if self._enabled and run.name not in self._known and self._look_at(run):
            self._outbox.put(len(self._known))

    def _look_at(self, run: SweepRun) -> bool:
        run_id = None
        with contextlib.suppress(IntegrityError):  # the run's own process tells about it
            run_id = Ledger.of(self._there.run_path(run)).run_id
        if run_id is not None:
            self._known[run.name] = run_id
        return run_id is not None


class _Sender:
    """The conversation with one tracker. Every method may raise whatever the tracker raises."""

    def __init__(
        self,
        there: SweepFolder,
        prefect_run: Mapping[str, str],
        known: Mapping[str, str],
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        self.there, self._known = there, known
        self.ledger = Ledger.of(there.path).claimed(there.path, shown_tracker(there))
        self.client, self.experiment_id = self._connect(is_over)
        self.run_id = self._open_run(prefect_run)
        self._nested: set[str] = set()
        self.next = 0

    def send_up_to(self, finished: int) -> None:
        """Nest every run that the tracker knows; doing it twice is doing it once."""
        for name, run_id in list(self._known.items())[:finished]:
            if name not in self._nested:
                self.client.set_tag(run_id, PARENT_TAG, self.run_id)
                self._nested.add(name)
                self.next = len(self._nested)

    def finish(self, *, brief: bool) -> None:
        """The results, and the sweep's end."""
        is_written = (self.there.path / "summary.json").is_file() and not brief
        is_complete = False
        if is_written:
            summary = self.there.summary()
            is_complete = all(run["finished"] for run in summary["runs"])
            send_table(self.client, self.run_id, point_table(summary), "points.json")
            for name in ("summary.json", "sweep.png", "best.yaml"):
                if (self.there.path / name).is_file():
                    send_file(self.client, self.run_id, self.there.path / name)
            self.client.set_tag(self.run_id, "mlflow.note.content", note(summary))
            remove_double_runs(self.client, self.experiment_id, self.ledger.outbox, self.run_id)
        self.client.set_terminated(self.run_id, "FINISHED" if is_complete else "KILLED" if brief else "FAILED")

    def _connect(self, is_over: Callable[[], bool]) -> tuple[Any, str]:
        run, before = _as_run(self.there), self.ledger
        connected = connect(run, is_over, before.experiment_id)
        if before.run_id is not None:
            check_run(connected[0], before.run_id, shown_tracker(self.there), self.there.path)
        self.ledger = before.settled(self.there.path, shown_tracker(self.there))
        return connected

    def _open_run(self, prefect_run: Mapping[str, str]) -> str:
        """The MLflow run of the sweep, made at its first start and found again at the next."""
        path, run_id = self.there.path, self.ledger.run_id
        if run_id is None:
            tags = {OUTBOX_TAG: self.ledger.outbox, "rlhf.sweep": str(path.resolve())}
            made = runs_of_outbox(self.client, self.experiment_id, self.ledger.outbox) or [
                self.client.create_run(self.experiment_id, run_name=path.resolve().name, tags=tags).info.run_id
            ]
            run_id = str(made[0])
            self.ledger = self.ledger.change(path, run_id=run_id, experiment_id=self.experiment_id, is_described=False)
        self.client.update_run(run_id, status="RUNNING")
        for name, value in prefect_run.items():
            self.client.set_tag(run_id, f"prefect.{name}", without_credentials(value))
        if not self.ledger.is_described:
            for key, values in self.there.grid.items():
                self.client.log_param(run_id, f"grid.{key}", ", ".join(value_text(value) for value in values))
            self.client.log_param(run_id, "seeds", ", ".join(map(str, self.there.seeds)))
            self.client.log_param(run_id, "runs", len(self.there.runs))
            send_text(self.client, run_id, config_template(self.there.config), "config.yaml")
            self.ledger = self.ledger.change(path, is_described=True)
        return run_id


def shown_tracker(there: SweepFolder) -> str:
    """The tracker of a sweep as it may be shown."""
    return shown_tracking_uri(_as_run(there))


def point_table(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One flat row a point, as MLflow's table shows it."""
    best = summary["best"]["point"]
    rows: list[dict[str, Any]] = []
    for point in summary["points"]:
        row: dict[str, Any] = {key: value_text(value) for key, value in point["values"].items()}
        row |= {"best": point["point"] == best, "finished": f"{point['finished']} of {point['of']}"}
        for name in ("score", "kl", "gain_per_nat", "value"):
            for part in ("mean", "low", "high"):
                row[name if part == "mean" else f"{name}_{part}"] = (point[name] or {}).get(part)
        rows.append(row)
    return rows


def note(summary: Mapping[str, Any]) -> str:
    """What MLflow shows above the run of a sweep, as Markdown. Values of the config stand in code marks."""
    best, points = summary["best"], summary["points"]
    lines = [f"Best by {summary['criterion']['sentence']}: "]
    lines[0] += f"none, since {best['note']}" if best["point"] is None else _code(points[best["point"]]["label"])
    lines += ["", "| point | finished | score | KL, nats |", "|:--|--:|--:|--:|"]
    for point in points:
        cells = [_code(point["label"]), f"{point['finished']} of {point['of']}"]
        cells += [with_reach(point[name], digits) for name, digits in (("score", 3), ("kl", 2))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_reach(interval: Mapping[str, float | None] | None, digits: int) -> str:
    """``2.71 ± 0.10``; without an interval where there is none, and empty without a number."""
    if interval is None or interval["mean"] is None:
        return ""
    reach = "" if interval["high"] is None else f" ± {interval['high'] - interval['mean']:.{digits}f}"
    return f"{interval['mean']:.{digits}f}{reach}"


def _code(text: str) -> str:
    return f"`{text.replace('`', chr(39)).replace('|', '/')}`"


def _as_run(there: SweepFolder) -> RunFolder:
    """A sweep as one of its runs, for what asks a run where its tracker is: beside the run folders by default."""
    return RunFolder(there.path / "sweep", there.config, {})
