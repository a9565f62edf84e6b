"""How often, and with what news, the pre-flight reads all prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_policies import TEXTS, chat_policy, config_for

from rlhf_core.contracts.errors import UserError
from rlhf_core.preflight import load_plan, preflight
from rlhf_core.prompts.assembly import PromptAssembler


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts of each call of the tokenizer."""
    calls: list[int] = []
    tokens = PromptAssembler.tokens

    def counting(self: PromptAssembler, texts: Any, **more: Any) -> Any:
        calls.append(len(texts))
        return tokens(self, texts, **more)

    monkeypatch.setattr(PromptAssembler, "tokens", counting)
    return calls


def test_a_process_reads_the_same_prompts_once(tmp_path: Path, counted: list[int]) -> None:
    """The command line checks first, then the flow that it runs; sampling fewer of them reads the same."""
    policy = chat_policy(tmp_path / "policy")
    first = preflight(config_for(policy, TEXTS))
    assert sum(counted) == len(TEXTS)
    again = preflight(config_for(policy, TEXTS))
    assert preflight(config_for(policy, TEXTS, ["prompts.batch_size=2", "prompts.shuffle=true"])).notes == first.notes
    assert sum(counted) == len(TEXTS)
    assert again.notes == first.notes
    preflight(config_for(policy, [*TEXTS[1:], "another"]))
    assert sum(counted) == 2 * len(TEXTS)


@pytest.mark.parametrize("change", ["template", "special", "limit"])
def test_another_tokenizer_or_limit_is_another_reading(tmp_path: Path, counted: list[int], change: str) -> None:
    policy = chat_policy(tmp_path / "policy")
    preflight(config_for(policy, TEXTS))
    overrides: list[str] = []
    if change == "limit":
        overrides = ["prompts.max_len=100"]
    else:
        path = policy / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        more = {"chat_template": "{{ messages }}"} if change == "template" else {"bos_token": "<|im_start|>"}
        path.write_text(json.dumps({**settings, **more}))
    preflight(config_for(policy, TEXTS, overrides))
    assert sum(counted) == 2 * len(TEXTS)


def test_workers_and_replays_load_the_plan_without_reading_prompts(tmp_path: Path, counted: list[int]) -> None:
    config = config_for(chat_policy(tmp_path / "policy"), TEXTS)
    plan = load_plan(config)
    assert counted == []
    whole = preflight(config)
    assert (plan.prompt_set, plan.max_prompt_len, plan.memory_bytes) == (
        whole.prompt_set,
        whole.max_prompt_len,
        whole.memory_bytes,
    )
    with pytest.raises(UserError, match="does not exist"):
        load_plan(config_for(tmp_path / "policy", TEXTS, ["prompts.source=/nowhere/p.jsonl"]))


def test_progress_counts_up_to_all_prompts(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    texts = [f"The film was {i}" for i in range(2500)]
    preflight(config_for(chat_policy(tmp_path / "policy"), texts), lambda *news: told.append(news))
    assert told == [(1000, 2500), (2000, 2500), (2500, 2500)]
