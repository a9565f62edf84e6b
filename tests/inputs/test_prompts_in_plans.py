"""What the pre-flight says about prompts that were read: notes, keys that a template reads, sizes that would work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from inputs.prompt_files import answer, lines, user

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.preflight import preflight
from rlhf_core.prompts.rendering import render_prompt

Configure = Callable[..., RunConfig]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}{% if m.tool_call_id %} {{ m.tool_call_id }}{% endif %}>{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chat_policy(tiny: Any, tmp_path: Path) -> Path:
    """The tiny policy, with a chat template that reads the key tool_call_id."""
    folder = shutil.copytree(tiny.policy, tmp_path / "policy")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return folder


def with_prompts(path: Path, *rows: Any) -> str:
    path.write_bytes(lines(*rows))
    return f"prompts.source={path}"


def of_policy(folder: Path) -> list[str]:
    return [
        f"policy.model={folder}",
        "reward.components.0.chat_template=raw",
        "prompts.batch_size=4",
        "ppo.num_minibatches=2",
        "kl.controller=fixed",
    ]


def test_pairs_beside_a_text_column_are_rendered_as_chats(
    tiny_config: Configure, chat_policy: Path, tmp_path: Path
) -> None:
    asked = [f"Is it {n}?" for n in range(4)]
    rows = [{"prompt": a, "chosen": [user(a), answer("x")], "rejected": [user(a), answer("y")]} for a in asked]
    source = with_prompts(tmp_path / "p.jsonl", *rows)
    plan = preflight(tiny_config([source, "prompts.from_preferences=true", *of_policy(chat_policy)]))
    texts = [render_prompt(entry, plan.tokenizer.tokenizer) for entry in plan.prompt_set.entries]
    assert texts == [f"<user>{a}<assistant>" for a in asked]
    assert any("'prompt' beside chosen and rejected is not the prompt: the pair decides" in n for n in plan.notes)


def test_a_key_that_the_template_reads_is_refused(tiny_config: Configure, chat_policy: Path, tmp_path: Path) -> None:
    tool = {"role": "tool", "content": "4", "tool_call_id": "x"}
    source = with_prompts(tmp_path / "p.jsonl", *([user(f"{n}?"), tool] for n in range(4)))
    with pytest.raises(UserError, match=r"the key 'tool_call_id', which the chat template .* writes into the prompt"):
        preflight(tiny_config([source, *of_policy(chat_policy)]))


def test_a_key_that_the_template_does_not_read_is_a_note(
    tiny_config: Configure, chat_policy: Path, tmp_path: Path
) -> None:
    source = with_prompts(tmp_path / "p.jsonl", *([{**user(f"{n}?"), "weight": 1}] for n in range(4)))
    plan = preflight(tiny_config([source, *of_policy(chat_policy)]))
    assert any("4 prompts have messages with the key 'weight', which is not used" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("num_prompts", "samples", "minibatches", "remedy"),
    [
        (60, 1, 4, "lower prompts.batch_size to 60, 56, 52 or 32 (at most 60, a multiple of ppo.num_minibatches 4)"),
        (7, 1, 4, "lower prompts.batch_size to 4 (at most 7, a multiple of ppo.num_minibatches 4)"),
        (3, 2, 4, "lower prompts.batch_size to 4 (at most 6, a multiple of ppo.num_minibatches 4 and "),
        (3, 1, 4, "no prompts.batch_size up to 3 is a multiple of ppo.num_minibatches 4: set ppo.num_minibatches 3 "
         "and prompts.batch_size 3"),
    ],
)  # fmt: skip
def test_too_few_prompts_come_with_numbers_that_work(
    tiny_config: Configure, tmp_path: Path, num_prompts: int, samples: int, minibatches: int, remedy: str
) -> None:
    source = with_prompts(tmp_path / "p.jsonl", *(f"prompt {n}" for n in range(num_prompts)))
    sizes = [
        "prompts.batch_size=256", f"prompts.samples_per_prompt={samples}", f"ppo.num_minibatches={minibatches}",
    ]  # fmt: skip
    with pytest.raises(UserError) as caught:
        preflight(tiny_config([source, *sizes, "kl.controller=fixed"]))
    [problem] = caught.value.problems
    assert remedy in problem


@pytest.mark.parametrize("source", ["data/*.jsonl", "data/p-0000?.parquet", "data/p[12].csv"])
def test_a_pattern_of_files_is_refused(tiny_config: Configure, source: str) -> None:
    with pytest.raises(UserError, match="is a pattern of files, which is not read; name one file, or the folder"):
        preflight(tiny_config([f"prompts.source='{source}'"]))
