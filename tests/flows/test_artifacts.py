"""What Prefect shows of a run: two artifacts however long it is, a name that says what, and an event a guard."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.runtime import flow_run as this_flow_run

from flows import artifacts, guarding
from flows.links import own_run_dir
from flows.ppo import begin, iterate, resume, train
from flows.progress import Silent, also_watched_by, watched_by, watcher
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.records import read_record
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.inspection import before_and_after, iteration_rows

Configure = Callable[..., RunConfig]


def shown(run_dir: Path) -> tuple[str, dict[str, Any]]:
    """Name and artifacts of the flow run that worked on a run last."""
    flow_run_id = UUID(read_record(run_dir / "prefect.json")["flow_run_id"])
    of_it = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
    with get_client(sync_client=True) as client:
        return client.read_flow_run(flow_run_id).name, {
            str(a.key): a for a in client.read_artifacts(artifact_filter=of_it)
        }


@pytest.fixture(scope="module")
def finished(tiny: Any, tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> Path:
    from iteration import tiny_tree

    from rlhf_core.contracts.config_io import build_config

    run_dir = tmp_path_factory.mktemp("shown") / "Reviews_2"
    train(build_config(tiny_tree(tiny)), str(run_dir))
    return run_dir


def test_a_finished_run_has_its_result_and_a_full_bar(finished: Path) -> None:
    name, found = shown(finished)
    assert name == "ppo · Reviews_2"
    assert set(found) == {"reviews-2", "reviews-2-progress"}
    assert found["reviews-2-progress"].data == 100.0
    page = found["reviews-2"].data
    assert "**3 of 3 iterations** · finished" in page
    assert f"folder `{finished}`" in page
    assert "### First → last (means of 1)" in page
    assert "### Before and after" in page


def test_the_score_before_and_after_stand_in_the_first_lines(finished: Path) -> None:
    first, headline, folder, artifacts_line = shown(finished)[1]["reviews-2"].data.split("\n")[:4]
    rows = iteration_rows(RunFolder.open(finished))
    assert first.startswith("**3 of 3 iterations** · finished")
    wanted = f"score {rows[0]['score']:.3f} → {rows[-1]['score']:.3f}, KL {rows[0]['kl']:z.2f} → {rows[-1]['kl']:.2f}"
    assert headline.strip() == f"**{wanted}**"
    assert str(finished) in folder
    assert f"artifacts `{finished}/iterations/000002` · look with `rlhf inspect {finished}`" in artifacts_line
    assert shown(finished)[1]["reviews-2"].description == f"Run Reviews_2: {wanted}"
    (sample, *_) = before_and_after(RunFolder.open(finished))
    samples = shown(finished)[1]["reviews-2"].data.split("### Before and after")[1].split("\n")
    assert any(line.startswith(f"| before | {sample['score_before']:.2f} | ") for line in samples)


def test_the_log_has_a_line_an_iteration_and_the_result(finished: Path) -> None:
    """Also where the process's own loggers are quiet, as here and in ``rlhf``."""
    flow_run_id = UUID(read_record(finished / "prefect.json")["flow_run_id"])
    of_it = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id]))
    with get_client(sync_client=True) as client:
        lines = [log for log in client.read_logs(log_filter=of_it) if log.level == logging.INFO]
    told = sorted(log.message for log in lines if log.message.startswith(("iteration", "finished")))
    rows = iteration_rows(RunFolder.open(finished))
    begins = [line.partition(":")[0] for line in told]
    assert begins == ["finished", *(f"iteration {i} ({i + 1} of 3)" for i in range(3))]
    assert f"score {rows[1]['score']:.3f}, KL {rows[1]['kl']:.2f}, β {rows[1]['beta']:.4f}" in told[2]
    assert told[0].endswith(f"look into it with  rlhf inspect {finished}")


def test_where_mlflow_is_a_file_the_page_says_how_to_open_it(
    tiny_config: Configure, tmp_path: Path, prefect_server: None
) -> None:
    run_dir = tmp_path / "runs" / "run"
    train(tiny_config(["num_iterations=1", "tracking.enabled=true"]), str(run_dir))
    page = shown(run_dir)[1]["run"].data
    assert f"in `sqlite:///{run_dir.parent}/mlflow.db` · open with `rlhf ui --runs {run_dir.parent}`" in page


@pytest.mark.parametrize(
    "settings", [[], ["execution.num_shards=2", "execution.num_workers=0"],
                 ["execution.num_shards=2", "execution.num_workers=1", "execution.overlap=true"]],
    ids=["whole", "shards", "overlap"],
)  # fmt: skip
def test_an_update_leads_to_the_next_responses_in_the_graph(
    settings: list[str], tiny_config: Configure, tmp_path: Path, prefect_server: None
) -> None:
    train(tiny_config(["num_iterations=2", *settings]), str(tmp_path / "run"))
    flow_run_id = UUID(read_record(tmp_path / "run" / "prefect.json")["flow_run_id"])
    of_it = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
    with get_client(sync_client=True) as client:
        found = {each.name: each for each in client.read_task_runs(flow_run_filter=of_it)}
    inputs = {name: {i.id for of in each.task_inputs.values() for i in of} for name, each in found.items()}  # pyright: ignore[reportAttributeAccessIssue]
    assert found["ppo_update-0"].id in inputs["generate-1"]
    assert found["ppo_update-0"].id in inputs["sample_prompts-1"]
    assert found["sample_prompts-1"].id in inputs["generate-1"]


