"""`rlhf check --show-prompts`: prompts token by token, in 80 columns."""

from __future__ import annotations

import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from chat_policies import LLAMA3, TEXTS, chat_policy, chats, config_for
from rich.cells import cell_len
from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

from flows.cli import main
from flows.console import Console
from flows.displays.prompts import checking, show_prompts, token_lines
from rlhf_core.contracts.config_io import config_template
from rlhf_core.preflight import preflight
from rlhf_core.preflight.readings import RESPONSE, first_prompts, reward_readings
from rlhf_core.prompts.pieces import Piece

WIDE = "你好 " * 30


def shown(prompts: list[object], folder: Path, count: int, **knobs: object) -> str:
    config = config_for(chat_policy(folder / "policy", LLAMA3, post="bos"), prompts, prompts=knobs)
    console = Console(file=StringIO(), width=200)
    show_prompts(console, config, preflight(config), count)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_each_token_stands_between_bars(tmp_path: Path) -> None:
    prompts = chats(*TEXTS, system="Be\nbrief")
    text = shown(prompts, tmp_path, 2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert "prompt 1 of 2  row 0 (from 0) of the source" in text
    assert "prompt 3" not in text
    first = text.split("prompt 2 of 2")[0]
    lines = [line[2:] for line in first.splitlines() if line.startswith("  ") and "special tokens" not in line]
    ids = tokenizer.apply_chat_template(prompts[0], add_generation_prompt=True)["input_ids"]
    pieces = "│".join(line.removesuffix("│") for line in lines).split("│")
    assert len(pieces) == len(ids)
    whole = tokenizer.apply_chat_template(prompts[0], tokenize=False, add_generation_prompt=True)
    assert "".join(pieces) == whole.replace(" ", "·").replace("\n", "⏎")
    assert f"<|bos|> {tokenizer.bos_token_id}" in first


def test_it_fits_into_80_columns_and_hides_the_middle_of_a_long_prompt(tmp_path: Path) -> None:
    text = shown([WIDE, "\x1b[31m" + "x" * 3000, *TEXTS], tmp_path, 2, max_len=240, over_long="truncate_left")
    assert max(cell_len(line) for line in text.splitlines()) <= 80
    assert "cut off" in text
    assert "\x1b" not in text


def test_lines() -> None:
    pieces = [Piece(i, f"{i:03d}", is_special=False, ends_line=i == 1) for i in range(1000)]
    lines = [line.plain for line in token_lines(pieces, 20)]
    assert lines[:3] == ["000│001", "002│003│004│005│006│", "007│008│009│010│011│"]
    assert "… 520 tokens …" in lines
    assert lines[-1].endswith("999")
    assert [line.plain for line in token_lines([Piece(0, "abcdef", is_special=True)], 5)] == ["abcd", "ef"]


ROLES = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
FUNCTION = {"kind": "function", "function": "length", "name": "long"}


@pytest.mark.parametrize("template", [None, ROLES])
def test_what_reward_components_read_of_one_response(tmp_path: Path, template: str | None) -> None:
    """Judged by plain transformers: the policy's tokens where template and vocabulary are the same, else its own."""
    policy = chat_policy(tmp_path / "policy", LLAMA3, post="bos")
    reward = shutil.copytree(policy, tmp_path / "reward")
    sizes = AutoConfig.from_pretrained(policy)
    sizes.num_labels = 1
    LlamaForSequenceClassification(sizes).save_pretrained(reward)
    component = {"kind": "model", "model": str(reward), "name": "judge", "chat_template": template}
    sections: dict[str, Any] = {"reward": {"components": [component, FUNCTION]}, "prompts": {"as_chat": True}}
    config = config_for(policy, TEXTS, ["policy.critic.init=policy"], **sections)
    plan = preflight(config)
    judge, function = reward_readings(config, plan, first_prompts(config, plan, 1))
    tokenizer: Any = AutoTokenizer.from_pretrained(reward)
    chat = chats(TEXTS[0])[0]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    response = tokenizer(RESPONSE, add_special_tokens=False)["input_ids"]
    expected = [*prompt, *response, tokenizer.eos_token_id]
    if template is not None:
        text = f"[user]{TEXTS[0]}[assistant]{RESPONSE}"
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [piece.token for piece in judge.pieces] == expected
    assert judge.title == "judge (reward.components.0)"
    assert [piece.text for piece in function.pieces] == [RESPONSE.replace(" ", "·")]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_for(chat_policy(tmp_path / "policy", LLAMA3), TEXTS)
    (tmp_path / "config.yaml").write_text(config_template(config))
    command = ["check", "--config", str(tmp_path / "config.yaml")]
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--show-prompts", "1"])
    out = capsys.readouterr().out
    assert "prompt 1 of 1  row 0 (from 0) of the source" in out
    assert "8 of 8 prompts are plain texts" in " ".join(out.replace("│", " ").split())
    with pytest.raises(SystemExit, match="0"):
        main(command)
    assert "What the policy reads" not in capsys.readouterr().out


@pytest.mark.parametrize(("total", "is_terminal"), [(5000, True), (5000, False), (500, True)])
def test_a_bar_where_somebody_waits(total: int, is_terminal: bool) -> None:
    console = Console(file=StringIO(), force_terminal=is_terminal, width=80, color_system=None)
    with checking(console, "checking") as progress:
        for done in range(min(total, 1000), total + 1, 1000):
            progress(done, total)
    assert ("5000/5000" in console.file.getvalue()) is (is_terminal and total > 1000)  # type: ignore[attr-defined]
