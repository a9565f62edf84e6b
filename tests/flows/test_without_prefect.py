"""What a run does when Prefect fails, is told to stop, or dies: files are the truth, Prefect is a view."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.flows import Flow
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_ENABLED, temporary_settings
from prefect.states import Running

from flows import calling, outages, stopping
from flows.calling import call, call_both, flow_body, run_flow
from flows.progress import Silent, watched_by
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.records import read_record, write_record

NOWHERE = "http://127.0.0.1:9/api"
ROOT = Path(__file__).parents[2]


class Told(Silent):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def warned(self, sentence: str) -> None:
        self.told.append(sentence)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No outage is known yet."""
    fresh = outages.Outage()
    monkeypatch.setattr(outages, "outage", fresh)
    monkeypatch.setattr(calling, "outage", fresh)


def test_an_api_that_does_not_answer_is_named_once_and_the_work_is_done() -> None:
    @task
    def double(number: int) -> int:
        return 2 * number

    @flow
    def work(number: int) -> int:
        with flow_body() as ended_with:
            return ended_with(call(double, number) + sum(call_both((double, (1,)), (double, (2,)))))

    told = Told()
    with temporary_settings({PREFECT_API_URL: NOWHERE}), watched_by(told):
        assert run_flow(work, 4) == 14
    assert len(told.told) == 1
    assert f"the Prefect API at {NOWHERE} does not answer" in told.told[0]


def test_no_temporary_server_where_the_environment_forbids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    @flow
    def work(number: int) -> int:
        with flow_body() as ended_with:
            return ended_with(number)

    chosen: dict[Any, Any] = {PREFECT_SERVER_EPHEMERAL_ENABLED: False}
    monkeypatch.setattr(Flow, "__call__", lambda *_, **__: pytest.fail("through Prefect"))
    told = Told()
    with temporary_settings(chosen, restore_defaults={PREFECT_API_URL}), watched_by(told):
        assert not outages.no_server_is_wanted(), "not said: Prefect's own default in a profile without a server"
        monkeypatch.setenv("PREFECT_SERVER_EPHEMERAL_ENABLED", "false")
        assert run_flow(work, 4) == 4
    assert told.told == [], "chosen, so nothing to warn of"
    with temporary_settings({**chosen, PREFECT_API_URL: NOWHERE}):
        assert not outages.no_server_is_wanted(), "a server is configured"