def test_a_resume_is_named_by_its_folder_too(finished: Path) -> None:
    resume(str(finished))
    assert shown(finished)[0] == "ppo resume · Reviews_2"


def test_while_it_goes_on_the_page_is_written_over(
    tiny_config: Configure, tmp_path: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "EVERY_S", 0.05)
    written: list[str] = []
    put = artifacts.RunPage._put

    def note(page: Any, client: Any, key: str, kind: str, data: Any, description: str) -> None:
        written.append(str(data))
        put(page, client, key, kind, data, description)

    monkeypatch.setattr(artifacts.RunPage, "_put", note)
    train(tiny_config(["num_iterations=6"]), str(tmp_path / "run"))
    pages = [page for page in written if "of 6 iterations** · running" in page]
    assert pages
    assert "| oldest → newest |" in pages[-1]
    assert "best, middle, worst" in pages[-1]
    assert len(shown(tmp_path / "run")[1]) == 2


def test_a_run_that_fails_says_why_and_how_to_go_on(
    tiny_config: Configure, tmp_path: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import ppo

    def fail(*_: Any) -> None:
        raise UserError("the [disk](http://evil.example) is full")

    monkeypatch.setattr(ppo, "train_iteration", fail)
    with pytest.raises(UserError):
        train(tiny_config(), str(tmp_path / "run"))
    page = shown(tmp_path / "run")[1]["run"].data
    assert "**0 of 3 iterations** · stopped\\: the \\[disk\\]\\(http\\:" in page
    assert f"go on with `rlhf resume {tmp_path / 'run'}`" in page


def test_what_prefect_does_not_take_costs_one_line_and_no_time(
    tiny_config: Configure, tmp_path: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def slow_then_refuse(*_: Any) -> None:
        time.sleep(0.2)
        raise RuntimeError("422: too large")

    monkeypatch.setattr(artifacts, "EVERY_S", 0.01)
    monkeypatch.setattr(SyncPrefectClient, "create_artifact", slow_then_refuse)
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        train(tiny_config(), str(tmp_path / "run"))
    assert RunFolder.open(tmp_path / "run").num_finished() == 3
    told = [record.getMessage() for record in caplog.records if "page" in record.getMessage()]
    assert told == [f"Prefect has no new page of {tmp_path / 'run'}: 422: too large; the run goes on"]


def test_without_prefect_no_thread_is_begun(tiny_config: Configure, tmp_path: Path) -> None:
    from flows.calling import without_prefect

    run = RunFolder.create(tmp_path / "run", tiny_config(), {})
    with without_prefect(), artifacts.RunPage(run) as page:
        page.iteration_finished(0, {})
        assert page._thread is None


def test_a_flow_run_that_is_retried_goes_on_in_its_own_folder(
    tiny_config: Configure, tmp_path: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retried in the UI, or suspended and resumed, it is called with the same parameters again."""
    monkeypatch.chdir(tmp_path)
    config, tried = tiny_config(["num_iterations=2"]), list[str]()

    @flow(retries=1, persist_result=False)
    def work() -> None:
        run_dir = own_run_dir()
        tried.append(run_dir)
        begin(config, run_dir)
        iterate(run_dir)
        if len(tried) == 1:
            from flows.links import _own_run_dir

            _own_run_dir.cache_clear()  # as in another process
            raise RuntimeError("its machine went away")

    work()
    assert len(tried) == 2
    assert tried[0] == tried[1]
    with pytest.raises(UserError, match="already holds a run"):
        train(config, tried[0])  # another flow run


def test_a_guard_that_trips_is_an_event_once_and_not_again_on_resume(
    tiny_config: Configure, tmp_path: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, dict[str, str], dict[str, Any]]] = []

    def emit(event: str, resource: dict[str, str], payload: dict[str, Any]) -> None:
        sent.append((event, resource, payload))

    monkeypatch.setattr(guarding, "emit_event", emit)
    ids: list[str] = []

    @flow(persist_result=False)
    def work() -> None:
        ids.append(str(this_flow_run.id))
        config = tiny_config(["guards.kl_ceiling.threshold=1e-3", "guards.negative_kl.threshold=null"])
        begin(config, str(tmp_path / "run"))
        iterate(str(tmp_path / "run"))

    work()
    ((event, resource, payload),) = [each for each in sent if each[1]["rlhf.guard"] == "kl_ceiling"]
    assert event == "rlhf.guard.tripped"
    assert resource["prefect.resource.id"] == f"prefect.flow-run.{ids[0]}"
    assert resource["rlhf.guard.action"] == "warn"
    assert payload["value"] > payload["threshold"] == 1e-3
    assert payload["run"] == str(tmp_path / "run")
    before = len(sent)
    resume(str(tmp_path / "run"))
    assert len(sent) == before


def test_watchers_beside_each_other_are_told_the_same() -> None:
    class Told(Silent):
        def __init__(self, answer: bool | None) -> None:
            self.answer = answer
            self.told: list[Any] = []

        def stage_started(self, iteration: int, stage: str) -> None:
            self.told.append((iteration, stage))

        def warned(self, sentence: str) -> None:
            self.told.append(sentence)

        def decide(self, sentences: Any) -> bool | None:  # pyright: ignore[reportIncompatibleMethodOverride]
            return self.answer

    first, second = Told(None), Told(False)
    with watched_by(first), also_watched_by(second):
        watcher().stage_started(3, "generate")
        watcher().warned("w")
        assert watcher().decide(["?"]) is False
    assert first.told == second.told == [(3, "generate"), "w"]
