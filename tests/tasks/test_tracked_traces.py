"""Extreme responses as MLflow traces: each once, whatever is killed, in a hundredth of the time; and back again."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from iteration import tiny_tree
from tiny_world import Tiny
from torture.runs import start
from tracked_runs import client_of, ledger_of, send

from flows.cli import main
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.inspection import artifact_table
from tasks.tracking import traces as tracked_traces
from tasks.tracking import tracker as tracking
from tasks.tracking.outbox import Ledger
from tasks.tracking.traces import TrackedTraces, extreme_responses, trace_id


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four iterations, two responses a prompt, that no tracker knows."""
    path = tmp_path_factory.mktemp("traced") / "runs" / "run"
    tree = tiny_tree(tiny) | {"num_iterations": 4, "checkpoint": {"every": 2, "keep_last": 3}}
    start(build_config(tree, ["prompts.samples_per_prompt=2", "tracking.enabled=false"]), path)
    return path


@pytest.fixture
def run(trained: Path, tmp_path: Path, empty_store: Path) -> RunFolder:
    """A copy of it, tracked beside an empty store, with traces of iterations 0, 2 and 3."""
    from rlhf_core.contracts.records import read_record, write_record

    path = Path(shutil.copytree(trained, tmp_path / "runs" / "run"))
    shutil.copy(empty_store, path.parent / "mlflow.db")
    record = read_record(path / "run.json")
    record["config"]["tracking"] |= {"enabled": True, "trace_every": 2}
    write_record(path / "run.json", record)
    return RunFolder.open(path)


def traces_of(run: RunFolder) -> list[Any]:
    found = client_of(run).search_traces(locations=[ledger_of(run).experiment_id], max_results=100)
    return sorted(found, key=lambda trace: trace.info.tags["rlhf.sample_id"])


def wanted(run: RunFolder) -> dict[str, set[str]]:
    """Response -> why it is extreme, of the iterations that are due."""
    return {row["sample_id"]: set(row["extreme"]) for i in (0, 2, 3) for row in extreme_responses(run, i)}


def once_each(run: RunFolder) -> None:
    """Raise AssertionError unless every trace is there, once, and shown on the run's page."""
    found = traces_of(run)
    assert {t.info.tags["rlhf.sample_id"]: set(t.info.tags["rlhf.extreme"].split(", ")) for t in found} == wanted(run)
    assert len(found) == len(wanted(run))
    linked = client_of(run).search_traces(
        locations=[ledger_of(run).experiment_id], run_id=ledger_of(run).run_id, max_results=100
    )
    assert len(linked) == len(found)
    with sqlite3.connect(run.path.parent / "mlflow.db") as database:
        assert database.execute("select count(*) from spans").fetchone() == (len(found),)
        links = "select count(*) from entity_associations where source_type = 'trace'"
        assert database.execute(links).fetchone() == (len(found),)
    database.close()
    assert ledger_of(run).traced == 4


def test_the_extremes_of_an_iteration(run: RunFolder) -> None:
    rows = extreme_responses(run, 3)
    scores = {row["sample_id"]: row["score"] for row in artifact_table(run, 3, "score_rewards").to_pylist()}
    reasons = {reason: row for row in rows for reason in row["extreme"]}
    assert reasons["highest score"]["score"] == max(scores.values())
    assert reasons["lowest score"]["score"] == min(scores.values())
    assert reasons.keys() >= {"largest KL", "most changed"}
    other = reasons[tracked_traces.SAME_PROMPT]
    assert other["prompt_id"] == reasons["highest score"]["prompt_id"]
    assert other["score"] < reasons["highest score"]["score"]
    assert len({row["sample_id"] for row in rows}) == len(rows)


