"""LoRA adapters that do not fit their base, and targets that are not there: one sentence each, before any start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapters import edit_adapter, save_sft_adapter
from architectures import decoders, save_random
from iteration import CPU

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.policy import load_policy, load_reference
from rlhf_core.models.tokenizers import load_tokenizer
from rlhf_core.preflight import preflight

Configure = Callable[..., RunConfig]


def other_width(tiny: Any, folder: Path) -> Path:
    config = decoders(300)["gpt2"]
    config.n_embd = 16
    tokenizer = load_tokenizer(str(tiny.policy), field="x")
    return save_sft_adapter(save_random(config, "AutoModelForCausalLM", folder / "base", tokenizer), folder / "a")


def other_family(tiny: Any, folder: Path) -> Path:
    tokenizer = load_tokenizer(str(tiny.policy), field="x")
    base = save_random(decoders(300)["llama"], "AutoModelForCausalLM", folder / "base", tokenizer)
    return save_sft_adapter(base, folder / "a", target_modules=["q_proj"])


def more_layers(tiny: Any, folder: Path) -> Path:
    config = decoders(300)["gpt2"]
    config.n_layer = 3
    tokenizer = load_tokenizer(str(tiny.policy), field="x")
    base = save_random(config, "AutoModelForCausalLM", folder / "base", tokenizer)
    return save_sft_adapter(base, folder / "a", target_modules=["c_attn"])


def edited(**values: Any) -> Callable[[Any, Path], Path]:
    def make(tiny: Any, folder: Path) -> Path:
        edit_adapter(save_sft_adapter(tiny.policy, folder / "a"), **values)
        return folder / "a"

    return make


def without_weights(tiny: Any, folder: Path) -> Path:
    (save_sft_adapter(tiny.policy, folder / "a") / "adapter_model.safetensors").unlink()
    return folder / "a"


def prompt_tuning(tiny: Any, folder: Path) -> Path:
    import peft

    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2).save_pretrained(str(folder / "a"))
    return folder / "a"


MISFITS: dict[str, tuple[Callable[[Any, Path], Path], str]] = {
    "other width": (other_width, r"does not fit its base \(gpt2\): its .*lora_A\.weight is 3 x 16, there .* 3 x 32"),
    "other family": (other_family, r"does not fit its base \(gpt2\): Target modules .*q_proj.* not found"),
    "more layers": (more_layers, r"does not fit its base \(gpt2\): its .*h\.2\.attn\.c_attn.* has no place there"),
    "fewer tensors": (
        edited(target_modules=["c_attn"]),
        r"does not fit its base \(gpt2\): its .*c_proj.*lora_A\.weight has no place there",
    ),
    "another rank": (edited(r=4), r"does not fit its base \(gpt2\): its .*lora_A\.weight is 3 x 32, there .* 4 x 32"),
    "no adapter": (lambda tiny, _: tiny.policy, "is not an adapter that loads"),
    "no weights": (without_weights, "has no adapter_model.safetensors"),
    "prompt tuning": (prompt_tuning, "is an adapter of type PROMPT_TUNING; only LORA"),
    "another task": (edited(task_type="SEQ_CLS"), "was trained for SEQ_CLS; an adapter of a policy is for CAUSAL_LM"),
    "pissa": (edited(init_lora_weights="pissa"), "more than plain LoRA: it sets init_lora_weights"),
    "biases": (edited(bias="all"), "more than plain LoRA: it sets bias"),
    "whole modules": (edited(modules_to_save=["ln_f"]), "more than plain LoRA: it sets modules_to_save"),
    "the head": (
        lambda tiny, folder: save_sft_adapter(tiny.policy, folder / "a", target_modules=["c_attn", "lm_head"]),
        "also adapts the output head",
    ),
}


@pytest.mark.parametrize(("make", "sentence"), MISFITS.values(), ids=MISFITS.keys())
def test_an_adapter_that_does_not_fit_is_one_sentence(
    make: Callable[[Any, Path], Path], sentence: str, tiny: Any, tiny_config: Configure, tmp_path: Path
) -> None:
    refused(tiny_config([f"policy.adapter={make(tiny, tmp_path)}"]), "policy.adapter", sentence)


@pytest.mark.parametrize("kind", ["other width", "prompt tuning"])
@pytest.mark.parametrize("policy", [[], ["policy.lora.rank=2"]], ids=["whole", "lora"])
def test_so_is_one_of_the_reference(
    kind: str, policy: list[str], tiny: Any, tiny_config: Configure, tmp_path: Path
) -> None:
    make, sentence = MISFITS[kind]
    refused(tiny_config([*policy, f"reference.adapter={make(tiny, tmp_path)}"]), "reference.adapter", sentence)


def refused(config: RunConfig, field: str, sentence: str) -> None:
    """By the checks before a run, and alike where no check has been."""
    problems = []
    for attempt in (lambda: preflight(config), lambda: load_reference(config, CPU, load_policy(config, CPU))):
        with pytest.raises(UserError, match=sentence) as caught:
            attempt()
        problems.append(caught.value.problems)
    assert problems[0] == problems[1]
    assert len(problems[0]) == 1
    assert problems[0][0].startswith(f"{field} ")
    assert "\n" not in problems[0][0]


def test_it_is_told_together_with_other_problems(tiny: Any, tiny_config: Configure) -> None:
    with pytest.raises(UserError) as caught:
        preflight(tiny_config([f"policy.adapter={tiny.policy}", "reward.components=[]"]))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("target", ["q_proj", "lm_head", "attn"])
def test_target_modules_that_match_nothing_are_named(target: str, tiny_config: Configure) -> None:
    config = tiny_config(["policy.lora.rank=4", f"policy.lora.target_modules=[c_attn, {target}]"])
    for attempt in (lambda: preflight(config), lambda: load_policy(config, CPU)):
        with pytest.raises(UserError) as caught:
            attempt()
        assert len(caught.value.problems) == 1
        assert caught.value.problems[0].startswith(f"policy.lora.target_modules names {target!r}")
        assert "some of c_attn, c_fc, c_proj" in caught.value.problems[0]


def test_an_adapter_in_the_place_of_a_model_is_told_where_it_belongs(
    tiny: Any, tiny_config: Configure, tmp_path: Path
) -> None:
    sft = save_sft_adapter(tiny.policy, tmp_path / "sft")
    for field, remedy in (
        ("policy.model", f"set policy.model to its base ({str(tiny.policy)!r}) and policy.adapter to this folder"),
        ("reference.model", "and reference.adapter to this folder"),
        ("reward.components.0.model", "merge it into its base first"),
    ):
        with pytest.raises(UserError) as caught:
            preflight(tiny_config([f"{field}={sft}"]))
        assert caught.value.problems[0].startswith(f"{field} {str(sft)!r} is a LoRA adapter, not a model")
        assert caught.value.problems[0].endswith(remedy)
    with pytest.raises(UserError, match=r"policy\.model .* is a LoRA adapter; name its base there and this as"):
        LanguageModel.load(str(sft), dtype="float32", device=CPU, trainable=True)


def test_hub_names_are_told_apart_from_folders(tiny_config: Configure) -> None:
    with pytest.raises(UserError, match=r"policy\.adapter 'nobody/nothing' is neither a model folder nor a hub id"):
        preflight(tiny_config(["policy.adapter=nobody/nothing"]))
