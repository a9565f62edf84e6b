"""The quickstart of a real chat model with a tiny one in its place: from a worker, and what it refuses."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from architectures import SMALL, save_random
from prefect.client.orchestration import get_client

import flows.quickstart as quickstart
from flows.commands.training import refuse_mixed
from rlhf_core.chatworld import world
from rlhf_core.chatworld.taste import sentences, write_taste
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import ModelReward
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.inspection import before_and_after
from rlhf_core.models.tokenizers import load_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}q {{ m.content }} a {% else %}{{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)


@pytest.fixture
def reviews(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Reviews, and a recipe that makes a tiny Llama of the real model's shape."""
    from transformers import LlamaConfig

    tokenizer = load_tokenizer(str(tiny.policy), field="x")
    tokenizer.chat_template = TEMPLATE
    shape = {**SMALL, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    config = LlamaConfig(
        **{**shape, "max_position_embeddings": 256}, vocab_size=len(tokenizer), tie_word_embeddings=True
    )
    policy = save_random(config, "AutoModelForCausalLM", tmp_path / "tiny", tokenizer)
    monkeypatch.setattr(world, "write_model", lambda out, _tell: shutil.copytree(policy, out, dirs_exist_ok=True))
    monkeypatch.setattr(world, "write_taste", partial(write_taste, pairs=40, held_out=15))
    monkeypatch.setattr(world, "sentences", partial(sentences, count=55))
    folder = tmp_path / "reviews"
    folder.mkdir()
    for name, word in (("a.pos", "good"), ("a.neg", "bad")):
        (folder / name).write_text("".join(f"the film number {i} is {word} .\n" for i in range(60)))
    return folder


@pytest.mark.usefixtures("prefect_server")
def test_a_worker_builds_the_world_in_a_task_and_trains_in_it(
    reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller = {
        "prompts": {"batch_size": 4},
        "generation": {"max_new_tokens": 6},
        "num_threads": 1,
        "tracking": {"enabled": False},
    }
    monkeypatch.setattr(quickstart, "REAL_SETTINGS", quickstart.REAL_SETTINGS | smaller)
    state = quickstart.build_and_train(str(tmp_path / "q"), 2, "real", "model", str(reviews), return_state=True)
    assert state.is_completed(), state.message
    (run_dir,) = (path for path in (tmp_path / "q" / "runs").iterdir() if (path / "run.json").is_file())
    run = RunFolder.open(run_dir)
    assert run.num_finished() == 2
    (component,) = run.config.reward.components
    assert isinstance(component, ModelReward)
    assert component.model == str(tmp_path / "q" / "real" / "reward")
    rows = before_and_after(run)
    assert rows
    assert all("sentence" in row["prompt"] and not row["prompt"].startswith("q ") for row in rows), "what was asked"
    assert (run_dir / "view.html").is_file()
    assert state.state_details.flow_run_id is not None
    with get_client(sync_client=True) as client:
        flow = client.read_flow_run(state.state_details.flow_run_id)
        names = {each.name for each in client.read_task_runs()}
    assert flow.name == "quickstart · real"
    assert "build_chat_world" in names


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (("embedded", "model", ""), "belong to --model real"),
        (("embedded", "function", "reviews"), "belong to --model real"),
        (("real", "model", ""), "belong together"),
        (("real", "function", "reviews"), "belong together"),
        (("reel", "function", ""), "model is 'reel'; choose embedded or real"),
        (("real", "taste", ""), "reward is 'taste'; choose function or model"),
    ],
)
def test_choices_that_do_not_fit_together(chosen: tuple[str, str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        refuse_mixed(*chosen)


@pytest.mark.parametrize("chosen", [("embedded", "function", None), ("real", "function", ""), ("real", "model", "r")])
def test_choices_that_do(chosen: tuple[str, str, Any]) -> None:
    refuse_mixed(*chosen)