def test_traces_say_what_was_asked_and_answered_and_which_model_has(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert send(run, monkeypatch) == []
    once_each(run)
    models = {m.params["iteration"]: m.model_id for m in client_of(run).search_logged_models(["1"])}
    for trace in traces_of(run):
        row = next(r for r in extreme_responses(run, int(trace.info.tags["rlhf.iteration"]))
                   if r["sample_id"] == trace.info.tags["rlhf.sample_id"])  # fmt: skip
        (span,) = trace.data.spans
        assert (span.inputs, span.outputs) == ({"prompt": row["prompt_text"]}, {"response": row["response_text"]})
        assert span.attributes["score"] == pytest.approx(row["score"])
        assert trace.info.trace_id == trace_id(ledger_of(run).outbox, row["sample_id"])
        assert trace.info.trace_metadata.get("mlflow.modelId") == models.get(str(row["iteration"]))
    assert {t.info.tags["rlhf.iteration"] for t in traces_of(run) if t.info.trace_metadata.get("mlflow.modelId")} == {
        "2"
    }


def send_all(sender: Any) -> None:
    sender.send_up_to(4)
    sender.finish(brief=False)


@pytest.mark.parametrize("call", ["start", "log", "link", "ledger"])
@pytest.mark.parametrize("is_done", [True, False])
def test_a_sender_that_dies_anywhere_leaves_each_trace_once(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, call: str, *, is_done: bool
) -> None:
    from mlflow.tracing.client import TracingClient
    from mlflow.tracking import MlflowClient

    owner, name = {
        "start": (TracingClient, "start_trace"),
        "log": (TracingClient, "log_spans"),
        "link": (MlflowClient, "link_traces_to_run"),
        "ledger": (tracking._Sender, "_traced"),
    }[call]
    real, deaths = getattr(owner, name), [2 if call == "start" else 1]

    def die(*arguments: Any, **named: Any) -> Any:
        deaths[0] -= 1
        if deaths[0] == 0:
            if is_done:
                real(*arguments, **named)
            raise SystemExit
        return real(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, die)
        sender = tracking._Sender(run, {})
        with pytest.raises(SystemExit):
            send_all(sender)
    assert send(run, monkeypatch) == []
    once_each(run)


def test_sending_again_keeps_what_people_have_said(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    send(run, monkeypatch)
    mlflow.set_tracking_uri(f"sqlite:///{run.path.parent / 'mlflow.db'}")
    (first, *_) = traces_of(run)
    mlflow.log_feedback(trace_id=first.info.trace_id, name="ok", value=True, source=person())
    ledger_of(run).change(run.path, traced=0)
    assert send(run, monkeypatch) == []
    once_each(run)
    (again, *_) = traces_of(run)
    assert [assessment.name for assessment in again.info.assessments] == ["ok"]


def test_they_can_be_switched_off(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    off = run.config.model_copy(update={"tracking": run.config.tracking.model_copy(update={"trace_every": None})})
    traces = TrackedTraces(
        RunFolder(run.path, off, run.identity), Ledger(outbox="o"), Recorder(), lambda _: pytest.fail("sent")
    )
    traces.send_rest(4, {})


def test_a_server_that_takes_none_loses_nothing_else(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracing.client import TracingClient

    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError("log_spans is not supported: MLflow server version 3.1 is less than 3.4")

    monkeypatch.setattr(TracingClient, "log_spans", refuse)
    said: list[str] = []
    monkeypatch.setattr(tracked_traces.logger, "warning", lambda text, *values: said.append(text % values))
    assert send(run, monkeypatch) == []
    assert len(said) == 1
    assert "MLflow takes no traces (log_spans is not supported" in said[0]
    assert client_of(run).get_run(ledger_of(run).run_id).info.status == "FINISHED"


def test_a_damaged_artifact_costs_its_own_traces_alone(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.path / "iterations/000002/02_rollouts.arrow").write_bytes(b"damaged")
    said: list[str] = []
    monkeypatch.setattr(tracked_traces.logger, "warning", lambda text, *values: said.append(text % values))
    assert send(run, monkeypatch) == []
    assert len(said) == 1
    assert said[0].startswith("no traces of iteration 2: ")
    assert {trace.info.tags["rlhf.iteration"] for trace in traces_of(run)} == {"0", "3"}


class Recorder:
    """A tracker whose every call takes some seconds of a clock that tests move."""

    def __init__(self, costs_s: float = 0.0) -> None:
        self.now, self.costs_s, self.num_logged = 0.0, costs_s, 0

    def start(self, trace: Any) -> None:
        pass

    def log(self, spans: Any) -> None:
        self.now += self.costs_s
        self.num_logged += 1


def test_they_take_a_hundredth_of_the_time_at_most_and_the_rest_waits(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Recorder(costs_s=0.5)
    monkeypatch.setattr(tracked_traces.time, "monotonic", lambda: tracker.now)
    every = run.config.model_copy(update={"tracking": run.config.tracking.model_copy(update={"trace_every": 1})})
    written: list[int] = []
    traces = TrackedTraces(RunFolder(run.path, every, run.identity), Ledger(outbox="o"), tracker, written.append)
    for finished in range(1, 5):
        tracker.now += 10.0  # an iteration
        traces.send_due(finished, {})
        assert tracker.num_logged == (finished >= 2), "a fifth of a second is expected, a hundredth of twenty"
    tracker.now += 50.0
    traces.send_due(4, {})
    assert tracker.num_logged == 1, "two times half a second would be more than a hundredth"
    tracker.now += 20.0
    traces.send_due(4, {})
    assert (tracker.num_logged, written) == (2, [1, 2])
    traces.send_rest(4, {})
    assert (tracker.num_logged, written) == (4, [1, 2, 3, 4])


def person() -> Any:
    from mlflow.entities import AssessmentSource

    return AssessmentSource(source_type="HUMAN", source_id="anna")


def test_what_people_say_comes_back_as_pairs(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    def feedback(*more: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(["feedback", str(run.path), "--to", str(tmp_path / "pairs.jsonl"), *more])
        return int(ended.value.code or 0)

    assert feedback() == 2
    assert "MLflow does not know" in capsys.readouterr().err
    send(run, monkeypatch)
    assert feedback() == 2
    assert "nobody has judged a trace of" in capsys.readouterr().err
    mlflow.set_tracking_uri(f"sqlite:///{run.path.parent / 'mlflow.db'}")
    by_reason = {why: t for t in traces_of(run) for why in t.info.tags["rlhf.extreme"].split(", ")
                 if t.info.tags["rlhf.iteration"] == "3"}  # fmt: skip
    best, worse = by_reason["highest score"], by_reason[tracked_traces.SAME_PROMPT]
    mlflow.log_feedback(trace_id=best.info.trace_id, name="ok", value=False, source=person())
    assert feedback() == 2, "one judgement is no pair"
    mlflow.log_feedback(trace_id=worse.info.trace_id, name="ok", value=True, source=person())
    assert not (tmp_path / "pairs.jsonl").exists()
    assert feedback("--labels", str(tmp_path / "labels.jsonl")) == 0
    assert "pairs: 1, of 2 judged responses" in capsys.readouterr().out
    (pair,) = map(json.loads, (tmp_path / "pairs.jsonl").read_text().splitlines())
    assert pair == {
        "prompt": best.data.spans[0].inputs["prompt"],
        "chosen": worse.data.spans[0].outputs["response"],
        "rejected": best.data.spans[0].outputs["response"],
    }
    labels = list(map(json.loads, (tmp_path / "labels.jsonl").read_text().splitlines()))
    assert sorted(row["label"] for row in labels) == [False, True]
