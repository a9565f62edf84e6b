"""Wherever a person reads a chat, what was asked stands first, and the whole prompt is one step away."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from chat_policies import CHATML, chat_policy, config_for
from mlflow.tracking import MlflowClient

from flows.artifacts import a_few
from flows.calling import without_prefect
from flows.console import Console
from flows.displays.evaluation import print_evaluation
from flows.displays.inspection import Question, show_run
from flows.displays.terminal import print_result
from flows.evaluate import evaluate
from flows.ppo import train
from rlhf_core.contracts.cleaned import Cleaned
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.evaluation.folder import EvaluationFolder
from rlhf_core.inspection import SIDES, before_and_after, iteration_rows, last_of_user
from rlhf_core.selection import Selection
from rlhf_core.tables import open_run
from rlhf_core.viewer.contents import page_contents
from tasks.tracking.traces import _preview

ASKED = [f"why {i}" for i in range(4)]


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """A run of chats, in MLflow."""
    folder = tmp_path_factory.mktemp("chatting")
    shutil.copy(empty_store, folder / "mlflow.db")
    rows = [
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "The film"},
         {"role": "assistant", "content": "felt slow"}, {"role": "user", "content": asked}]
        for asked in ASKED
    ]  # fmt: skip
    config = config_for(chat_policy(folder / "policy", CHATML), rows, tracking={"enabled": True})
    with without_prefect():
        train(config, str(folder / "run"))
    return folder / "run"


def test_the_result_shows_what_was_asked_and_keeps_what_was_read(chatting: Path) -> None:
    samples = before_and_after(RunFolder.open(chatting))
    assert [sample["prompt"] for sample in samples] == ASKED
    assert all("be brief" in sample["prompt_text"] for sample in samples)
    out = io.StringIO()
    run = RunFolder.open(chatting)
    print_result(
        Console(file=out, width=80), str(chatting), iteration_rows(run), samples, kl_target=None, tracking_uri=""
    )
    assert "why 2" in out.getvalue()
    assert "be brief" not in out.getvalue()
    assert f"inspect {chatting} --stage sample_prompts" in " ".join(out.getvalue().split()), "one step away"


def test_a_chat_is_shown_whole_under_what_it_asks(chatting: Path) -> None:
    out = io.StringIO()
    show_run(Console(file=out, width=80), chatting, Question(stage="sample_prompts"), limit=1)
    lines = [line.split() for line in out.getvalue().splitlines() if line.strip()]
    assert lines[1][0] == "asked"
    assert lines[2:6] == [["system", "be", "brief"], ["user", "The", "film"], ["assistant", "felt", "slow"],
                          ["user", *lines[1][1:]]]  # fmt: skip
    assert max(map(len, out.getvalue().splitlines())) <= 80


def test_a_list_of_responses_in_80_columns_has_a_line_for_what_was_asked(chatting: Path) -> None:
    out = io.StringIO()
    show_run(Console(file=out, width=80), chatting, Question(selection=Selection("score", False, None, None)))
    lines = out.getvalue().splitlines()
    assert {line.strip() for line in lines if line.startswith("  why")} == set(ASKED)
    assert len(lines) <= 2 + 4 * 5 + 1, "a response takes at most five lines"


def test_an_evaluation_shows_what_was_asked(chatting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[str] = []
    monkeypatch.setattr("flows.evaluate.leave_note", lambda _key, page, _what: pages.append(page))
    with without_prefect():
        there = EvaluationFolder.open(Path(evaluate(str(chatting), num_prompts=4, samples=2, frontier_samples=20)))
    rows, out = there.side_by_side(4), io.StringIO()
    print_evaluation(Console(file=out, width=80), there.summary(), rows)
    for text in (out.getvalue(), *pages):
        assert "why" in text
        assert "be brief" not in text
    assert "whole:" in out.getvalue()
    assert all("be brief" in row["prompt_text"] for row in rows)
    with (there.path / "samples.arrow").open("rb") as file:
        assert all("be brief" in text for text in pa.ipc.open_file(file).read_all()["prompt"].to_pylist())


def test_mlflow_shows_what_was_asked(chatting: Path) -> None:
    client = MlflowClient(f"sqlite:///{chatting.parent / 'mlflow.db'}")
    run_id = json.loads((chatting / "mlflow.json").read_text())["run_id"]
    samples = json.loads(Path(client.download_artifacts(run_id, "samples.json")).read_text())
    assert samples["columns"] == ["prompt", "before", "score_before", "after", "score_after", "prompt_text"]
    assert [row[0] for row in samples["data"]] == ASKED
    traces = client.search_traces(locations=[client.get_run(run_id).info.experiment_id])
    assert traces
    for trace in traces:
        assert trace.info.request_preview in ASKED
        assert trace.data.spans[0].inputs["messages"][0]["content"] == "be brief", "the whole chat"


def test_a_trace_of_a_checkpoint_has_the_same_preview() -> None:
    chat = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "no"}]
    assert _preview({"messages": chat, "prompt_text": "<user>why"}) == "why"
    assert _preview({"messages": [], "prompt_text": "why"}) == '{"prompt": "why"}'


def test_prefects_page_shows_what_was_asked(chatting: Path) -> None:
    assert {row["prompt_text"] for row in a_few(RunFolder.open(chatting), 0)} <= set(ASKED)


def test_the_page_of_a_run_has_both(chatting: Path) -> None:
    page = page_contents(RunFolder.open(chatting), [0], limit=None, with_evaluation=False)
    assert sorted(page["asked"]) == ASKED
    assert all("be brief" in prompt for prompt in page["prompts"])
    assert [row["prompt"] for row in page["before_after"]] == ASKED
    assert all("be brief" in row["prompt_text"] for row in page["before_after"])


def test_artifacts_are_as_before(chatting: Path) -> None:
    rows = open_run(str(chatting)).samples([0]).arrow().to_pylist()
    assert all("be brief" in row["prompt_text"] for row in rows)
    kept = json.loads((chatting / "before_after.json").read_text())["samples"]
    assert [sorted(row) for row in kept] == [sorted(SIDES)] * len(ASKED)
    assert all("be brief" in row["prompt"] for row in kept), "the file is what it was"


def test_without_the_artifacts_the_prompt_stays_as_the_policy_reads_it(chatting: Path, tmp_path: Path) -> None:
    run = RunFolder.open(Path(shutil.copytree(chatting, tmp_path / "run")))
    Cleaned(date="2026-12-01", artifacts_from=0, artifacts_before=1).write(run.path)
    assert all("be brief" in row["prompt"] for row in before_and_after(run))


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], ""),
        ([{"role": "system", "content": "a"}], ""),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "b"),
    ],
)
def test_the_last_message_of_the_user(messages: list[dict[str, Any]], said: str) -> None:
    assert last_of_user(json.loads(json.dumps(messages))) == said
