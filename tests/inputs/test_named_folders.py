"""What named folders carry beside their weights: tokenizers, templates, and whether they can start the critic."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_sft_adapter
from inputs.token_folders import (
    CHATML,
    END,
    LLAMA,
    PAD,
    TEXTS,
    byte_tokenizer,
    change_json,
    run_tree,
    save_model,
)
from iteration import CPU, Bench

from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.actor_critic import ActorCritic
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.preflight import preflight

CHAT = (END, PAD, "<|im_start|>", "<|im_end|>")
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]
CLASSIFIER = "AutoModelForSequenceClassification"


def problems(tree: dict[str, Any], *overrides: str) -> tuple[str, ...]:
    """What a pre-flight refuses."""
    with pytest.raises(UserError) as caught:
        preflight(build_config(tree, list(overrides)))
    return tuple(caught.value.problems)


def test_the_tokenizer_and_template_of_an_adapters_folder_are_the_policys(tmp_path: Path) -> None:
    """LLaMA-Factory, axolotl and TRL save there what the SFT used."""
    base = save_model(tmp_path / "base", 280, byte_tokenizer(CHAT))
    adapter = save_sft_adapter(base, tmp_path / "adapter")
    trained_with = byte_tokenizer(CHAT, eos="<|im_end|>", chat_template=CHATML)
    trained_with.save_pretrained(adapter)
    tree = run_tree(tmp_path, base, prompts=CHATS)
    tree["policy"]["adapter"] = str(adapter)
    bench = Bench.of(build_config(tree))
    assert "the tokenizer is that of policy.adapter, not of policy.model: other chat template, eos token" in (
        bench.plan.notes
    )
    assert bench.plan.tokenizer.eos_ids == {0, 3}, "of the base's generation_config.json, and of the adapter"
    prompts = bench.prompts().batch
    rendered = {trained_with.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in CHATS}
    assert set(prompts.texts) <= rendered
    bench.update(*bench.until_experience())


def test_an_adapters_template_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", 280, byte_tokenizer(CHAT))
    adapter = save_sft_adapter(base, tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text(CHATML)
    tree = run_tree(tmp_path, base)
    tree["policy"]["adapter"] = str(adapter)
    (problem,) = problems(tree)
    assert problem.startswith(f"policy.adapter '{adapter}' has a chat_template.jinja, but no tokenizer")


def test_an_adapter_whose_tokenizer_has_more_tokens_than_the_base_has_rows_is_refused(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", 280, byte_tokenizer())
    adapter = save_sft_adapter(base, tmp_path / "adapter")
    own = byte_tokenizer(chat_template=CHATML)
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    own.save_pretrained(adapter)
    tree = run_tree(tmp_path, base)
    tree["policy"]["adapter"] = str(adapter)
    (problem,) = problems(tree)
    assert "'<|im_start|>' (280), '<|im_end|>' (281) can be in a text and have none" in problem


def other_ids() -> Any:
    """The same tokens, two of them with each other's id."""
    return byte_tokenizer((PAD, END))


def other_tokens() -> Any:
    """As many tokens, one of another name."""
    return byte_tokenizer((END, "<|padding|>"), pad="<|padding|>")


@pytest.mark.parametrize("make", [other_ids, other_tokens])
@pytest.mark.parametrize("field", ["reference.model", "reference.adapter"])
def test_a_reference_to_which_an_id_is_another_token_is_refused(
    make: Callable[[], Any], field: str, tmp_path: Path
) -> None:
    policy = save_model(tmp_path / "policy", 280, byte_tokenizer())
    reference = save_model(tmp_path / "reference", 280, byte_tokenizer())
    adapter = save_sft_adapter(reference, tmp_path / "adapter")
    make().save_pretrained(reference if field == "reference.model" else adapter)
    tree = run_tree(tmp_path, policy)
    tree["reference"] = {"model": str(reference)}
    if field == "reference.adapter":
        tree["reference"]["adapter"] = str(adapter)
    (problem,) = problems(tree)
    assert problem.startswith(f"{field} ")
    assert "KL needs one vocabulary" in problem


