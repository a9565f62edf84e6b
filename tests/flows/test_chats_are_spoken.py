"""Wherever a person reads a chat, what was asked stands first: in the result, on Prefect's page, on the run's page."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from chat_policies import CHATML, chat_policy, config_for

from flows.artifacts import a_few
from flows.calling import without_prefect
from flows.console import Console
from flows.displays.terminal import print_result
from flows.ppo import train
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.inspection import before_and_after, iteration_rows, last_of_user
from rlhf_core.tables import open_run
from rlhf_core.viewer.contents import page_contents

ASKED = [f"why {i}" for i in range(4)]


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chatting")
    rows = [
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "The film"},
         {"role": "assistant", "content": "felt slow"}, {"role": "user", "content": asked}]
        for asked in ASKED
    ]  # fmt: skip
    config = config_for(chat_policy(folder / "policy", CHATML), rows)
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


def test_prefects_page_shows_what_was_asked(chatting: Path) -> None:
    assert {row["prompt_text"] for row in a_few(RunFolder.open(chatting), 0)} <= set(ASKED)


def test_the_page_of_a_run_has_both(chatting: Path) -> None:
    page = page_contents(RunFolder.open(chatting), [0], limit=None, with_evaluation=False)
    assert sorted(page["asked"]) == ASKED
    assert all("be brief" in prompt for prompt in page["prompts"])


def test_artifacts_are_as_before(chatting: Path) -> None:
    rows = open_run(str(chatting)).samples([0]).arrow().to_pylist()
    assert all("be brief" in row["prompt_text"] for row in rows)


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
