"""Between a reference and a policy: both ends bit for bit, the line between them, tied weights, adapters."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import logits_by_peft, save_sft_adapter
from iteration import CPU
from safetensors.torch import load_file
from tolerances import F32_MODEL, F32_OP
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.interpolation import Interpolation
from rlhf_core.models.policy import load_policy, save_policy

MakeConfig = Callable[[Sequence[str]], RunConfig]
TOKENS = torch.tensor([[5, 9, 30, 7, 2, 41]])


def moved(config: RunConfig, folder: Path, *, std: float = 0.05) -> Path:
    """A checkpoint folder whose policy has moved in every trained weight."""
    policy = load_policy(config, CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    folder.mkdir()
    save_policy(policy, folder, merge=config.policy.lora.save == "merged")
    return folder


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def saved(config: RunConfig, checkpoint: Path, share: float, folder: Path) -> Path:
    Interpolation.between(config, CPU, checkpoint).save(share, folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    """By transformers alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def merged_weights(base: Path | str, adapter: Path | str) -> dict[str, torch.Tensor]:
    """By peft alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a deprecation inside of peft
        model: Any = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
        return dict(model.merge_and_unload().named_parameters())


def test_the_ends_are_policy_and_reference_bit_for_bit(tiny: Any, tiny_config: MakeConfig, tmp_path: Path) -> None:
    # minus zero plus nothing would be plus zero
    negative: Any = AutoModelForCausalLM.from_pretrained(tiny.policy)
    with torch.no_grad():
        negative.transformer.ln_f.weight[0] = -0.0
    negative.save_pretrained(tmp_path / "reference")
    config = tiny_config([f"reference.model={tmp_path / 'reference'}"])
    checkpoint = moved(config, tmp_path / "checkpoint")
    line = Interpolation.between(config, CPU, checkpoint)
    for share, end in ((0.0, tmp_path / "reference"), (1.0, checkpoint / "policy"), (0.0, tmp_path / "reference")):
        found = dict(line.at(share).model.named_parameters())
        expected = weights(end)
        assert set(expected) == set(found)
        for name, value in expected.items():
            assert torch.equal(found[name].view(torch.int32), value.view(torch.int32)), name


def test_every_weight_lies_its_share_of_the_way(tiny: Any, tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config([])
    checkpoint = moved(config, tmp_path / "checkpoint")
    start, end = weights(tiny.policy), weights(checkpoint / "policy")
    line = Interpolation.between(config, CPU, checkpoint)
    for share in (0.7, 0.25):  # the way there does not matter
        found = dict(line.at(share).model.named_parameters())
        for name, value in found.items():
            expected = start[name].double() + share * (end[name].double() - start[name].double())
            assert_close(value.double(), expected, **F32_OP)
    assert not any(p.requires_grad for p in found.values())
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share must be in"):
            line.at(share)


def test_tied_weights_stay_tied_and_the_folder_opens(tiny: Any, tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config([])
    checkpoint = moved(config, tmp_path / "checkpoint")
    line = Interpolation.between(config, CPU, checkpoint)
    model: Any = line.at(0.6).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
    line.save(0.6, tmp_path / "out")
    there = weights(tmp_path / "out")
    assert len(there) > 20
    assert all(torch.equal(there[name], model.state_dict()[name]) for name in there)
    assert_close(logits(tmp_path / "out"), expected, **F32_MODEL)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"


def other_model(tiny: Any, folder: Path, **changes: Any) -> Path:
    """A model with some of its config changed, and random weights."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny.policy, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"n_layer": 1}, "only the policy has transformer.h.1.attn.c_attn.bias"),
        ({"n_embd": 16}, "its transformer.h.0.attn.c_attn.bias is 48, the policy's 96"),
        (
            {"n_head": 4, "initializer_range": 0.2},
            "in the policy's place its weights give other logits than in its own",
        ),
        ({"tie_word_embeddings": False}, "only the reference has lm_head.weight"),
    ],
)
def test_a_reference_of_another_architecture_is_refused(
    changes: dict[str, Any], problem: str, tiny: Any, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    checkpoint = moved(tiny_config([]), tmp_path / "checkpoint")
    config = tiny_config([f"reference.model={other_model(tiny, tmp_path / 'other', **changes)}"])
    with pytest.raises(UserError) as caught:
        Interpolation.between(config, CPU, checkpoint)
    (said,) = caught.value.problems
    assert said.startswith(f"reference.model '{tmp_path / 'other'}' and the policy are not of one architecture")
    assert problem in said


def test_a_plain_adapter_on_the_bare_trunk_is_scaled(tiny: Any, tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(["policy.lora.rank=4", "policy.critic.kind=shared"])
    checkpoint = moved(config, tmp_path / "checkpoint", std=0.2)
    out = saved(config, checkpoint, 0.6, tmp_path / "out")
    assert (out / "adapter_config.json").is_file()
    assert not (out / "config.json").exists()
    base, whole = weights(tiny.policy), merged_weights(tiny.policy, checkpoint / "policy")
    found = merged_weights(tiny.policy, out)
    assert any(not torch.equal(whole[name], base[name]) for name in base)
    for name, value in base.items():
        assert_close(found[name].data, value + 0.6 * (whole[name].data - value), **F32_OP)
    scaled, trained = (load_file(f / "adapter_model.safetensors") for f in (out, checkpoint / "policy"))
    assert all(torch.equal(scaled[k], trained[k]) for k in trained if "lora_A" in k), "A stays as it was"
    line = Interpolation.between(config, CPU, checkpoint)
    with torch.no_grad():
        zero, one = (line.at(share).model(input_ids=TOKENS).logits for share in (0.0, 1.0))
    assert_close(zero, logits_by_peft(tiny.policy, None, TOKENS), **F32_MODEL)
    assert_close(one, logits_by_peft(tiny.policy, checkpoint / "policy", TOKENS), **F32_MODEL)


def test_a_merged_checkpoint_stays_a_whole_model(tiny: Any, tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(["policy.lora.rank=4", "policy.lora.save=merged", "policy.critic.kind=shared"])
    checkpoint = moved(config, tmp_path / "checkpoint", std=0.2)
    found, start, end = (
        weights(f) for f in (saved(config, checkpoint, 0.3, tmp_path / "out"), tiny.policy, checkpoint / "policy")
    )
    for name in found:
        assert_close(found[name], start[name] + 0.3 * (end[name] - start[name]), **F32_OP)


@pytest.mark.parametrize("dora", [False, True], ids=["a named adapter as the reference", "DoRA"])
def test_what_is_not_linear_in_b_goes_by_whole_weights(
    dora: bool, tiny: Any, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    adapter = save_sft_adapter(tiny.policy, tmp_path / "sft", use_dora=dora)
    reference = [f"reference.model={tiny.policy}"] if dora else []
    config = tiny_config([f"policy.adapter={adapter}", "policy.critic.kind=shared", *reference])
    checkpoint = moved(config, tmp_path / "checkpoint", std=0.2)
    found = weights(saved(config, checkpoint, 0.5, tmp_path / "out"))
    start = weights(tiny.policy) if dora else merged_weights(tiny.policy, adapter)
    end = merged_weights(tiny.policy, checkpoint / "policy")
    assert any(not torch.equal(start[name], end[name]) for name in found)
    for name in found:
        assert_close(found[name], ((start[name] + end[name]) / 2).data, **F32_OP)


def test_a_bare_model_is_interpolated_as_its_config_says(tiny: Any, tiny_config: MakeConfig, tmp_path: Path) -> None:
    checkpoint = moved(tiny_config([]), tmp_path / "checkpoint")
    tokenizer = [p for p in tiny.policy.iterdir() if "tokenizer" in p.name]
    for file in tokenizer:
        shutil.copy(file, checkpoint / "policy")
    config = tiny_config([f"policy.model={checkpoint / 'policy'}", f"reference.model={tiny.policy}"])
    found = dict(Interpolation.between(config, CPU).at(0.5).model.named_parameters())
    expected = dict(Interpolation.between(tiny_config([]), CPU, checkpoint).at(0.5).model.named_parameters())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