@pytest.mark.parametrize("rows", [280, 300, 448])
def test_a_reference_of_the_same_tokenizer_and_other_rows_gives_a_kl_of_0(rows: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    policy = save_model(tmp_path / "policy", 448, tokenizer)
    resized = AutoModelForCausalLM.from_pretrained(policy)
    resized.resize_token_embeddings(rows, mean_resizing=False)
    resized.save_pretrained(tmp_path / "reference")
    byte_tokenizer(chat_template=CHATML).save_pretrained(tmp_path / "reference")
    tree = run_tree(tmp_path, policy)
    tree["reference"] = {"model": str(tmp_path / "reference")}
    bench = Bench.of(build_config(tree))
    assert any(
        note.startswith("reference.model has another chat template than the policy") for note in bench.plan.notes
    )
    experience = bench.until_experience()[2]
    assert experience.token_kl_BR.abs().max() < 1e-5


def test_a_reference_without_rows_for_what_the_policy_draws_is_refused_with_both_numbers(tmp_path: Path) -> None:
    policy = save_model(tmp_path / "policy", 280, byte_tokenizer())
    reference = save_model(tmp_path / "reference", 270, byte_tokenizer(size=270))
    tree = run_tree(tmp_path, policy)
    tree["reference"] = {"model": str(reference)}
    (problem,) = problems(tree)
    assert "has a vocabulary of 270, policy.model of 280" in problem


def foreign(folder: Path) -> Path:
    return save_model(folder, 290, byte_tokenizer(size=290), auto=CLASSIFIER)


def encoder(folder: Path) -> Path:
    import transformers

    config = transformers.BertConfig(**{**LLAMA, "vocab_size": 280})
    return save_model(folder, 280, byte_tokenizer(CHAT), auto=CLASSIFIER, config=config)


def short(folder: Path) -> Path:
    return save_model(folder, 280, byte_tokenizer(CHAT), auto=CLASSIFIER, max_position_embeddings=32)


def templated(folder: Path) -> Path:
    own = byte_tokenizer(CHAT, chat_template=CHATML.replace("<|im_end|>", "<|endoftext|>"))
    return save_model(folder, 280, own, auto=CLASSIFIER)


def bidirectional(folder: Path) -> Path:
    import transformers

    config = transformers.Gemma3TextConfig(**LLAMA, vocab_size=280, use_bidirectional_attention=True)
    return save_model(folder, 280, byte_tokenizer(CHAT), auto=CLASSIFIER, config=config)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (foreign, "has another vocabulary than policy.model"),
        (encoder, "(bert) does not read from left to right"),
        (short, "has a context of 32 tokens, and prompt and response may have 64"),
        (templated, "has another chat template than policy.model"),
        (bidirectional, "does not read from left to right"),
    ],
)
def test_a_default_critic_starts_as_the_policy_where_the_reward_model_cannot_serve(
    make: Callable[[Path], Path], reason: str, tmp_path: Path
) -> None:
    policy = save_model(tmp_path / "policy", 280, byte_tokenizer(CHAT, chat_template=CHATML))
    reward = make(tmp_path / "reward")
    tree = run_tree(tmp_path, policy, {"kind": "model", "model": str(reward)})
    config = build_config(tree)
    plan = preflight(config)
    (note,) = (n for n in plan.notes if n.startswith("the critic starts as the policy's trunk"))
    assert reason in note
    critic = ActorCritic.initial(config, CPU).critic
    assert critic is not None
    assert critic.trunk is not None
    loaded = LanguageModel.load(str(policy), dtype="float32", device=CPU, trainable=False).trunk.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in critic.trunk.state_dict().items())
    assert plan.parameters["critic"] == sum(p.numel() for p in critic.parameters()) - critic.head.weight.numel() - 1
    if make is templated:
        preflight(build_config(tree, ["policy.critic.init=reward"]))
        return
    (problem,) = problems(tree, "policy.critic.init=reward")
    assert problem.startswith("policy.critic.init is reward, but ")
    assert reason in problem


def test_a_default_critic_starts_as_the_reward_model_that_can_serve(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHAT, chat_template=CHATML)
    policy = save_model(tmp_path / "policy", 448, tokenizer)
    reward = save_model(tmp_path / "reward", 280, tokenizer, auto=CLASSIFIER)
    config = build_config(run_tree(tmp_path, policy, {"kind": "model", "model": str(reward)}))
    assert not any("the critic starts" in note for note in preflight(config).notes)
    critic = ActorCritic.initial(config, CPU).critic
    assert critic is not None
    assert critic.trunk is not None
    assert critic.trunk.get_input_embeddings().weight.shape[0] == 280


def test_a_tokenizer_config_alone_does_not_hide_the_bases_tokenizer(tmp_path: Path) -> None:
    """peft writes a README and nothing else that is not the adapter's; a copy of a template counts."""
    base = save_model(tmp_path / "base", 280, byte_tokenizer(CHAT))
    adapter = save_sft_adapter(base, tmp_path / "adapter")
    shutil.copy(base / "tokenizer_config.json", adapter)
    change_json(adapter / "tokenizer_config.json", chat_template=CHATML)
    assert "chat_template" in json.loads((adapter / "tokenizer_config.json").read_text())
    tree = run_tree(tmp_path, base)
    tree["policy"]["adapter"] = str(adapter)
    (problem,) = problems(tree)
    assert "has a tokenizer_config.json, but no tokenizer that it belongs to" in problem