def test_what_prefect_fails_at_in_the_middle_is_done_all_the_same(
    prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine breaks before it reaches the task's function; the flow goes on without Prefect."""

    @task
    def double(number: int) -> int:
        return 2 * number

    def broken(*_: Any, **__: Any) -> None:
        raise httpx.ConnectError("refused")

    @flow
    def work() -> int:
        with flow_body() as ended_with:
            monkeypatch.setattr(type(double), "__call__", broken)
            monkeypatch.setattr(type(double), "submit", broken)
            return ended_with(call(double, 1) + call(double, 2) + sum(call_both((double, (3,)), (double, (4,)))))

    told = Told()
    with watched_by(told):
        assert run_flow(work) == 20
    assert len(told.told) == 1
    assert "failed (ConnectError: refused); the run goes on" in told.told[0]


@pytest.mark.parametrize("error", [httpx.ConnectError("the reward service is gone"), ValueError("a mistake")])
def test_an_error_of_the_work_is_never_taken_for_one_of_prefect(error: Exception, prefect_server: None) -> None:
    calls: list[int] = []

    @task(persist_result=False)
    def work(_number: int) -> int:
        calls.append(1)
        raise error

    @flow(persist_result=False, result_serializer="json")
    def one() -> int:
        with flow_body() as ended_with:
            return ended_with(call(work, 1))

    @flow(persist_result=False, result_serializer="json")
    def two() -> int:
        with flow_body() as ended_with:
            return ended_with(call_both((work, (1,)), (work, (2,)))[0])

    told = Told()
    for tried, expected in ((one, 1), (two, 2)):
        calls.clear()
        with watched_by(told), pytest.raises(type(error), match=str(error)):
            run_flow(tried)
        assert len(calls) == expected
    assert told.told == []


def test_an_api_that_dies_at_the_end_costs_a_warning_not_the_result(
    prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calling, "PATIENCE_S", 0.1)

    @flow(persist_result=False)
    def work() -> int:
        with flow_body() as ended_with:
            return ended_with(7)

    def gone(*_: Any, **__: Any) -> None:
        raise httpx.ConnectError("refused")

    told = Told()
    with monkeypatch.context() as patch, watched_by(told):
        patch.setattr("prefect.flow_engine.FlowRunEngine.handle_success", gone)
        patch.setattr(calling, "_told_completed", lambda: False)
        assert run_flow(work) == 7
    assert any("was not told how the run ended" in sentence for sentence in told.told)


def test_ctrl_c_ends_a_flow_run_as_cancelled(prefect_server: None) -> None:
    ids: list[str] = []

    @flow(persist_result=False)
    def work() -> int:
        with flow_body() as ended_with:
            from prefect.runtime import flow_run

            ids.append(str(flow_run.id))
            raise KeyboardInterrupt
            return ended_with(1)

    with pytest.raises(KeyboardInterrupt):
        run_flow(work)
    with get_client(sync_client=True) as client:
        until = time.monotonic() + stopping.EXIT_S  # the report has a thread of its own, and the machine other work
        while (state := client.read_flow_run(UUID(ids[0])).state) and state.is_running() and time.monotonic() < until:
            time.sleep(0.1)
    assert state is not None
    assert (state.name, state.message) == ("Cancelled", stopping._end_state(stopping._Stop()).message)


def test_a_resume_marks_the_dead_flow_run_before_it_as_crashed(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, prefect_server: None
) -> None:
    from flows.ppo import resume, train

    run_dir = tmp_path / "run"
    train(tiny_config(["num_iterations=1"]), str(run_dir))
    record = read_record(run_dir / "prefect.json")
    with get_client(sync_client=True) as client:

        @flow
        def died() -> None:
            """A flow run whose process is gone."""

        dead = client.create_flow_run(died, state=Running())
        write_record(run_dir / "prefect.json", {**record, "flow_run_id": str(dead.id)})
        resume(str(run_dir))
        state = client.read_flow_run(dead.id).state
        first = client.read_flow_run(UUID(record["flow_run_id"])).state
    assert state is not None
    assert first is not None
    assert (state.name, first.name) == ("Crashed", "Completed")
    assert "has resumed the run" in (state.message or "")
    assert read_record(run_dir / "prefect.json")["flow_run_id"] not in (str(dead.id), record["flow_run_id"])


def test_a_damaged_memory_of_the_flow_run_before_is_told_with_its_remedy(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, prefect_server: None
) -> None:
    from flows.ppo import resume, train

    run_dir = tmp_path / "run"
    train(tiny_config(["num_iterations=1"]), str(run_dir))
    (run_dir / "prefect.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"prefect\.json .*[\s\S]*--repair"):
        resume(str(run_dir))


def test_nothing_is_pickled_in_a_run_or_a_failure(tiny: Any, tmp_path: Path) -> None:
    """In a process of its own: nothing calls pickle or cloudpickle, and what Prefect stores is JSON."""
    script = tmp_path / "run.py"
    script.write_text(
        "import json, pickle, sys\n"
        "from flows.commands.options import prepare_environment\n"
        "prepare_environment()\n"
        "import cloudpickle\n"
        "used = []\n"
        "def watch(event, arguments):\n"
        "    if event == 'pickle.find_class':\n"
        "        used.append(event + str(arguments))\n"
        "def refuse(*_, **__):\n"
        "    used.append('dumped')\n"
        "    raise RuntimeError('pickle was used')\n"
        "import jinja2, prefect.server.api.server, prefect.utilities.hashing\n"
        "from flows.ppo import train\n"
        "from iteration import tiny_tree\n"
        "from pathlib import Path\n"
        "from types import SimpleNamespace\n"
        "from rlhf_core.contracts.config_io import build_config\n"
        "from tiny_world import Tiny\n"
        f"root = Path({str(tiny.root)!r})\n"
        "tiny = Tiny(root, root / 'policy', root / 'reward', root / 'prompts.jsonl')\n"
        "good = build_config(tiny_tree(tiny), ['num_iterations=1'])\n"
        "bad = build_config(tiny_tree(tiny), ['num_iterations=1', 'policy.model=nowhere'])\n"
        "sys.addaudithook(watch)\n"
        "cloudpickle.dumps = cloudpickle.loads = pickle.loads = pickle.dumps = refuse\n"
        f"train(good, {str(tmp_path / 'good')!r})\n"
        "try:\n"
        f"    train(bad, {str(tmp_path / 'bad')!r})\n"
        "except Exception as error:\n"
        "    assert 'nowhere' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('it had to fail')\n"
        "print('USED', used)\n"
    )
    home = tmp_path / "prefect"
    environment = {
        **os.environ, "PREFECT_HOME": str(home), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "PREFECT_API_URL": "", "PREFECT_API_DATABASE_CONNECTION_URL": "",
    }  # fmt: skip
    for name in ("PREFECT_API_URL", "PREFECT_API_DATABASE_CONNECTION_URL"):
        environment.pop(name)
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert "USED []" in done.stdout, done.stdout + done.stderr
    import json

    stored = [path for path in (home / "storage").rglob("*") if path.is_file()] if (home / "storage").is_dir() else []
    for path in stored:
        json.loads(path.read_bytes())
    assert stored, "the failure is a stored result"


def test_every_flow_and_task_of_the_project_keeps_its_results_as_json_or_not_at_all() -> None:
    from flows import chain, evaluate, ppo, quickstart
    from tasks.evaluation import evaluate as evaluating
    from tasks.lifecycle import chain as chaining
    from tasks.lifecycle import start as lifecycle
    from tasks.reports import report
    from tasks.worlds import chat_world, text_world

    flows_ = (
        ppo.train,
        ppo.resume,
        evaluate.evaluate,
        evaluate.evaluate_newest,
        quickstart.build_and_train,
        chain.chain,
    )
    stages = (ppo.sample_prompts, ppo.generate, ppo.score_rewards, ppo.reference_logprobs, ppo.shape_rewards)
    others = (ppo.ppo_update, lifecycle.save_due_checkpoint, report.write_report, evaluating.draw_samples)
    others = (*others, chaining.promote, text_world.text_world, chat_world.chat_world)
    assert all((each.result_serializer, each.persist_result) == ("json", False) for each in flows_)
    assert all(each.result_serializer == "json" and each.persist_result is False for each in (*stages, *others))
