"""Chat templates that write today's date, as those of Llama 3.2, Granite and gpt-oss do, on two days."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from iteration import Bench, tiny_tree
from transformers.utils import chat_template_utils

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.loop_state import Cursor
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.identity import run_identity
from rlhf_core.models.clock import clock_readers
from rlhf_core.preflight import preflight
from tasks.lifecycle.start import check_resumable, start_run
from tasks.session.session import Session

CHAT = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
DATED = "Today is {{ strftime_now('%d %b %Y') }}. " + CHAT + "{% if add_generation_prompt %}<assistant>{% endif %}"
UNDATED = CHAT + "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that sets the day that transformers shows to templates."""

    def set_day(day: int) -> None:
        class Day(datetime.datetime):
            @classmethod
            def now(cls, tz: datetime.tzinfo | None = None) -> Day:
                return cls(2026, 11, day, 23, 59, tzinfo=tz)

        monkeypatch.setattr(chat_template_utils, "datetime", Day)

    set_day(28)
    return set_day


def folder_with(template: str, source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def chats(tiny: Any, path: Path) -> Path:
    texts = [json.loads(line)["prompt"] for line in tiny.prompts.read_text().splitlines()]
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tree(tiny: Any, tmp_path: Path) -> dict[str, Any]:
    """A dated policy that answers chats, and a dated reward model."""
    made = tiny_tree(tiny)
    made["prompts"] |= {"source": str(chats(tiny, tmp_path / "chats.jsonl")), "over_long": "truncate_left"}
    made["policy"] |= {"model": str(folder_with(DATED, tiny.policy, tmp_path / "policy"))}
    component = {"model": str(tiny.reward), "chat_template": DATED}
    return made | {"reward": {"components": [component]}}


def texts_of(session: Session) -> list[str]:
    return list(session.next_prompts(Cursor()).batch.texts)


def test_a_run_shows_the_day_on_which_it_began(tree: dict[str, Any], tmp_path: Path, clock: Any) -> None:
    start_run(build_config(tree), str(tmp_path / "run"))
    first = texts_of(Session(RunFolder.open(tmp_path / "run")))
    clock(29)
    config = check_resumable(str(tmp_path / "run"), accept_drift=False)
    next_day = texts_of(Session(RunFolder.open(tmp_path / "run")))

    assert config.prompts.template_date == "2026-11-28"
    assert all(text.startswith("Today is 28 Nov 2026. <user> ") for text in first)
    assert next_day == first
    assert RunFolder.open(tmp_path / "run").unpinned == {"prompts.template_date": None}


def test_a_reward_model_reads_the_day_on_which_the_run_began(
    tree: dict[str, Any], tiny: Any, tmp_path: Path, clock: Any
) -> None:
    start_run(build_config(tree), str(tmp_path / "run"))
    clock(29)
    session = Session(RunFolder.open(tmp_path / "run"))
    prompts = session.next_prompts(Cursor()).batch
    bench = Bench.of(session.run.config)
    rollouts = bench.rollouts(prompts).batch
    bench.rewards = session.models.reward_components
    found = bench.scores(prompts, rollouts).batch

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.reward)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny.reward, dtype=torch.float32).eval()
    for row in range(3):
        question = prompts.messages[int(rollouts.prompt_rows[row])][0]["content"]
        text = f"Today is 28 Nov 2026. <user> {question}\n<assistant> {rollouts.texts[row]}\n"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][-64:]
        with torch.no_grad():
            expected = float(model(input_ids=torch.tensor([ids])).logits[0, 0])
        assert float(found.score_B[row]) == pytest.approx(expected, abs=1e-4)


def test_a_config_without_a_day_has_another_identity_on_another_day(tree: dict[str, Any], clock: Any) -> None:
    config = build_config(tree)
    prompt_set = preflight(config).prompt_set
    found = [run_identity(config, prompt_set)]
    clock(29)
    found.append(run_identity(config, prompt_set))

    assert [identity["template_date"] for identity in found] == ["2026-11-28", "2026-11-29"]
    assert found[0] | {"template_date": ""} == found[1] | {"template_date": ""}


def test_a_day_of_ones_own(tree: dict[str, Any], tmp_path: Path, clock: Any) -> None:
    tree["prompts"] |= {"template_date": "2024-07-26"}
    config = build_config(tree)

    assert preflight(config).notes == [note for note in preflight(config).notes if "clock" not in note]
    assert run_identity(config, preflight(config).prompt_set)["template_date"] == "2024-07-26"
    start_run(config, str(tmp_path / "run"))
    assert texts_of(Session(RunFolder.open(tmp_path / "run")))[0].startswith("Today is 26 Jul 2024. ")


def test_the_plan_says_which_day(tree: dict[str, Any], clock: Any) -> None:
    (note,) = [note for note in preflight(build_config(tree)).notes if "clock" in note]

    assert note == (
        "the chat template of policy.model and reward.components.0.chat_template reads the clock: it shows 2026-11-28 "
        "throughout the run (set prompts.template_date for another day)"
    )


@pytest.mark.parametrize(
    ("component", "readers"),
    [
        ({"chat_template": DATED}, ["reward.components.0.chat_template"]),
        ({"chat_template": UNDATED}, []),
        ({"chat_template": "dated.jinja"}, ["reward.components.0.chat_template"]),
        ({"chat_template": "no-such-file"}, []),
        ({"tokenizer": "dated"}, ["reward.components.0.tokenizer"]),
        ({"tokenizer": "dated", "chat_template": UNDATED}, []),
        ({"model": "dated"}, ["reward.components.0.model"]),
        ({"model": "in_config"}, ["reward.components.0.model"]),
        ({"model": "nowhere/at/all"}, []),
        ({}, []),
    ],
)
def test_which_templates_read_the_clock(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, component: dict[str, str], readers: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder_with(DATED, tiny.reward, tmp_path / "dated")
    (tmp_path / "dated.jinja").write_text(DATED)
    shutil.copytree(tiny.reward, tmp_path / "in_config")
    settings = tmp_path / "in_config" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": DATED}))
    made = tiny_tree(tiny) | {"reward": {"components": [{"model": str(tiny.reward), **component}]}}

    config: RunConfig = build_config(made)
    assert clock_readers(config) == readers


def test_where_no_template_reads_the_clock_no_day_is_kept(tiny: Any, tmp_path: Path, clock: Any) -> None:
    start_run(build_config(tiny_tree(tiny)), str(tmp_path / "run"))
    run = RunFolder.open(tmp_path / "run")

    assert run.config.prompts.template_date is None
    assert "template_date" not in run.identity
