"""The config that is printed for a model passes the pre-flight as it stands, whatever its family."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from architectures import decoders, encoders, save_random
from typer.testing import CliRunner

from flows.cli import app
from rlhf_core import model_fit
from rlhf_core.contracts.config_io import load_config
from rlhf_core.contracts.errors import UserError
from rlhf_core.model_fit import fit_config
from rlhf_core.models.tokenizers import load_tokenizer
from rlhf_core.preflight import preflight

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FAMILIES = ["gpt2", "llama", "qwen3", "gemma", "gpt_neox"]


def saved(tiny: Any, folder: Path, family: str, *, template: str | None = None) -> Path:
    tokenizer = load_tokenizer(str(tiny.policy), field="x")
    tokenizer.chat_template = template
    kinds = decoders(len(tokenizer)) | encoders(len(tokenizer))
    auto = "AutoModelForCausalLM" if family in FAMILIES else "AutoModelForSequenceClassification"
    return save_random(kinds[family], auto, folder, tokenizer)


def written(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_printed_passes_the_preflight(family: str, tiny: Any, tmp_path: Path) -> None:
    model = saved(tiny, tmp_path / "m", family)
    prompts = written(tmp_path, *({"prompt": f"the film {i}"} for i in range(6)))
    (tmp_path / "fit.yaml").write_text(fit_config(str(model), prompts, str(tiny.reward)).to_yaml())
    config = load_config(tmp_path / "fit.yaml")
    preflight(config)
    assert (config.prompts.batch_size, config.ppo.num_minibatches) == (4, 4), "of six prompts"
    assert config.policy.lora.rank is None, "so small a model needs no adapter"
    assert config.generation.max_new_tokens == 16, "a quarter of its context of 64"
    assert config.ppo.learning_rate == 2e-4
    assert config.reward.components[0].kind == "model"


def test_every_value_has_a_reason_in_80_columns(tiny: Any, tmp_path: Path) -> None:
    text = fit_config(str(saved(tiny, tmp_path / "m", "llama"))).to_yaml()
    lines = text.splitlines()
    assert max(len(line) for line in lines if line.lstrip().startswith("#")) <= 80
    for before, line in itertools.pairwise(lines):
        if line.rstrip()[-1] != ":" and not line.lstrip().startswith("#"):
            assert before.lstrip().startswith("#"), line


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": "the film"}, {"as_chat": True}),
        ({"prompt": [{"role": "user", "content": "the film"}]}, {"as_chat": False}),
        ({"messages": [{"role": "user", "content": "the film"}]}, {"as_chat": False, "column": "messages"}),
        ({"question": "the film"}, {"as_chat": True, "column": "question"}),
        ({"chosen": "the film is good", "rejected": "the film is bad"}, {"from_preferences": True}),
    ],
)
def test_prompts_are_read_as_they_are(row: dict[str, Any], wanted: dict[str, Any], tiny: Any, tmp_path: Path) -> None:
    model = saved(tiny, tmp_path / "m", "llama", template=TEMPLATE)
    config = fit_config(str(model), written(tmp_path, row, row), "length").config
    assert config is not None
    assert {name: getattr(config.prompts, name) for name in wanted} == wanted


def test_a_model_that_memory_does_not_hold_gets_an_adapter(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(tiny, tmp_path / "m", "llama")
    monkeypatch.setattr(model_fit, "free_bytes", lambda: 1e5)
    config = fit_config(str(model), written(tmp_path, {"prompt": "the film"}), "length").config
    assert config is not None
    assert (config.policy.lora.rank, config.policy.critic.kind) == (16, "shared")
    assert config.ppo.learning_rate == 6e-4


def test_rates_fall_with_size_and_an_adapter_takes_more() -> None:
    limits, whole, adapter = zip(*model_fit.RATES, strict=True)
    assert list(limits) == sorted(limits)
    assert list(whole) == sorted(whole, reverse=True)
    assert all(a > w for a, w in zip(adapter, whole, strict=True))


def test_mistakes_are_one_sentence_each(tiny: Any, tmp_path: Path) -> None:
    model = str(saved(tiny, tmp_path / "m", "llama"))
    classifier = str(saved(tiny, tmp_path / "c", "bert"))
    for arguments, said in (
        ((str(tmp_path / "none"),), "is not a folder"),
        ((classifier,), "--for-model"),
        ((model, str(tmp_path / "none.jsonl"), "length"), "prompts.source"),
        ((model, written(tmp_path, {"a": 1, "b": "x"}), "length"), "has the columns a, b, and none of prompt"),
    ):
        with pytest.raises(UserError) as caught:
            fit_config(*arguments)
        assert said in " ".join(caught.value.problems)


def test_the_command_prints_it_and_refuses_options_without_a_model(tiny: Any, tmp_path: Path) -> None:
    model = saved(tiny, tmp_path / "m", "gpt2")
    printed = CliRunner().invoke(app, ["config", "--for-model", str(model)])
    assert printed.exit_code == 0
    assert f'model: "{model}"' in printed.output
    assert isinstance(CliRunner().invoke(app, ["config", "--prompts", "x"]).exception, UserError)
